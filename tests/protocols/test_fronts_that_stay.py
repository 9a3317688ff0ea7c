"""Vertical training whose fronts stay at their sites: the whole network's training all the same, from fronts that nobody sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from splitting import CPU, EQUAL, Engine, difference, first_weights, running
from test_vertical import held_by, jobs_of, trained_together
from torch import Tensor

from concilium import wire
from concilium.answers import Cut, Job, Policy
from concilium.answers.train import Learner
from concilium.data.draws import WORDS, Secret, drawn_from
from concilium.errors import EngineError
from concilium.messages import Fetch, Finish, Front, SiteError, SiteRefused, Train, Trained
from concilium.networks._fusion import without_fronts
from concilium.protocols.vertical import vertical
from concilium.wire import Envelope, part


def of_fronts(weights: Mapping[str, Tensor], site: str = "") -> dict[str, Tensor]:
    return {n: t for n, t in weights.items() if n.startswith(f"fronts.{site}.".replace("..", "."))}


def staying(jobs: Mapping[str, Job], secrets: Mapping[str, str] | None = None) -> dict[str, Job]:
    """The jobs as sites prepare them that keep their fronts, each with a secret."""
    kept = frozenset(of_fronts(next(iter(jobs.values())).network().state_dict()))
    given = secrets or {name: f"of {name}" for name in jobs}
    return {n: replace(job, kept=kept, has_all=False, secret=given[n], site=n) for n, job in jobs.items()}


def drawn_by(jobs: Mapping[str, Job]) -> dict[str, Tensor]:
    """What each party's front begins with."""
    fronts: dict[str, Tensor] = {}
    for name, job in jobs.items():
        fronts |= of_fronts(Learner(job, CPU, Cut(("fronts",), False, name)).network.state_dict(), name)
    return fronts


def trained(jobs: Mapping[str, Job], engine: Engine, **changes: Any) -> dict[str, Tensor]:
    """What server and sites have of the network in the end, put together."""
    start = without_fronts(first_weights(next(iter(jobs.values()))))
    *_, last = running(vertical, engine, jobs, start=start, fronts="stay", **changes)
    at_server = part(last.tensors, "weights/")
    assert not of_fronts(at_server)
    fronts: dict[str, Tensor] = {}
    for name, site in engine.members.items():
        fronts |= of_fronts(site._models.in_training("m"))
        assert of_fronts(site._models.in_training("m")).keys() == of_fronts(drawn_by(jobs), name).keys()
    return at_server | fronts


