"""Split training whose maps and gradients travel shortened: it trains, both ends compute with what arrived, and both check it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from splitting import (
    CHANNELS,
    PATCH,
    TRAINING,
    built,
    difference,
    first_weights,
    job_of,
    said,
    trained_apart,
    trained_whole,
)
from torch import Tensor

from concilium.answers import split
from concilium.errors import ContractError, EngineError
from concilium.forecast import split_bytes
from concilium.messages import Front, Gradients, Maps, Tail, Tensors
from concilium.networks import Stages, cut_apart
from concilium.protocols._body import Body
from concilium.transport import KINDS, decode, encode

LOSSY = tuple(kind for kind in KINDS if kind != "float32")
EXACT = 1e-9
each_lossy = pytest.mark.parametrize("kind", LOSSY)
OFF = {"float16": 0.002, "bfloat16": 0.06, "int8": 0.25}
"""How far from the whole network's step, of its length."""
SENT: dict[str, set[torch.dtype]] = {
    "float32": {torch.float64},
    "float16": {torch.float16, torch.int16},
    "bfloat16": {torch.bfloat16},
    "int8": {torch.int8, torch.float32},
}
"""Types that cross both cuts of a network in float64."""


def crossed(engine: Any) -> list[Tensor]:
    """All maps and gradients, in both directions."""
    sent = [m for reply in said(engine.up, Maps) for m in reply.maps]
    sent += [g for reply in said(engine.up, Gradients) for g in reply.gradients]
    sent += [m for request in said(engine.down, Tail) for m in request.maps]
    return sent + [g for _, request in engine.down if not isinstance(request, Tail) for g in request.gradients]


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_was_agreed_on_crosses_the_cuts(kind: str, tmp_path: Path) -> None:
    _, engine = trained_apart(job_of(), ("deep",), tmp_path, steps={"a": 2}, transport=kind)
    assert {t.dtype for t in crossed(engine)} == SENT[kind]
    assert {r.transport for r in said(engine.down, Front)} == {kind}


@pytest.mark.parametrize(("name", "cut"), [("nnunet", "deep"), ("nnunet", "shallow"), ("cgnet", "deep")])
@each_lossy
def test_a_step_is_nearly_that_of_the_whole_network(name: str, cut: str, kind: str, tmp_path: Path) -> None:
    """Of networks without pooling: where rounding changes which of four voxels is the largest, the gradient goes elsewhere."""
    job = job_of(name, 2, False)
    weights, _ = trained_apart(job, (cut,), tmp_path, transport=kind, reveal_labels=False, steps={"a": 1})
    there, start = trained_whole(job, steps=1), first_weights(job)
    assert all(torch.isfinite(t).all() for t in weights.values())
    off, way = apart(weights, there), apart(start, there)
    assert 0 < off <= OFF[kind] * way


@each_lossy
def test_a_network_that_sends_places_trains(kind: str, tmp_path: Path) -> None:
    """How near is not asked: the place of a maximum changes with a bit."""
    job = job_of("segnet", 2, False)
    weights, _ = trained_apart(job, ("shallow",), tmp_path, transport=kind, reveal_labels=False)
    assert all(torch.isfinite(t).all() for t in weights.values())
    assert apart(weights, first_weights(job)) > 0.01


def apart(a: Tensors, b: Tensors) -> float:
    """Euclidean distance of all weights."""
    return math.sqrt(sum(float((a[n].double() - b[n].double()).square().sum()) for n in a))


