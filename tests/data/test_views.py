"""Views of cases that do not change, and what is kept of stages that do not train: as without, and made once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from concilium.answers import features
from concilium.answers.features import Features, features_of
from concilium.data.dataset import open_dataset
from concilium.data.patches import Batches, stream
from concilium.data.plan import Plan
from concilium.data.preprocess import prepare
from concilium.freezing import freezing, front_of
from concilium.local_updates import Local
from concilium.local_updates.plain import step
from concilium.networks import Stages, unet

KEYS = [(7, "north", round, i) for round in (1, 2) for i in range(6)]
FEW_KEYS = [key for key in KEYS if key[3] < 3]
"""Enough for views that come again."""
PLAN: Any = {"architecture": {"arch_kwargs": {"strides": [[1, 1], [2, 2], [2, 2]]}}}


@pytest.fixture
def site(pictures: Path, make_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Batches]:
    plan, dataset = make_plan(n_dims=2, n_channels=3, patch_size=[64, 63]), open_dataset(pictures)
    prepared = {c.name: prepare(c, dataset, plan, tmp_path) for c in dataset.cases}
    return partial(Batches, prepared, plan=plan, labels=dict(dataset.labels), batch_size=3, foreground=0.33)


def test_a_view_is_the_same_whenever_it_is_drawn(site: Callable[..., Batches], tmp_path: Path) -> None:
    """In any step and order, kept or not; there are no more of a case than were asked for."""
    plain, kept = site(views=2), site(views=2, views_in=tmp_path / "views")
    seen: dict[Any, Tensor] = {}
    for a, b in zip(*(stream(x, KEYS, workers=0) for x in (plain, kept)), strict=True):
        assert a.views == b.views
        assert torch.equal(a.image, b.image)
        assert all(map(torch.equal, a.labels, b.labels))
        for view, image in zip(a.views, a.image, strict=True):
            assert torch.equal(seen.setdefault(view, image), image)
    assert set(Counter(case for case, _ in seen).values()) == {2}
    assert len(list((tmp_path / "views").iterdir())) == len(seen)
    first, other = (next(iter(site(views=2).draw(seed, "x").image)) for seed in (7, 8))
    assert not torch.equal(first, other), "another seed has other views"


@pytest.mark.slow
def test_loader_workers_draw_the_same_views(site: Callable[..., Batches], tmp_path: Path) -> None:
    plain, kept = site(views=2), site(views=2, views_in=tmp_path / "views")
    for a, b in zip(stream(plain, KEYS, workers=0), stream(kept, KEYS, workers=1), strict=True):
        assert a.views == b.views
        assert torch.equal(a.image, b.image)
        assert all(map(torch.equal, a.labels, b.labels))


def test_where_nothing_is_augmented_one_view_is_all_that_there_is(site: Callable[..., Batches]) -> None:
    """Patches as large as the images, which lie in their middle: batches are those without views, to the bit."""
    plain, viewed = (site(views=n, augmentation="none", foreground=0.0) for n in (0, 1))
    assert _fills(plain), "the test is of no use otherwise"
    for key in KEYS:
        a, b = plain.draw(*key), viewed.draw(*key)
        cases = plain.draw_named(*key)[1]
        assert cases == tuple(case for case, _ in b.views)
        assert torch.equal(a.image, b.image)
        assert all(map(torch.equal, a.labels, b.labels))


def _fills(batches: Batches) -> bool:
    """Whether a patch covers every image."""
    loader = batches._loader
    shapes = [loader._data.load_case(name)[0].shape[2:] for name in loader.indices]
    return all(n <= p for shape in shapes for n, p in zip(shape, loader.patch_size[1:], strict=True))


def network(seed: int = 3) -> Stages:
    """A small U-Net whose first resolution does not train."""
    torch.manual_seed(seed)
    made = unet.build(n_channels=3, n_labels=3, plan=PLAN, base_features=4, levels=3)
    for name in ("down0", "encode0"):
        made[name].requires_grad_(False)
    return made


def trained(batches: Batches, folder: Path | None, **changes: Any) -> tuple[Stages, list[float]]:
    """After the steps of two rounds, each with a new object for what is kept."""
    net = network()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    losses = []
    for round in (1, 2):
        divided = front_of(net)
        assert divided is not None
        kept = None if folder is None else Features(*divided, folder, about=("float32",)).logits
        local = Local(net, optimizer, objective, nullcontext, {}, 12.0, kept=kept)
        local = replace(local, **changes)
        for key in FEW_KEYS:
            if key[2] == round:
                losses.append(float(step(local, batches.draw(*key))))
    return net, losses


def objective(logits: Any, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[0], batch.labels[0][:, 0].long())


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_training_is_the_same_and_each_view_passes_the_front_once(
    site: Callable[..., Batches], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None
) -> None:
    batches = site(views=2)
    whole, losses = trained(batches, None, micro_batch=micro_batch)
    passed: list[int] = []
    make = Features._make
    monkeypatch.setattr(Features, "_make", lambda self, image: passed.append(1) or make(self, image))
    kept, again = trained(batches, tmp_path, micro_batch=micro_batch)
    assert losses == pytest.approx(again, abs=1e-6)
    for name, t in whole.state_dict().items():
        assert torch.allclose(t, kept.state_dict()[name], atol=1e-6), name
    start = network().state_dict()
    assert any(not torch.equal(t, start[n]) for n, t in kept.state_dict().items() if n.startswith("up"))
    assert all(torch.equal(t, start[n]) for n, t in kept.state_dict().items() if n.startswith(("down0", "encode0")))
    views = {view for key in FEW_KEYS for view in batches.draw(*key).views}
    assert len(passed) == len(views) < sum(len(batches.draw(*key).views) for key in FEW_KEYS)


def test_other_weights_of_the_front_have_other_maps(tmp_path: Path) -> None:
    a, b = front_of(network(3)), front_of(network(4))
    assert a is not None
    assert b is not None
    first = Features(*a, tmp_path, about=("x",))._folder
    first.mkdir(parents=True)
    assert Features(*a, tmp_path, about=("x",))._folder == first
    assert first.is_dir()
    assert Features(*a, tmp_path, about=("y",))._folder != first
    assert Features(*b, tmp_path, about=("x",))._folder != first
    assert not first.exists(), "what no model uses any more is removed"


def test_the_maps_of_another_seeds_views_are_others(site: Callable[..., Batches], tmp_path: Path) -> None:
    """A seed draws other views of the same numbers: what was left by one that was not forgotten must not be read."""
    job: Any = SimpleNamespace(
        batches=SimpleNamespace(views_in=tmp_path / "views"), training=SimpleNamespace(precision="float32"), seed=1
    )
    batch = site(views=2).draw(*FEW_KEYS[0])
    first = features_of(job, network(), tmp_path / "site")
    other = features_of(SimpleNamespace(**(vars(job) | {"seed": 2})), network(), tmp_path / "site")  # type: ignore[arg-type]
    assert first is not None
    assert other is not None
    noise = batch._replace(image=torch.randn_like(batch.image))
    before = first(batch, None)[0]
    assert torch.equal(before, first(noise, None)[0]), "of the same view the maps are kept"
    assert not torch.equal(before, other(noise, None)[0])


def test_stages_whose_statistics_train_are_not_kept() -> None:
    def built(**_: Any) -> Stages:
        return unet.build(n_channels=3, n_labels=3, plan=PLAN, base_features=4, levels=3, norm="batch")

    for tensors, is_kept in ((["decode*", "heads"], True), (["decode*", "heads", "statistics"], False)):
        assert (front_of(freezing(built, tensors)()) is not None) == is_kept


def test_only_stages_that_train_nothing_are_kept() -> None:
    net = network()
    divided = front_of(net)
    assert divided is not None
    assert divided[0].names == ("down0", "encode0")
    assert divided[1].names == net.names[2:]
    net["down0"].requires_grad_(True)
    assert front_of(net) is None
    assert front_of(torch.nn.Linear(1, 1)) is None
    assert features.FOLDER
