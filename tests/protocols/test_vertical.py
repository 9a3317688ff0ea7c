"""Vertical training is training of the whole network: real parties behind packed messages, and the same arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from splitting import (
    CPU,
    EQUAL,
    LABELS,
    STEPS,
    Engine,
    Noise,
    difference,
    first_weights,
    job_of,
    plan_of,
    running,
    said,
    trained_whole,
)
from torch import Tensor

from concilium.answers import Job
from concilium.answers import vertical as party
from concilium.answers.train import Learner
from concilium.answers.vertical import DRAWN, set_absent
from concilium.data.patches import Batch
from concilium.defences import guarded
from concilium.errors import EngineError, StudyError
from concilium.messages import Finish, Front, Gradients, Guard, PlugIn, Tail, Train
from concilium.networks import Stages
from concilium.networks.fused import build
from concilium.protocols.vertical import vertical
from concilium.wire import part

CHANNELS = 4
NAMES = ("a", "b", "c", "d")


class Channels(Noise):
    """Batches of noise with four channels, of which a party has some."""

    def __init__(self, places: Sequence[int]) -> None:
        super().__init__(2)
        self.places = list(places)

    def draw(self, *key: str | int) -> Batch:
        torch.manual_seed(len(key))
        batches = [super(Channels, self).draw(*key, channel) for channel in range(CHANNELS // 2)]
        image = torch.cat([b.image for b in batches], dim=1)
        return Batch(image[:, self.places], batches[0].labels)


def fused(places: Mapping[str, tuple[int, ...]], deep_supervision: bool, **options: Any) -> Stages:
    given = {"of": "unet", "options": {"base_features": 4, "levels": 3}, **options}
    made = build(
        n_channels=CHANNELS,
        n_labels=LABELS,
        plan=plan_of(2),
        deep_supervision=deep_supervision,
        parties=places,
        **given,
    )
    return made.double()


def held_by(n: int) -> dict[str, tuple[int, ...]]:
    """Four channels at so many parties."""
    return {name: tuple(range(CHANNELS))[i::n] for i, name in enumerate(NAMES[:n])}


def jobs_of(
    places: Mapping[str, tuple[int, ...]], *, labels: str, deep_supervision: bool = False, **options: Any
) -> dict[str, Job]:
    """A job for each party; the one with the labels may have no channel."""
    network = partial(fused, places, **options)
    build_it = lambda deep_supervision=deep_supervision: network(deep_supervision)  # noqa: E731
    base = job_of(deep_supervision=deep_supervision)
    made = {}
    for name in dict.fromkeys([*places, labels]):
        batches: Any = Channels(places.get(name, (0,)))
        made[name] = replace(base, network=build_it, batches=batches, labelled=name == labels)
    return made


def trained_apart(jobs: Mapping[str, Job], folder: Path, **changes: Any) -> tuple[dict[str, Tensor], Engine]:
    engine = Engine(jobs, folder)
    *_, last = running(vertical, engine, jobs, **changes)
    return part(last.tensors, "weights/"), engine


def trained_together(jobs: Mapping[str, Job], **how: Any) -> Mapping[str, Tensor]:
    """The whole network's training at one site that has all channels, on the same batches."""
    job = next(iter(jobs.values()))
    everything: Any = Channels(range(CHANNELS))
    return trained_whole(replace(job, batches=everything, labelled=True), site=DRAWN, **how)


