"""Split training is training of the whole network: `splitfed`, a real site behind packed messages, and the same arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from splitting import (
    CHANNELS,
    EQUAL,
    LABELS,
    LONG,
    PATCH,
    POINTS,
    STEPS,
    Convolve,
    Engine,
    Noise,
    built,
    difference,
    first_weights,
    job_of,
    network,
    said,
    trained_apart,
    trained_whole,
    whole,
)
from torch import Tensor
from torch.nn import functional

from concilium import catalog
from concilium.answers import split
from concilium.data.patches import Batch
from concilium.errors import EngineError
from concilium.forecast import split_bytes
from concilium.messages import (
    Gradients,
    Maps,
    Tail,
)
from concilium.networks import Stack, Stages, cut_apart
from concilium.protocols._body import Body

# ---------------------------------------------------------------------------------------- one site: every pair of split points

ENOUGH = {
    ("down0", "up0"), ("down1", "up1"), ("down1", "down2"), ("up2", "up0"), ("up1", "up0"), ("down0", "encode0"),
    ("encode0", "decode0"), ("encode0", "down1"), ("encode1", "down2"), ("encode2", "up1"), ("up0", "decode0"),
}  # fmt: skip


def pairs(name: str, dims: int, *, fast: Container[tuple[str, str]]) -> list[Any]:
    """Every pair of split points; those that are not among `fast` only with `./test --all`."""
    return [
        pytest.param(
            name, dims, pair, id=f"{name} {dims}D {' '.join(pair)}",
            marks=[] if pair in fast else [pytest.mark.exhaustive],
        )
        for pair in itertools.combinations(POINTS[name], 2)
    ]  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])
@pytest.mark.parametrize("name", POINTS)
def test_these_are_all_split_points(name: str, dims: int) -> None:
    assert network(name, dims, True).split_points == POINTS[name]


@pytest.mark.parametrize(
    ("name", "dims", "cut"),
    [
        *pairs("nnunet", 2, fast=ENOUGH),
        *pairs("nnunet", 3, fast=ENOUGH),
        *pairs("unet", 2, fast=ENOUGH),
        *pairs("unet", 3, fast=ENOUGH),
    ],
)
def test_split_equals_whole(name: str, dims: int, cut: tuple[str, str], tmp_path: Path) -> None:
    weights, engine = trained_apart(job_of(name, dims), cut, tmp_path)
    assert difference(weights, whole(name, dims, True)) <= EQUAL
    assert difference(weights, first_weights(job_of(name, dims))) > 1e-3, "nothing was trained"
    assert len(engine.up) == 2 * STEPS + 1


@pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])
@pytest.mark.parametrize("name", POINTS)
def test_a_body_of_the_sites_own_is_the_same_for_one_site(name: str, dims: int, tmp_path: Path) -> None:
    weights, _ = trained_apart(job_of(name, dims), ("shallow",), tmp_path, variant="v1")
    assert difference(weights, whole(name, dims, True)) <= EQUAL


@pytest.mark.parametrize("cut", [("deep",), ("shallow",), ("down2", "up0"), ("up2", "up0")], ids=" ".join)
def test_split_equals_whole_without_deep_supervision(cut: tuple[str, ...], tmp_path: Path) -> None:
    weights, _ = trained_apart(job_of(deep_supervision=False), cut, tmp_path)
    assert difference(weights, whole("nnunet", 2, False)) <= EQUAL


@pytest.mark.parametrize("variant", ["v1", "v2", "sequential"])
def test_optimisers_are_carried_over_rounds(variant: str, tmp_path: Path) -> None:
    """Two rounds, against as many steps of the whole network, with their learning rates."""
    batches_by_round = trained_whole(job_of(), rounds=2, steps=STEPS // 2)
    weights, _ = trained_apart(job_of(), ("deep",), tmp_path, variant=variant, rounds=2, steps={"a": STEPS // 2})
    assert difference(weights, batches_by_round) <= EQUAL


# ------------------------------------------------------------------------------------------------- mistakes that are noticed

CROSSED = ("down1", "up0")
"""Up go the skip of `down0` and the map below; down come three maps, of which the coarsest has no part in the loss."""


def tampered(monkeypatch: pytest.MonkeyPatch, who: str, change: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
    """Let `change` have the gradients that the site sends, or those that the body returns."""
    tail, backward = split.Session.tail, Body.backward
    if who == "site":
        monkeypatch.setattr(
            split.Session, "tail", lambda self, request: Gradients(tuple(change([*tail(self, request).gradients])))
        )
    else:
        monkeypatch.setattr(Body, "backward", lambda self, g, **about: tuple(change([*backward(self, g, **about)])))


@pytest.mark.parametrize("factor", [0.0, 2.0], ids=["dropped", "doubled"])
@pytest.mark.parametrize(("who", "position"), [("site", 1), ("site", 2), ("body", 0), ("body", 1)])
def test_a_wrong_gradient_of_one_map_is_noticed(
    who: str, position: int, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(gradients: list[Tensor]) -> list[Tensor]:
        assert len(gradients) == {"site": 3, "body": 2}[who]
        assert gradients[position].any()
        return [g * factor if i == position else g for i, g in enumerate(gradients)]

    tampered(monkeypatch, who, change)
    weights, _ = trained_apart(job_of(), CROSSED, tmp_path)
    assert difference(weights, whole("nnunet", 2, True)) > 1e-6


def test_a_gradient_that_does_not_return_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up0` reaches the maps of coarser heads, which only pass through: the body has no gradient for them but zero."""
    tampered(monkeypatch, "body", lambda gradients: [g for g in gradients if g.any()])
    with pytest.raises(EngineError, match="0 of 1 sites answered"):
        trained_apart(job_of(), ("up1", "up0"), tmp_path)