@each_lossy
def test_both_ends_compute_with_what_arrived(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding by hand in a session that sends all bits gives the same weights: the gradient is straight-through."""
    shortened, _ = trained_apart(job_of(), ("deep",), tmp_path / "a", transport=kind)

    def rounded(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return decode(encode(tensors, kind), kind, dtype=torch.float64)

    forward, backward, front, tail = Body.forward, Body.backward, split.Session.front, split.Session.tail
    monkeypatch.setattr(Body, "forward", lambda b, *a: (lambda maps, order: (rounded(maps), order))(*forward(b, *a)))
    monkeypatch.setattr(Body, "backward", lambda b, g, **about: rounded(backward(b, g, **about)))
    monkeypatch.setattr(split.Session, "front", lambda s, *a: Maps(rounded(front(s, *a).maps)))
    monkeypatch.setattr(split.Session, "tail", lambda s, r: Gradients(rounded(tail(s, r).gradients)))
    by_hand, _ = trained_apart(job_of(), ("deep",), tmp_path / "b")
    assert difference(shortened, by_hand) <= EXACT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["unet", "segnet", "deeplabv3"])
def test_what_travels_is_what_was_forecast(name: str, kind: str, tmp_path: Path) -> None:
    """To the byte: places as they are, scales and exponents among it."""
    _, engine = trained_apart(job_of(name, 2, False), ("shallow",), tmp_path, steps={"a": 1}, transport=kind)
    torch.set_default_dtype(torch.float64)
    try:
        network = lambda deep_supervision: built(name, 2, deep_supervision)  # noqa: E731
        batch = (1, CHANNELS, *PATCH[2])
        forecast = split_bytes(network, ("shallow",), batch=batch, precision="float32", transport=kind)
    finally:
        torch.set_default_dtype(torch.float32)
    assert forecast.step_up + forecast.step_down == sum(t.numel() * t.element_size() for t in crossed(engine))


def changed(who: str, patch: pytest.MonkeyPatch, change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> None:
    forward, backward, front, tail = Body.forward, Body.backward, split.Session.front, split.Session.tail
    match who:
        case "front":
            patch.setattr(split.Session, "front", lambda s, *a: Maps(change(front(s, *a).maps)))
        case "tail":
            patch.setattr(split.Session, "tail", lambda s, r: Gradients(change(tail(s, r).gradients)))
        case "forward":
            patch.setattr(Body, "forward", lambda b, *a: (lambda m, order: (change(m), order))(*forward(b, *a)))
        case "backward":
            patch.setattr(Body, "backward", lambda b, g, **about: change(backward(b, g, **about)))


@pytest.mark.parametrize("who", ["front", "forward", "tail", "backward"])
@pytest.mark.parametrize(("kind", "sent"), [(k, s) for k in KINDS for s in KINDS if k != s and "float32" in (k, s)])
def test_another_kind_is_refused_at_both_ends(
    kind: str, sent: str, who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the site sends the server refuses, and the other way round."""

    def otherwise(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return encode([torch.zeros(t.shape) for t in tensors if t.ndim > 1], sent)

    changed(who, monkeypatch, otherwise)
    with pytest.raises(EngineError, match="0 of 1 sites answered"):
        trained_apart(job_of(), ("deep",), tmp_path, steps={"a": 1}, transport=kind)


@pytest.mark.parametrize("part", ["front", "body"])
@each_lossy
def test_maps_that_cannot_travel_fail_their_site_as_not_finite(
    kind: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = getattr(cut_apart(job_of().network(), ("deep",), reveal_labels=True), part).names
    run = Stages.run

    def not_finite(self: Stages, maps: Any) -> Any:
        return tuple(m * float("nan") if self.names == names else m for m in run(self, maps))

    monkeypatch.setattr(Stages, "run", not_finite)
    with pytest.raises(EngineError, match="not_finite"):
        trained_apart(job_of(), ("deep",), tmp_path, steps={"a": 1}, transport=kind)


def test_a_kind_that_is_not_known_fails_the_site(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="0 of 1 sites answered"):
        trained_apart(job_of(), ("deep",), tmp_path, steps={"a": 1}, transport="int4")


def test_a_body_alone_refuses_another_kind() -> None:
    job = job_of("unet", 2, False)
    body = Body(cut_apart(job.network(), ("shallow",)), TRAINING, torch.device("cpu"), "int8")
    with pytest.raises(ContractError, match="transport = 'int8'"):
        body.forward([torch.zeros(1, 4, 16, 16, dtype=torch.float64)], (1,))