@pytest.mark.parametrize("fuse", ["concat", "mean", "max"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_vertical_equals_whole(n: int, fuse: str, tmp_path: Path) -> None:
    jobs = jobs_of(held_by(n), labels="b", fuse=fuse)
    weights, engine = trained_apart(jobs, tmp_path, labels="b")
    assert difference(weights, trained_together(jobs)) <= EQUAL
    first = first_weights(jobs["a"])
    for name in jobs:
        assert max(float((weights[k] - first[k]).abs().max()) for k in first if k.startswith(f"fronts.{name}.")) > 1e-4
    assert len(engine.up) == STEPS * (n + 1) + n


@pytest.mark.parametrize(
    ("of", "cut", "body", "deep"),
    [
        ("nnunet", "deep", "labels", True),
        ("nnunet", ("down2", "up1"), "server", False),
        ("attention_unet", "shallow", "server", False),
        ("deeplabv3plus", "deep", "labels", False),
        ("cgnet", "deep", "server", False),
    ],
)
def test_any_network_and_cut_with_the_body_at_either(of: str, cut: Any, body: str, deep: bool, tmp_path: Path) -> None:
    small = {"base_features": 4, "blocks": (2, 4)} if of == "cgnet" else {"base_features": 4}
    options = {"of": of, "options": {} if of == "nnunet" else small, "cut": cut}
    jobs = jobs_of(
        held_by(2), labels="a", deep_supervision=deep, tail="labels" if body == "labels" else "own", **options
    )
    weights, _ = trained_apart(jobs, tmp_path, labels="a", body=body, cut=cut)
    assert difference(weights, trained_together(jobs)) <= EQUAL


def test_a_site_with_labels_only_takes_part(tmp_path: Path) -> None:
    jobs = jobs_of(held_by(2), labels="reader")
    weights, engine = trained_apart(jobs, tmp_path, labels="reader")
    assert difference(weights, trained_together(jobs)) <= EQUAL
    assert not any(reply.maps for name, reply in engine.up if name == "reader" and hasattr(reply, "maps"))


def test_optimisers_are_carried_over_rounds(tmp_path: Path) -> None:
    jobs = jobs_of(held_by(2), labels="a")
    weights, _ = trained_apart(jobs, tmp_path, labels="a", rounds=2, steps=dict.fromkeys(jobs, 10))
    assert difference(weights, trained_together(jobs, rounds=2, steps=10)) <= EQUAL


def test_each_gradient_goes_to_its_owner_and_labels_to_nobody(tmp_path: Path) -> None:
    jobs = jobs_of(held_by(3), labels="c")
    _, engine = trained_apart(jobs, tmp_path, labels="c", steps=dict.fromkeys(jobs, 2))
    finish = {name: request for name, request in engine.down if isinstance(request, Finish)}
    assert {name: len(request.gradients) for name, request in finish.items()} == {"a": 2, "b": 2, "c": 2}
    assert not torch.equal(finish["a"].gradients[0], finish["b"].gradients[0])
    assert {name for name, request in engine.down if isinstance(request, Tail)} == {"c"}
    assert {name for name, reply in engine.up if isinstance(reply, Gradients)} == {"c"}
    for name, request in engine.down:
        if isinstance(request, Front) and request.weights:
            others = [n for n in request.weights if n.startswith("fronts.") and not n.startswith(f"fronts.{name}.")]
            assert not others, "a party got another's front"
            tail = [n for n in request.weights if not n.startswith("fronts.")]
            assert bool(tail) == (name == "c")


@pytest.mark.parametrize("owner", ["a", "b"])
def test_a_dropped_gradient_is_noticed(owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(held_by(2), labels="b")
    finish = party.Party._finish_step
    monkeypatch.setattr(
        party.Party,
        "_finish_step",
        lambda self, g: finish(self, tuple(x * (i or self.site != owner) for i, x in enumerate(g))),
    )
    weights, _ = trained_apart(jobs, tmp_path, labels="b")
    assert difference(weights, trained_together(jobs)) > 1e-5


@pytest.mark.parametrize(("fuse", "body"), [("concat", "server"), ("mean", "server"), ("concat", "labels")])
def test_parties_that_are_left_out_of_steps_change_nothing_in_them(fuse: str, body: str, tmp_path: Path) -> None:
    """Against the whole network, told by hand who is absent in each step."""
    jobs = jobs_of(held_by(3), labels="c", fuse=fuse, tail="labels" if body == "labels" else "own")
    weights, engine = trained_apart(jobs, tmp_path, labels="c", drop=0.5, body=body)
    sent = said(engine.up, party.Maps)
    assert any(not m.maps for m in sent), "nobody was ever absent"
    absent: list[set[str]] = [set(jobs) for _ in range(STEPS)]
    for name, request in engine.down:
        if isinstance(request, Front) and not request.absent:
            absent[request.step].discard(name)
    assert {len(a) for a in absent} >= {1, 2}
    everything: Any = Channels(range(CHANNELS))
    job = replace(jobs["a"], batches=everything, labelled=True)
    learner = Learner(job, CPU)
    steps = iter(absent)
    learner.network.register_forward_pre_hook(lambda network, _: set_absent(network, tuple(next(steps))))  # type: ignore[arg-type]
    made = learner.train(
        Train("m", 1, 0, STEPS, STEPS, first_weights(job), True), site=DRAWN, cancelled=lambda: False
    ).weights
    assert difference(weights, made) <= EQUAL


def _double(network: Any, **how: Any) -> Stages:
    made: Stages = network(**how).double()
    return made


@pytest.mark.parametrize("body", ["server", "labels"])
def test_defences_are_the_fronts_and_what_undoes_them_the_receivers(body: str, tmp_path: Path) -> None:
    """A projection has weights at both ends; the whole network has them too."""
    options = {"tail": "labels" if body == "labels" else "own"}
    guard = Guard((PlugIn("project", {"channels": 2}),), ("deep",))
    jobs = {}
    for name, job in jobs_of(held_by(2), labels="a", **options).items():
        made = guarded(job.network, guard, image=(1, CHANNELS, 16, 16))
        jobs[name] = replace(job, network=partial(_double, made), guard=guard)
    weights, engine = trained_apart(jobs, tmp_path, labels="a", body=body)
    assert difference(weights, trained_together(jobs)) <= EQUAL
    assert {m.shape[1] for reply in said(engine.up, party.Maps) for m in reply.maps} == {2}
    assert any(name.startswith("fronts.b.defence0.") for name in weights)
    assert any(name.startswith("restore.b.") for name in weights)


def test_a_party_that_fails_ends_the_round_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(held_by(2), labels="b")
    front = party.Party.front

    def fail(self: Any, request: Front, cancelled: Any) -> Any:
        if self.site == "a" and request.step == 3:
            raise FloatingPointError("no")
        return front(self, request, cancelled)

    monkeypatch.setattr(party.Party, "front", fail)
    with pytest.raises(EngineError, match="round 1: 1 of 2 parties failed \\(a: "):
        trained_apart(jobs, tmp_path, labels="b")


def test_pooling_places_cannot_be_fused() -> None:
    with pytest.raises(StudyError, match="whole numbers"):
        fused(held_by(2), False, of="segnet", options={"base_features": 4}, cut="deep")


def test_a_network_that_is_mostly_frozen_cannot_be_fused() -> None:
    small = {"width": 32, "depth": 3, "heads": 2, "patch": 4, "image_size": 16, "window": 2, "decoder_features": 32}
    options = small | {"whole_image_blocks": (1,), "adapt": "adapters"}
    with pytest.raises(StudyError, match=r"only adapters, .* train was to have a front for each party"):
        fused(held_by(2), False, of="sam", options=options, cut="deep")


@pytest.mark.parametrize("transport", ["float16", "int8"])
def test_maps_travel_shortened(transport: str, tmp_path: Path) -> None:
    jobs = jobs_of(held_by(2), labels="b")
    exact, whole = trained_apart(jobs, tmp_path / "exact", labels="b")
    weights, engine = trained_apart(jobs, tmp_path / "short", labels="b", transport=transport)
    assert 0 < difference(weights, exact) < 0.1
    ratio = engine.traffic["a"].up / whole.traffic["a"].up
    assert ratio < 0.6