@pytest.mark.parametrize(
    ("n", "labels", "body", "changes"),
    [
        (2, "b", "server", {}),
        (3, "c", "server", {"drop": 0.5}),
        (2, "reader", "server", {}),
        (2, "a", "labels", {}),
        (2, "b", "server", {"rounds": 2, "steps": 10}),
    ],
)
def test_it_is_the_training_of_the_whole_network_from_these_fronts(
    n: int, labels: str, body: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    jobs = jobs_of(held_by(n), labels=labels, tail="labels" if body == "labels" else "own")
    kept = staying(jobs)
    begun = first_weights(jobs["a"]) | drawn_by(kept)
    steps = {"steps": dict.fromkeys(jobs, changes["steps"])} if "steps" in changes else {}
    made = trained(kept, Engine(kept, tmp_path / "apart"), labels=labels, body=body, **{**changes, **steps})
    if "drop" in changes:  # who is left out is told as in a run whose fronts are sent
        engine = Engine(jobs, tmp_path / "sent")
        *_, last = running(vertical, engine, jobs, start=begun, labels=labels, body=body, **changes)
        expected: Mapping[str, Tensor] = part(last.tensors, "weights/")
    else:
        expected = trained_together(jobs, start=begun, **changes)
    assert difference(made, expected) <= EQUAL
    assert all(float((made[name] - t).abs().max()) > 0 for name, t in drawn_by(kept).items() if "weight" in name)


def test_no_message_has_a_front_and_every_secret_makes_another(tmp_path: Path) -> None:
    jobs = jobs_of(held_by(2), labels="b")
    kept = staying(jobs)
    engine = Engine(kept, tmp_path)
    trained(kept, engine, labels="b")
    for _, message in (*engine.up, *engine.down):
        assert not of_fronts(getattr(message, "weights", {})), message
    assert [
        len(reply.weights) > 0 for name, reply in sorted(engine.up, key=lambda u: u[0]) if isinstance(reply, Trained)
    ] == [
        False,
        True,
    ]
    one, same = drawn_by(kept), drawn_by(staying(jobs))
    other = drawn_by(staying(jobs, {"a": "another", "b": "of b"}))
    known = of_fronts(first_weights(jobs["a"]))
    convolutions = [n for n in one if n.endswith("weight") and one[n].ndim > 1]
    assert len(convolutions) > 1
    for name in convolutions:
        assert torch.equal(one[name], same[name])
        assert torch.equal(one[name], other[name]) == name.startswith("fronts.b.")
        twin = name.replace("fronts.a.", "fronts.b.")
        assert twin == name or not torch.equal(one[name], one[twin])
        assert not torch.equal(one[name], known[name])


def test_without_a_secret_a_front_begins_as_one_that_is_sent(tmp_path: Path) -> None:
    """In a simulation, where one owner has all, the same study gives the same bits, whether fronts are sent or not."""
    jobs = jobs_of(held_by(2), labels="b")
    kept = staying(jobs, dict.fromkeys(jobs, ""))
    with drawn_from(jobs["a"].seed, "weights"):
        begun = jobs["a"].network().state_dict()
    assert all(torch.equal(t, begun[n]) for n, t in drawn_by(kept).items())


def test_a_site_that_sends_its_front_all_the_same_ends_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = staying(jobs_of(held_by(2), labels="b"))
    engine = Engine(kept, tmp_path)
    site = engine.members["a"]
    answer = site.answer

    def sends(request: Any, cancelled: Any) -> Any:
        reply = answer(request, cancelled)
        return replace(reply, weights=site._models.in_training("m")) if isinstance(reply, Trained) else reply

    monkeypatch.setattr(site, "answer", sends)
    with pytest.raises(EngineError, match=r"1 of 2 parties failed \(a: .*wrong_weights"):
        trained(kept, engine, labels="b")


FRONT = Front("m", 2, ("fronts",), False, 0, 1, 4, 8, {}, (), transport="float32", party=True)


@pytest.mark.parametrize(
    ("changes", "request_", "said"),
    [
        ({"kept": frozenset()}, FRONT, SiteError),
        ({"kept": "one"}, FRONT, SiteError),
        ({"kept": "one"}, replace(FRONT, model="new", round=1, begins=True), SiteError),
        ({"has_all": True}, Fetch("m"), SiteRefused),
        ({"has_all": True, "kept": frozenset()}, Train("m", 2, 4, 1, 8, {}, True), SiteRefused),
    ],
)
def test_a_front_that_stayed_cannot_be_had_by_preparing_a_site_otherwise(
    changes: dict[str, Any], request_: Any, said: type, tmp_path: Path
) -> None:
    """The server says what stays when it has sites prepare; what it says later is not of a model that trained before."""
    kept = staying(jobs_of(held_by(2), labels="b"))
    engine = Engine(kept, tmp_path)
    trained(kept, engine, labels="b")
    site = engine.members["a"]
    if changes.get("kept") == "one":
        changes = {"kept": frozenset(sorted(kept["a"].kept)[:1])}
    site._models.park()
    site._job = replace(kept["a"], **changes)
    number = len(engine.up)
    packed = site.handle(wire.pack(request_), Envelope("r", 0, number), lambda: False)
    assert isinstance(wire.unpack(packed), said)
    if isinstance(request_, Front):
        finish = site.handle(wire.pack(Finish(request_.model, request_.round, ())), Envelope("r", 0, number + 1), bool)
        assert isinstance(wire.unpack(finish), SiteError)


def test_a_front_of_which_anything_leaves_is_not_drawn_from_the_secret() -> None:
    """Else a server that asks for all but one tensor of another model would know what those of this one begin with."""
    kept = staying(jobs_of(held_by(2), labels="b"))
    known = drawn_by(staying(jobs_of(held_by(2), labels="b"), dict.fromkeys(kept, "")))
    some = {n: replace(job, kept=frozenset(sorted(job.kept)[1:])) for n, job in kept.items()}
    assert all(torch.equal(t, known[n]) for n, t in drawn_by(some).items())


def test_a_site_that_lets_no_weights_leave_takes_part_where_its_front_stays(tmp_path: Path) -> None:
    """What stays is what the server asks for when it has sites prepare; its own settings hold whatever that says."""
    jobs = jobs_of(held_by(2), labels="b")
    kept = staying(jobs)
    partly = replace(kept["a"], kept=frozenset(sorted(kept["a"].kept)[:1]))
    for job, fine in ((kept["a"], True), (partly, False), (replace(kept["a"], kept=frozenset()), False)):
        engine = Engine(kept | {"a": job}, tmp_path / str(len(job.kept)))
        site = engine.members["a"]
        site.settings = replace(site.settings, policy=Policy(open_weights=False))
        if fine:
            trained(kept, engine, labels="b")
            continue
        with pytest.raises(EngineError):
            trained(kept, engine, labels="b")
        refused = [reply for name, reply in engine.up if name == "a" and isinstance(reply, SiteRefused)]
        assert [reply.rule for reply in refused] == ["open_weights"]
        assert not any(isinstance(reply, Trained) for name, reply in engine.up if name == "a")


def test_a_front_cannot_be_fetched_whatever_the_settings_allow(tmp_path: Path) -> None:
    kept = staying(jobs_of(held_by(2), labels="b"))
    engine = Engine(kept, tmp_path)
    trained(kept, engine, labels="b")
    site = engine.members["a"]
    assert site.settings.policy.kept
    packed = site.handle(wire.pack(Fetch("m")), Envelope("r", 0, len(engine.up)), lambda: False)
    assert wire.unpack(packed) == SiteRefused("kept")
    assert not any(t.numpy().tobytes() in packed for t in site._models.in_training("m").values() if t.numel() > 4)


def test_a_site_whose_folder_is_lost_does_not_begin_anew(tmp_path: Path) -> None:
    jobs = jobs_of(held_by(2), labels="b")
    kept = staying(jobs)
    rounds = running(
        vertical, engine := Engine(kept, tmp_path), kept,
        start=without_fronts(first_weights(jobs["a"])), labels="b", fronts="stay", rounds=2,
    )  # fmt: skip
    next(rounds)
    engine.members["a"]._models.forget("m", finished=True)
    with pytest.raises(EngineError, match="round 2: 1 of 2 parties failed"):
        next(rounds)
    assert [request.begins for name, request in engine.down if isinstance(request, Front) and request.weights] == [
        True,
        False,
    ]


def test_a_secret_seeds_all_of_the_generator() -> None:
    """Against numpy's MT19937 with the same state; and no seed of 32 bits, of which torch uses no more, draws the same."""
    with drawn_from("weights", Secret("s")):
        state = torch.get_rng_state()
        mine = torch.rand(700)  # more than a state has numbers
    words = state.numpy()[24 : 24 + 8 * WORDS].view("<u8").astype(np.uint32)
    theirs = np.random.RandomState()
    theirs.set_state(("MT19937", words, WORDS))
    expected = (theirs.randint(0, 2**32, 700, dtype=np.uint32) & 0xFFFFFF).astype(np.float32) / 2**24
    assert np.array_equal(mine.numpy(), expected)
    for other in ((), ("s",), (Secret("t"),)):
        with drawn_from("weights", *other):
            assert not torch.equal(mine, torch.rand(700))
    torch.manual_seed(5)
    low = torch.rand(4)
    torch.manual_seed(5 + (7 << 32))
    assert torch.equal(low, torch.rand(4)), "torch has come to use all of a seed: then `drawn_from` needs no state"