def forget_what_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on fronts step without the gradients that the tail gave maps which never left the site."""
    finish = split.Session._finish_step

    def too_early(session: split.Session, gradients: Sequence[Tensor]) -> None:
        assert session._own
        session._own = {}
        finish(session, gradients)

    monkeypatch.setattr(split.Session, "_finish_step", too_early)


@pytest.mark.parametrize("cut", [("down1", "down2"), ("deep",), ("up1", "up0")], ids=" ".join)
def test_a_front_that_steps_without_what_the_tail_gave_its_maps_is_noticed(
    cut: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skip that stayed at home (`deep`), or maps that came back unchanged, get a gradient from the tail as well."""
    forget_what_stayed(monkeypatch)
    weights, _ = trained_apart(job_of(), cut, tmp_path)
    assert difference(weights, whole("nnunet", 2, True)) > 1e-6


@pytest.mark.parametrize("variant", ["v1", "v2", "sequential"])
def test_a_body_that_forgets_its_optimiser_between_rounds_is_noticed(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Body.load
    monkeypatch.setattr(Body, "load", lambda self, weights, moments, numbers: load(self, weights, {}, "{}"))
    weights, _ = trained_apart(job_of(), ("deep",), tmp_path, variant=variant, rounds=2, steps={"a": STEPS // 2})
    assert difference(weights, trained_whole(job_of(), rounds=2, steps=STEPS // 2)) > 1e-6


# ------------------------------------------------------------------------------------------------------- what crosses a cut


POOLING = [
    # whole numbers pass through the body, stay at home, are made by it, are taken by it
    (("down1", "between1"), (0, -1)),
    (("down1", "up1"), (0, -1)),
    (("down1", "down2"), (0, -1, -1)),
    (("down0", "down2"), (-1, -1, -1)),
    (("down2", "up0"), (-1,)),
]


@pytest.mark.parametrize(("cut", "order"), POOLING, ids=lambda value: " ".join(map(str, value)))
def test_maps_of_whole_numbers_cross_cuts(cut: tuple[str, str], order: tuple[int, ...], tmp_path: Path) -> None:
    weights, engine = trained_apart(job_of("pooling", 2, False), cut, tmp_path)
    assert difference(weights, whole("pooling", 2, False)) <= EQUAL
    tail = said(engine.down, Tail)[0]
    assert tail.order == order
    crossing = (*said(engine.up, Maps)[0].maps, *tail.maps)
    assert any(m.dtype == torch.uint8 for m in crossing)


@pytest.mark.parametrize(
    ("name", "cut", "n_up", "order"),
    [
        ("nnunet", ("down1", "up1"), 1, (-1, -1)),  # the skip of down0 stays at home
        ("nnunet", ("down1", "down2"), 1, (0, -1)),  # the body's input is a skip
        ("nnunet", ("up1", "up0"), 3, (1, 2, -1)),  # maps for coarser heads ride along
        ("unet", ("shallow",), 1, (-1,)),
        ("unet", ("encode0", "down1"), 1, (0, -1)),
    ],
)
def test_a_map_that_the_body_leaves_unchanged_is_not_sent_back(
    name: str, cut: tuple[str, ...], n_up: int, order: tuple[int, ...], tmp_path: Path
) -> None:
    _, engine = trained_apart(job_of(name), cut, tmp_path, steps={"a": 2})
    n_down = order.count(-1)
    assert [len(reply.maps) for reply in said(engine.up, Maps)] == [n_up] * 2
    assert [(len(request.maps), request.order) for request in said(engine.down, Tail)] == [(n_down, order)] * 2
    assert [len(reply.gradients) for reply in said(engine.up, Gradients)] == [n_down] * 2
    assert [len(request.gradients) for _, request in engine.down if not isinstance(request, Tail)] == [0, n_up, n_up]


# ---------------------------------------------------------------------------------------------------------- every network

ZOO = [
    n for n in catalog.names("networks") if n not in ("fused", "nnunet", "nnunet_trainer", "unet")
]  # others have tests of their own


def one_more(name: str) -> tuple[str, str]:
    """The middle one of all other cuts that are allowed."""
    net = built(name, 2, False)
    named = {tuple(cut_apart(net, (cut,)).__dict__[part].names[-1] for part in ("front", "body")) for cut in net.cuts}
    last = net.split_points[: -1 if net.names[-2] == net.split_points[-1] else None]  # not right before the head
    others = [pair for pair in itertools.combinations(last, 2) if pair not in named]
    return others[len(others) // 2]


def cuts_of(name: str) -> list[tuple[str, ...]]:
    return [("shallow",), ("deep",), one_more(name)]


EVERY = [*ZOO, "unet", "nnunet"]
EVERY_CUT = [
    pytest.param(name, cut, id=f"{name} {' '.join(cut)}", marks=() if cut == ("deep",) else pytest.mark.slow)
    for name in EVERY
    for cut in cuts_of(name)
]


Apart = Callable[[str, tuple[str, ...]], tuple[dict[str, Tensor], Engine]]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """Split training of a network of the zoo, once for each cut."""

    @cache
    def train(name: str, cut: tuple[str, ...]) -> tuple[dict[str, Tensor], Engine]:
        folder = tmp_path_factory.mktemp("apart")
        return trained_apart(job_of(name, 2, False), cut, folder, reveal_labels=False, steps={"a": LONG})

    return train


@pytest.mark.parametrize(("name", "cut"), EVERY_CUT)
def test_split_equals_whole_for_every_network(name: str, cut: tuple[str, ...], apart: Apart) -> None:
    weights, engine = apart(name, cut)
    assert difference(weights, whole(name, 2, False, steps=LONG)) <= EQUAL
    assert difference(weights, first_weights(job_of(name, 2, False))) > 1e-4, "nothing was trained"
    assert all(map(torch.isfinite, map(torch.sum, weights.values())))
    assert len(engine.up) == 2 * LONG + 1


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["shallow", "deep"])
@pytest.mark.parametrize("name", ["unet", "segnet", "attention_unet", "sunet"])
def test_split_equals_whole_in_3d(name: str, cut: str, tmp_path: Path) -> None:
    job = job_of(name, 3, False)
    weights, _ = trained_apart(job, (cut,), tmp_path, reveal_labels=False, steps={"a": LONG})
    assert difference(weights, whole(name, 3, False, steps=LONG)) <= EQUAL
    assert difference(weights, first_weights(job)) > 1e-4, "nothing was trained"


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_doubled_gradient_is_noticed_in_every_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(monkeypatch, "body", lambda gradients: [2 * g for g in gradients])
    weights, _ = trained_apart(job_of(name, 2, False), ("deep",), tmp_path)
    assert difference(weights, whole(name, 2, False)) > 1e-6


WITH_SKIPS = [
    n for n in EVERY if n not in ("deeplabv3", "sam", "segnet")
]  # two have none, the third's are whole numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SKIPS)
def test_a_skip_that_stays_at_home_without_its_gradient_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_what_stayed(monkeypatch)
    weights, _ = trained_apart(job_of(name, 2, False), ("deep",), tmp_path)
    assert difference(weights, whole(name, 2, False)) > 1e-6


NORMED = [n for n in ZOO if "norm" in catalog.options("networks", n) and n not in ("deeplabv3", "deeplabv3plus")]


@pytest.mark.parametrize("name", NORMED)
def test_running_statistics_are_those_of_the_whole_network(name: str, tmp_path: Path) -> None:
    weights, _ = trained_apart(job_of(f"{name} batch", 2, False), ("deep",), tmp_path)
    assert difference(weights, whole(f"{name} batch", 2, False)) <= EQUAL
    counts = [int(t) for n, t in weights.items() if n.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {STEPS}


@pytest.mark.parametrize(("name", "cut"), EVERY_CUT)
def test_what_travels_is_what_was_forecast(name: str, cut: tuple[str, ...], apart: Apart) -> None:
    """To the byte in every step, whole numbers among it: one byte each, and nothing back."""
    _, engine = apart(name, cut)
    torch.set_default_dtype(torch.float64)
    try:
        network = lambda deep_supervision: built(name, 2, deep_supervision)  # noqa: E731
        forecast = split_bytes(network, cut, batch=(1, CHANNELS, *PATCH[2]), precision="float32")
    finally:
        torch.set_default_dtype(torch.float32)
    returned = [request.gradients for _, request in engine.down if not isinstance(request, Tail)][1:]
    steps = zip(said(engine.up, Maps), said(engine.down, Tail), said(engine.up, Gradients), returned, strict=True)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    for maps, tail, grads, back in steps:
        assert forecast.step_up == size(maps.maps) + size(grads.gradients)
        assert forecast.step_down == size(tail.maps) + size(back)
        floats = [m for m in (*maps.maps, *tail.maps) if m.is_floating_point()]
        assert len(grads.gradients) + len(back) == len(floats)


SMALLER: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x.clone(),
    "means": lambda x: functional.avg_pool2d(x, 2),
    "maxima": lambda x: functional.max_pool2d(x, 4),
    "single": lambda x: x[..., ::2, ::2],
    "among others": lambda x: torch.cat(
        (functional.avg_pool2d(x, 2).tanh(), functional.avg_pool2d(x, 2)[:, :1]), dim=1
    ),
}


class Leak(Convolve):
    """Says nothing of the image that it leaves, made smaller."""

    def __init__(self, how: str) -> None:
        super().__init__(CHANNELS, CHANNELS)
        self.how = how

    def forward(self, *maps: Tensor) -> Stack:
        return (SMALLER[self.how](maps[0]) + 0 * self.convolution.bias.sum(),)


class Back(Convolve):
    """As large as the image, whatever came."""

    def forward(self, *maps: Tensor) -> Stack:
        (y,) = super().forward(maps[0][:, :CHANNELS])
        return (functional.interpolate(y, PATCH[2]),)


@pytest.mark.parametrize("how", SMALLER)
def test_a_site_sends_no_image_and_none_made_smaller(how: str, tmp_path: Path) -> None:
    stages = {"down0": Leak(how), "up1": Back(CHANNELS, 4), "up0": Convolve(4, 4), "head0": Convolve(4, LABELS)}
    job = replace(job_of("unet", 2, False), network=lambda deep_supervision=False: Stages(stages).double())
    with pytest.raises(EngineError, match=r"refused by its policy \(image\)"):
        trained_apart(job, ("down0", "up1"), tmp_path)


@pytest.mark.parametrize("kept", [(), (1,)], ids=["all of air", "one channel of air"])
def test_a_patch_of_air_shows_nothing(kept: tuple[int, ...], tmp_path: Path) -> None:
    """Dead features of a channel that is the same everywhere are no image; a channel that is not, is."""

    class Air(Noise):
        def draw(self, *key: Any) -> Batch:
            batch = super().draw(*key)
            there = torch.tensor([float(i in kept) for i in range(CHANNELS)])
            return batch._replace(image=batch.image * there[:, None, None])

    class Dead(Leak):
        def forward(self, *maps: Tensor) -> Stack:
            return (super().forward(maps[0])[0] * torch.tensor([1.0, 0.0])[:, None, None],)

    stages = {
        "down0": Dead("itself"),
        "up1": Convolve(CHANNELS, 4),
        "up0": Convolve(4, 4),
        "head0": Convolve(4, LABELS),
    }
    job = replace(
        job_of("unet", 2, False),
        network=lambda deep_supervision=False: Stages(stages).double(),
        batches=Air(2),  # type: ignore[arg-type]
    )
    trained_apart(job, ("down0", "up1"), tmp_path)
    stages["down0"] = Leak("itself")
    if kept:
        with pytest.raises(EngineError, match=r"refused by its policy \(image\)"):
            trained_apart(job, ("down0", "up1"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.int8], ids=str)
def test_places_of_another_type_are_refused_at_both_ends(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(maps: Iterable[Tensor]) -> tuple[Tensor, ...]:
        assert any(m.dtype == torch.uint8 for m in maps)
        return tuple(m.to(dtype) if m.dtype == torch.uint8 else m for m in maps)

    forward, front = Body.forward, split.Session.front
    job = job_of("segnet", 2, False)
    with monkeypatch.context() as patch:
        patch.setattr(
            Body, "forward", lambda body, *a: (lambda maps, order: (changed(maps), order))(*forward(body, *a))
        )
        with pytest.raises(EngineError, match="0 of 1 sites answered"):
            trained_apart(job, ("shallow",), tmp_path / "server")
    with monkeypatch.context() as patch:
        patch.setattr(split.Session, "front", lambda own, *a: Maps(changed(front(own, *a).maps)))
        with pytest.raises(EngineError, match="0 of 1 sites answered"):
            trained_apart(job, ("down2", "up0"), tmp_path / "site", reveal_labels=True)
