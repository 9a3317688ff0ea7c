"""Several parties take the same patches: drawn alike, or where whoever has the labels says."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from concilium.data.dataset import open_dataset
from concilium.data.patches import Batches, stream
from concilium.data.places import Key
from concilium.data.plan import Plan
from concilium.data.preprocess import Prepared, prepare
from concilium.errors import ContractError

KEYS: list[Key] = [(7, "vertical", 1, step) for step in range(6)]


@pytest.fixture
def party(volumes: Path, make_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Batches]:
    """Batches of a party, with the labels or without: its cases have no place of any label then."""
    dataset, plan = open_dataset(volumes), make_plan(n_dims=3, n_channels=2)
    cases = {c.name: prepare(c, dataset, plan, tmp_path) for c in dataset.cases}

    def made(*, labelled: bool, foreground: float, augmentation: str = "none", labels: Any = None) -> Batches:
        return Batches(
            cases if labelled else {name: _blind(case, tmp_path) for name, case in cases.items()},
            plan=plan,
            labels=labels or dict(dataset.labels),
            batch_size=3,
            foreground=foreground,
            augmentation=augmentation,
            party="a" if labelled else "b",
            labelled=labelled,
        )

    return made


def _blind(case: Prepared, folder: Path) -> Path:
    """The same case as a party prepares it that has no labels."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / "blind" / case.path.name
    path.parent.mkdir(exist_ok=True)
    with safe_open(case.path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    tensors["label"] = torch.zeros_like(tensors["label"])
    tensors |= {name: t[:0] for name, t in tensors.items() if name.startswith("locations/")}
    save_file(tensors, path, about)
    return path


def told(holder: Batches) -> dict[Key, Tensor]:
    return dict(zip(KEYS, holder.places(KEYS), strict=True))


@pytest.mark.parametrize("augmentation", ["none", "nnunet"])
def test_whoever_is_told_takes_the_patches_of_whoever_has_the_labels(
    party: Callable[..., Batches], augmentation: str
) -> None:
    holder = party(labelled=True, foreground=1.0, augmentation=augmentation)
    other = party(labelled=False, foreground=1.0, augmentation=augmentation)
    other.tell(told(holder))
    for mine, theirs in zip(stream(holder, KEYS, workers=0), stream(other, KEYS, workers=0), strict=True):
        assert bool((mine.labels[0] > 0).flatten(1).any(1).all()), "a patch holds no foreground"
        if augmentation == "none":
            assert torch.equal(mine.image, theirs.image)
        else:  # noise is each party's own; where an image has nothing is the same
            a, b = ((m.image - m.image.mean((2, 3, 4), True)).flatten() for m in (mine, theirs))
            assert float(a @ b / (a.norm() * b.norm())) > 0.5


def test_places_are_those_that_are_drawn_in_any_process(party: Callable[..., Batches]) -> None:
    holder, again = (party(labelled=True, foreground=0.5) for _ in range(2))
    places = told(holder)
    assert {tuple(p.shape) for p in places.values()} == {(3, 3)}
    again.tell(places)
    plain = [batch.image for batch in stream(holder, KEYS, workers=0)]
    copied = pickle.loads(pickle.dumps(holder))  # as loader workers get it
    for a, b, c in zip(plain, *(stream(x, KEYS, workers=0) for x in (again, copied)), strict=True):
        assert torch.equal(a, b.image)
        assert torch.equal(a, c.image)


def test_without_labels_and_untold_nothing_is_drawn(party: Callable[..., Batches]) -> None:
    other = party(labelled=False, foreground=0.33)
    with pytest.raises(ContractError, match="follow the labels, which are elsewhere, and were not told"):
        other.draw(*KEYS[0])
    other.tell({KEYS[0]: torch.full((3, 3), 10_000)})
    with pytest.raises(ContractError, match=r"was to begin at \[10000, 10000, 10000\] of a case of"):
        other.draw(*KEYS[0])


def test_uniform_patches_do_not_follow_what_is_to_be_ignored(party: Callable[..., Batches]) -> None:
    """nnU-Net centres every patch on what somebody annotated where there is an ignore label: one party alone knows that."""
    names = {"background": 0, "one": 1, "ignore": 2}
    holder = party(labelled=True, foreground=0.0, labels=names)
    other = party(labelled=False, foreground=0.0, labels=names)
    for key in KEYS:
        assert torch.equal(holder.draw(*key).image, other.draw(*key).image)
