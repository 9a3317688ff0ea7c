"""What every protocol keeps to (see `concilium.protocols`), with sites that train by arithmetic."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concilium import catalog, wire
from concilium.aggregation import Block, weight_of
from concilium.aggregation.mean import rule as mean
from concilium.collect.plain import collect as plain
from concilium.engines import SiteInfo, Traffic
from concilium.errors import EngineError, PrivacyError
from concilium.messages import (
    Card,
    Done,
    Failure,
    Finish,
    Front,
    Gradients,
    Hand,
    Handed,
    Introduce,
    Introduced,
    Maps,
    Pass,
    Passed,
    PlugIn,
    Reply,
    Request,
    SiteError,
    SiteLost,
    SiteTimeout,
    Tail,
    Tensors,
    Train,
    Trained,
    Training,
)  # fmt: skip
from concilium.networks import Stage, Stages
from concilium.networks._fusion import Fronts, Fuse
from concilium.protocols import WEIGHTS, Round, require, start_with
from concilium.sealing import NOTHING, as_bytes, as_tensor
from concilium.sharing import Sharing
from concilium.wire import part

# ------------------------------------------------------------------------------------------- an engine without a network


class ToySite:
    """Trains by arithmetic: each step halves the distance of every weight to the site's `target`.

    In split training it sends maps of its target, and their double as gradients.
    """

    def __init__(self, target: float, n_cases: int) -> None:
        self.target, self.n_cases = target, n_cases
        self.weights: dict[str, Tensor] = {}
        self.steps = 0
        self.name = ""

    def sealed(self, to: Card | None) -> Tensor:
        """Not sealed at all: `tests/test_sealing.py` sees to that."""
        return as_tensor(wire.pack(Handed(NOTHING, self.weights)) if to else b"")

    def answer(self, request: Request) -> Reply | Failure:
        match request:
            case Introduce():
                return Introduced(Card(self.name, *(torch.tensor([i], dtype=torch.uint8) for i in range(3))))
            case Pass():
                sent = wire.unpack(as_bytes(request.sealed)).weights if request.sender else request.train.weights
                trained = self.answer(replace(request.train, weights=sent, send_weights=False))
                return Passed(trained, self.sealed(request.to)) if isinstance(trained, Trained) else trained
            case Hand():
                return Handed(self.sealed(request.to), {} if request.to else self.weights)
            case Train() | Front():
                if request.weights:
                    self.weights = dict(request.weights)
                if not self.weights:
                    return SiteError("ContractError", "contract", "r1")
                self.steps = request.steps
                if isinstance(request, Front):
                    return Maps((torch.full((2, 1, 3), self.target + request.step),))
            case Tail():
                return Gradients(tuple(2 * m for m in request.maps))
            case _:
                assert isinstance(request, Finish)
        for _ in range(self.steps):
            self.weights = {n: (t + self.target) / 2 for n, t in self.weights.items()}
        sent = self.weights if isinstance(request, Finish) or request.send_weights else {}
        return Trained(sent, self.n_cases, self.steps, self.target / request.round, 0.25)


class ToyEngine:
    """Delivers in memory what was packed and unpacked; the order of replies is drawn. `failing` says who fails when, and how."""

    def __init__(self, sites: Mapping[str, ToySite], failing: Mapping[tuple[Any, ...], Any] | None = None) -> None:
        self.members = dict(sites)
        for name, member in sites.items():
            member.name = name
        self.sites = {n: SiteInfo(n, n if n in ("pooled", "test") else "site") for n in sites}
        self.traffic = {n: Traffic() for n in sites}
        self.failing = dict(failing or {})
        self.outstanding: dict[str, bytes] = {}
        self.sent: list[tuple[str, Any]] = []
        self.bytes: list[tuple[int, str, int, int]] = []
        """Round, site, and how many to it and from it."""
        self.deadlines: list[float | None] = []
        self.packed_at_once: list[int] = []
        self.random = random.Random(0)

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        assert not self.outstanding.keys() & requests.keys(), "one request outstanding per site"
        self.packed_at_once.append(len({id(r) for r in requests.values()}))
        self.deadlines.append(deadline_s)
        for name, request in requests.items():
            self.outstanding[name] = wire.pack(request)
            self.traffic[name].down += len(self.outstanding[name])

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        while self.outstanding:
            name = self.random.choice(sorted(self.outstanding))
            packed = self.outstanding.pop(name)
            request = wire.unpack(packed)
            self.sent.append((name, request))
            failing = self.failing.get((name, request.round)) or self.failing.get((name, request.round, type(request)))
            reply = failing or self.members[name].answer(request)
            back = wire.pack(reply)
            lost = isinstance(reply, SiteLost | SiteTimeout)  # these are the engine's own words
            self.traffic[name].up += 0 if lost else len(back)
            self.bytes.append((request.round, name, len(packed), 0 if lost else len(back)))
            yield name, wire.unpack(back)

    def cancel(self, sites: Iterable[str]) -> None:
        raise AssertionError("nobody cancels here")

    def close(self) -> None:
        self.outstanding.clear()

    def requests(self, site: str) -> list[Any]:
        return [request for name, request in self.sent if name == site]


class Scale(Stage):
    """Multiplies the map by its only weight."""

    takes = leaves = 1

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return (maps[0] * self.factor,)


PARTS = ("down0", "down1", "up0", "head0")


def scales(*, deep_supervision: bool = True) -> Stages:
    """A network to cut: `down1` is the server's. It has one head in any case."""
    return Stages({name: Scale() for name in PARTS})


def parties(*, deep_supervision: bool = True) -> Stages:
    """A network of two parties, of which `down1` is the server's, and what follows the south's."""
    fronts = {name: Stages({"down0": Scale()}) for name in ("north", "south")}
    own: dict[str, Stage] = {"fronts": Fronts(fronts, {"north": (0,), "south": (1,)})}
    own["fuse"] = Fuse(tuple(fronts), (1,), 2, "mean")
    return Stages(own | {name: Scale() for name in PARTS[1:]}, {"shallow": (("fronts", "down1"),)})


START = start_with({"conv": torch.tensor([[0.0, 8.0]]), "norm": torch.tensor([16.0])})
SPLIT_START = start_with({f"{name}.factor": torch.tensor(0.5) for name in PARTS})
PARTY_START = start_with({name: torch.tensor(0.5) for name in parties().state_dict()})
STARTS = {"splitfed": SPLIT_START, "vertical": PARTY_START}
TRAINING = Training(
    "sgd", 0.01, 0.0, 0.9, "float32", 0.33, True, "none", 1e9, True, 0, PlugIn("dice_ce"), PlugIn("plain")
)  # fmt: skip


def start_of(name: str) -> Round:
    return STARTS.get(name, START)


def north_and_south(failing: Mapping[tuple[Any, ...], Any] | None = None, **more: ToySite) -> ToyEngine:
    return ToyEngine({"north": ToySite(2.0, 1), "south": ToySite(10.0, 3), **more}, failing)


def pool() -> ToyEngine:
    return north_and_south(pooled=ToySite(5.0, 4))


def running(name: str, engine: ToyEngine, start: Round | None = None, **changes: Any) -> Iterator[Round]:
    """The rounds of a protocol with everything that `line.py` supplies, and what a study must give."""
    sites = [s for s, info in engine.sites.items() if (info.role == "pooled") == (name == "centralized")]
    weigh = weight_of("mean")
    supplied: dict[str, Any] = {
        "model": "m", "collect": partial(plain, weigh=weigh), "rule": mean, "rounds": 3, "steps": dict.fromkeys(sites, 1),
        "min_sites": 1, "deadline_s": 60.0, "network": scales, "training": TRAINING, "seed": 7,
        "device": torch.device("cpu"), "weigh": weigh, "cases": {n: m.n_cases for n, m in engine.members.items()},
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "splitfed": {"cut": ("down0", "down1")}, "vertical": {"network": parties, "labels": "south"},
    }  # fmt: skip
    given = own.get(name, {})
    function: Callable[..., Iterator[Round]] = catalog.load("protocols", name)
    return function(engine, start or start_of(name), **supplied | given | changes)


def values(round_: Round, name: str = "conv") -> list[float]:
    return part(round_.tensors, WEIGHTS)[name].flatten().tolist()


every_protocol = pytest.mark.parametrize("name", catalog.names("protocols"))

# ----------------------------------------------------------------------------------------------------------- all of them


def test_the_baselines_and_federated_are_found() -> None:
    assert {"local", "centralized", "federated"} <= set(catalog.names("protocols"))


@every_protocol
def test_rounds_are_yielded_one_by_one_with_nothing_outstanding(name: str) -> None:
    engine = pool()
    rounds = running(name, engine)
    assert engine.sent == [], "nothing is sent before it is asked for"
    for number in (1, 2, 3):
        done = next(rounds)
        assert done.number == number
        assert not engine.outstanding
        assert {r.round for _, r in engine.sent} == set(range(1, number + 1)), "a round is not begun before its turn"
        assert all(isinstance(t, Tensor) for t in done.tensors.values())
    assert list(rounds) == []


@every_protocol
def test_every_site_answers_and_says_what_it_did(name: str) -> None:
    engine = pool()
    steps = {"pooled": 2} if name == "centralized" else {"north": 2, "south": 2 if name == "vertical" else 3}
    for done in running(name, engine, steps=steps):
        assert set(done.answers) == set(steps)
        assert done.failures == {}
        for site, answer in done.answers.items():
            assert (answer.n_cases, answer.n_steps) == (engine.members[site].n_cases, steps[site])
            target = engine.members["south" if name == "vertical" else site].target  # who has the labels knows the loss
            assert (answer.loss, answer.seconds) == (target / done.number, 0.25)
    for site, n in steps.items():
        asked = [getattr(r, "train", r) for r in engine.requests(site)]
        begun = [r for r in asked if isinstance(r, Train) or (isinstance(r, Front) and r.step == 0)]
        assert [(r.model, r.round, r.first_step, r.steps, r.total_steps) for r in begun] == [
            ("m", 1, 0, n, 3 * n), ("m", 2, n, n, 3 * n), ("m", 3, 2 * n, n, 3 * n),
        ]  # fmt: skip
    assert {name for name, _ in engine.sent} == set(steps), "nobody else is asked"


@every_protocol
def test_bytes_are_those_that_were_packed(name: str) -> None:
    engine = pool()
    for done in running(name, engine):
        expected = {
            site: tuple(sum(row[i] for row in engine.bytes if row[:2] == (done.number, site)) for i in (2, 3))
            for site in done.answers
        }
        assert {s: (t.down, t.up) for s, t in done.traffic.items()} == expected
        assert all(t.down > 100 and t.up > 100 for t in done.traffic.values())


@every_protocol
def test_it_goes_on_from_any_round_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    """From what `record.py` would have written of the round, and with sites as they were then."""
    engine = pool()
    states = [(start_of(name), copy.deepcopy(engine))]
    uninterrupted = []
    for done in running(name, engine):
        uninterrupted.append(done)
        states.append((done, copy.deepcopy(engine)))
    for number, (state, engine) in enumerate(states):
        wire.write_tensors(tmp_path / "round.safetensors", state.tensors, {"values": "{}"})
        tensors, _ = wire.read_tensors(tmp_path / "round.safetensors")
        resumed = list(running(name, engine, Round(number, tensors, state.values)))
        assert len(resumed) == 3 - number
        for a, b in zip(resumed, uninterrupted[number:], strict=True):
            assert (a.number, a.values, a.answers, a.n_tensors) == (b.number, b.values, b.answers, b.n_tensors)
            assert {s: vars(t) for s, t in a.traffic.items()} == {s: vars(t) for s, t in b.traffic.items()}
            assert a.tensors.keys() == b.tensors.keys()
            assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in b.tensors)


@every_protocol
def test_the_deadline_is_passed_on(name: str) -> None:
    engine = pool()
    list(running(name, engine, deadline_s=7.5))
    assert len(engine.deadlines) >= 3
    assert set(engine.deadlines) == {7.5}
    engine = pool()
    list(running(name, engine, deadline_s=None))
    assert set(engine.deadlines) == {None}


@every_protocol
def test_a_round_that_is_given_is_not_changed(name: str) -> None:
    engine = pool()
    first = next(running(name, engine))
    for start in (start_of(name), first):
        before = {n: t.clone() for n, t in start.tensors.items()}
        list(running(name, engine, start))
        assert start.tensors.keys() == before.keys()
        assert all(torch.equal(start.tensors[n], t) for n, t in before.items())


# ------------------------------------------------------------------------------------------------------------- federated


def test_federated_worked_out_by_hand() -> None:
    """One case pulls half way to 2, three pull half way to 10: w' = (1 * (w + 2) / 2 + 3 * (w + 10) / 2) / 4 = w / 2 + 4."""
    engine = north_and_south()
    rounds = list(running("federated", engine))
    assert [values(r) for r in rounds] == [[4.0, 8.0], [6.0, 8.0], [7.0, 8.0]]
    assert [values(r, "norm") for r in rounds] == [[12.0], [10.0], [9.0]]
    assert [r.n_tensors for r in rounds] == [2, 2, 2]


def test_federated_with_steps_of_each_sites_own() -> None:
    """Two steps at the south: (1 * (w + 2) / 2 + 3 * (w + 30) / 4) / 4 for w = 0: (1 + 22.5) / 4."""
    engine = north_and_south()
    first = next(running("federated", engine, steps={"north": 1, "south": 2}))
    assert values(first) == [23.5 / 4, ((8 + 2) / 2 + 3 * (8 + 30) / 4) / 4]


def test_federated_sends_and_asks_for_weights_every_round() -> None:
    engine = north_and_south()
    rounds = [START, *running("federated", engine)]
    for site in ("north", "south"):
        for request in engine.requests(site):
            shared = part(rounds[request.round - 1].tensors, WEIGHTS)
            assert request.send_weights
            assert all(torch.equal(request.weights[n], t) for n, t in shared.items())


def test_a_request_that_sites_share_is_packed_once() -> None:
    engine = north_and_south(west=ToySite(0.0, 1))
    list(running("federated", engine, rounds=1, steps={"north": 2, "south": 2, "west": 2}))
    list(running("federated", engine, rounds=1, steps={"north": 2, "south": 3, "west": 2}))
    assert engine.packed_at_once == [1, 2]


@pytest.mark.parametrize(
    "failure",
    [
        SiteLost(),
        SiteTimeout(60.0),
        SiteError("MemoryError", "out_of_memory", "r2"),
        Done(),
        Trained({}, 3, 1, 0.5, 0.1),
    ],
    ids=lambda f: type(f).__name__,
)
def test_federated_goes_on_without_a_site_that_fails(failure: Any) -> None:
    """Round 2 has the north alone: w' = (w + 2) / 2; in round 3 the south is back, from the weights that it was sent."""
    engine = north_and_south({("south", 2): failure})
    rounds = list(running("federated", engine))
    assert [values(r)[0] for r in rounds] == [4.0, 3.0, 5.5]
    assert [set(r.answers) for r in rounds] == [{"north", "south"}, {"north"}, {"north", "south"}]
    assert [set(r.failures) for r in rounds] == [set(), {"south"}, set()]
    assert set(rounds[1].traffic) == {"north", "south"}


def test_federated_stops_where_too_few_sites_answer() -> None:
    engine = north_and_south({("south", 2): SiteLost(), ("north", 2): SiteTimeout(60.0)})
    rounds = running("federated", engine, min_sites=2)
    assert next(rounds).number == 1
    with pytest.raises(EngineError) as e:
        next(rounds)
    message = str(e.value)
    assert "m, round 2: 0 of 2 sites answered" in message
    assert "south: lost" in message
    assert "north: no reply within 60 s" in message
    assert "At least 2 must ([protocol] min_sites)" in message
    assert not engine.outstanding


def test_require_counts_the_sites() -> None:
    answers = dict.fromkeys(["a", "b"])
    require(answers, {"c": SiteLost()}, min_sites=2, model="m", number=1)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"2 of 3 sites answered \(c: lost\)\. At least 3"):
        require(answers, {"c": SiteLost()}, min_sites=3, model="m", number=1)  # type: ignore[arg-type]


def test_federated_hands_the_rules_state_from_round_to_round() -> None:
    """A rule that counts its rounds; the count is a tensor of the round."""

    def counting(total: Any, state: Tensors, **_: Any) -> tuple[Tensors, Tensors]:
        return total.mean(), {"count": state.get("count", torch.tensor(0)) + 1}

    engine = north_and_south()
    rounds = list(running("federated", engine, rule=counting))
    assert [int(r.tensors["rule/count"]) for r in rounds] == [1, 2, 3]
    (again,) = running("federated", north_and_south(), rounds[1], rule=counting)
    assert int(again.tensors["rule/count"]) == 3
    assert "rule/count" not in engine.requests("north")[-1].weights


def test_federated_uses_the_collect_and_the_options_it_is_given() -> None:
    seen: list[tuple[set[str], set[str]]] = []

    def collect(ask: Any, requests: Mapping[str, Train], *, blocks: Any, asked: Any) -> Any:
        seen.append((set(requests), {name for block in blocks for name in block.like}))
        return plain(ask, requests, blocks=blocks, asked=asked, weigh=weight_of("mean"))

    list(running("federated", north_and_south(), collect=partial(collect)))
    assert seen == [({"north", "south"}, {"conv", "norm"})] * 3


# ----------------------------------------------------------------------------------------------------------------- local


def test_local_sends_the_initial_weights_and_nothing_else() -> None:
    engine = north_and_south()
    rounds = list(running("local", engine))
    for site in ("north", "south"):
        requests = engine.requests(site)
        assert [bool(r.weights) for r in requests] == [True, False, False]
        assert not any(r.send_weights for r in requests)
        assert torch.equal(requests[0].weights["conv"], torch.tensor([[0.0, 8.0]]))
    assert all(r.tensors == {} for r in rounds), "the models stay at their sites"
    assert rounds[1].traffic["north"].down < rounds[0].traffic["north"].down
    assert engine.members["north"].weights["conv"].tolist() == [[1.75, 2.75]]  # 0 and 8, half way to 2 three times
    assert engine.members["south"].weights["conv"].tolist() == [[8.75, 9.75]]


def test_local_goes_on_whoever_fails() -> None:
    engine = north_and_south({("south", 2): SiteLost(), ("north", 2): Done()})
    rounds = list(running("local", engine, min_sites=2))
    assert [set(r.failures) for r in rounds] == [set(), {"north", "south"}, set()]
    assert rounds[1].failures["south"] == SiteLost()
    assert rounds[1].failures["north"] == SiteError("ContractError", "wrong_reply", "")
    assert engine.members["south"].weights["conv"].tolist() == [[7.5, 9.5]]  # two steps in three rounds


# -------------------------------------------------------------------------------------------------------------- splitfed


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_splitfed_goes_on_from_any_round_with_its_bodies_optimisers(variant: str) -> None:
    uninterrupted = list(running("splitfed", north_and_south(), variant=variant))
    for done in uninterrupted[:2]:
        owners = {"server"} if variant == "v2" else {"north", "south"}
        assert {n.split("/")[1] for n in done.tensors if n.startswith("body/")} == owners == set(done.values)
        resumed = list(running("splitfed", north_and_south(), done, variant=variant))
        assert all(torch.equal(resumed[-1].tensors[n], t) for n, t in uninterrupted[-1].tensors.items())
        forgetful = Round(done.number, {n: t for n, t in done.tensors.items() if not n.startswith("body/")})
        other = list(running("splitfed", north_and_south(), forgetful, variant=variant))
        name = WEIGHTS + "down1.factor"
        assert not torch.equal(other[-1].tensors[name], uninterrupted[-1].tensors[name])


def test_splitfed_does_not_depend_on_who_answers_first() -> None:
    for variant in ("v1", "v2"):
        seen = []
        for seed in range(5):
            engine = north_and_south(west=ToySite(-3.0, 2))
            engine.random = random.Random(seed)
            seen.append(list(running("splitfed", engine, variant=variant, steps={"north": 2, "south": 3, "west": 1})))
        for other in seen[1:]:
            for a, b in zip(seen[0], other, strict=True):
                assert all(torch.equal(a.tensors[n], t) for n, t in b.tensors.items())


MAPS, GRADIENTS = Maps((torch.zeros(2, 1, 3),)), Gradients((torch.zeros(2, 1, 3),))


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        (Front, GRADIENTS),
        (Front, Trained({}, 3, 1, 0.5, 0.1)),
        (Tail, MAPS),
        (Tail, Done()),
        (Finish, MAPS),
        (Finish, GRADIENTS),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else type(x).__name__,
)
def test_splitfed_goes_on_without_a_site_that_answers_something_else(asked: type, wrong: Reply, variant: str) -> None:
    engine = north_and_south({("south", 2, asked): wrong})
    rounds = list(running("splitfed", engine, variant=variant))
    assert [set(r.answers) for r in rounds] == [{"north", "south"}, {"north"}, {"north", "south"}]
    assert rounds[1].failures == {"south": SiteError("ContractError", "wrong_reply", "")}


# ----------------------------------------------------------------------------------------------------------- centralized


def test_centralized_trains_the_pool_and_fetches_the_weights_at_the_end() -> None:
    engine = pool()
    rounds = list(running("centralized", engine))
    requests = engine.requests("pooled")
    assert [bool(r.weights) for r in requests] == [True, False, False]
    assert [r.send_weights for r in requests] == [False, False, True]
    assert [bool(r.tensors) for r in rounds] == [False, False, True]
    assert values(rounds[-1]) == [5 - 5 / 8, 5 + 3 / 8]
    assert values(rounds[-1], "norm") == [5 + 11 / 8]


@pytest.mark.parametrize("steps", [{"north": 1}, {"pooled": 1, "north": 1}, {"north": 1, "south": 1}])
def test_centralized_refuses_real_sites(steps: dict[str, int]) -> None:
    """Before anything is sent."""
    engine = pool()
    with pytest.raises(PrivacyError, match="Real sites never pool them"):
        next(running("centralized", engine, steps=steps))
    assert engine.sent == []


def test_centralized_stops_where_the_pool_fails() -> None:
    engine = ToyEngine({"pooled": ToySite(5.0, 4)}, {("pooled", 2): SiteError("MemoryError", "out_of_memory", "r3")})
    rounds = running("centralized", engine)
    next(rounds)
    with pytest.raises(
        EngineError, match=r"round 2: 0 of 1 sites answered \(pooled: out_of_memory \(MemoryError; reference r3"
    ):
        next(rounds)


# ------------------------------------------------------------------------------------------------- who takes part in what

TURNS = (("north", "south"), ("west",))
WITH_COHORTS = pytest.mark.parametrize("name", ["federated", "splitfed"])


def three() -> ToyEngine:
    return north_and_south(west=ToySite(6.0, 2))


@WITH_COHORTS
@pytest.mark.parametrize("who", [{"cohorts": TURNS}, {"participation": 0.4}], ids=["turns", "share"])
def test_only_sites_that_are_asked_are_sent_anything(name: str, who: dict[str, Any]) -> None:
    engine = three()
    for done in running(name, engine, rounds=6, **who):
        talked = {site for site, request in engine.sent if request.round == done.number}
        assert talked == set(done.answers) == set(done.traffic)
        assert done.failures == {}
        if "cohorts" in who:
            assert talked == set(TURNS[(done.number - 1) % 2])
        else:
            assert len(talked) == 1
    begun = [r for r in engine.requests("west") if isinstance(r, Train | Front) and getattr(r, "step", 0) == 0]
    assert begun, "its turn comes"
    assert all(r.weights and r.first_step == r.round - 1 for r in begun), "it is sent the weights, and the round's rate"


def test_cohorts_worked_out_by_hand() -> None:
    """Odd rounds: w' = w / 2 + 4 (see above); even ones: half way to 6."""
    rounds = list(running("federated", three(), rounds=4, cohorts=TURNS, min_sites=2))
    assert [values(r)[0] for r in rounds] == [4.0, 5.0, 6.5, 6.25]


@WITH_COHORTS
@pytest.mark.parametrize("who", [{"cohorts": TURNS}, {"participation": 0.4}], ids=["turns", "share"])
def test_who_is_asked_does_not_depend_on_a_stop(name: str, who: dict[str, Any]) -> None:
    uninterrupted = list(running(name, three(), rounds=5, **who))
    for done in uninterrupted[:4]:
        resumed = list(running(name, three(), done, rounds=5, **who))
        assert [set(r.traffic) for r in resumed] == [set(r.traffic) for r in uninterrupted[done.number :]]
        assert all(torch.equal(resumed[-1].tensors[n], t) for n, t in uninterrupted[-1].tensors.items())


@WITH_COHORTS
def test_a_cohort_of_which_nobody_answers_stops_the_study(name: str) -> None:
    engine = three()
    engine.failing = {("west", 2): SiteLost()}
    rounds = running(name, engine, cohorts=TURNS, min_sites=2)
    assert next(rounds).number == 1
    with pytest.raises(EngineError, match=r"round 2: 0 of 1 sites answered \(west: lost\)\. At least 1 must"):
        next(rounds)


def test_what_comes_beside_the_weights_counts_as_a_share_of_all_cases() -> None:
    """As in SCAFFOLD with sampling (Karimireddy et al. 2020, algorithm 1): c + |S| / N times the mean change of those asked."""

    class Beside(ToySite):
        def answer(self, request: Request) -> Reply | Failure:
            reply = super().answer(request)
            assert isinstance(reply, Trained)
            change = {n: torch.full_like(t, self.target) for n, t in reply.weights.items()}
            return Trained(reply.weights, reply.n_cases, reply.n_steps, reply.loss, reply.seconds, change)

    sites = {"north": Beside(2.0, 1), "south": Beside(10.0, 3), "west": Beside(6.0, 4)}
    first, second = running("federated", ToyEngine(sites), rounds=2, cohorts=TURNS)
    assert part(first.tensors, "control/")["norm"].tolist() == [(1 * 2 + 3 * 10) / 8]
    assert part(second.tensors, "control/")["norm"].tolist() == [(1 * 2 + 3 * 10 + 4 * 6) / 8]


# ---------------------------------------------------------------------------------------------------------------- cyclic


def visits(engine: ToyEngine, number: int) -> list[str]:
    """Who was asked to train in a round, in order."""
    return [site for site, request in engine.sent if isinstance(request, Pass) and request.round == number]


def test_cyclic_worked_out_by_hand() -> None:
    """north: half way to 2; west: half way to 6; south: half way to 10. Round 2 begins where round 1 ended."""
    engine = three()
    rounds = list(running("cyclic", engine, rounds=2, order=("north", "west", "south")))
    assert [visits(engine, n) for n in (1, 2)] == [["north", "west", "south"]] * 2
    first = ((0 + 2) / 2 + 6) / 2
    assert engine.members["west"].weights["conv"][0, 0] == (((first + 10) / 2 + 2) / 2 + 6) / 2
    assert all(part(r.tensors, WEIGHTS) == {} for r in rounds), "the server has no weights"
    assert [r.values["holder"] for r in rounds] == ["south", "south"]
    assert [dict(r.values)["receiver"] for r in rounds] == ["north", ""]


def test_cyclic_draws_an_order_for_each_round() -> None:
    engine = three()
    list(running("cyclic", engine, rounds=12))
    orders = {tuple(visits(engine, n)) for n in range(1, 13)}
    assert len(orders) > 2
    assert all(set(order) == {"north", "south", "west"} for order in orders)


def test_cyclic_reveals_the_finished_model_where_it_is_asked_to() -> None:
    hidden, engine = three(), three()
    list(running("cyclic", hidden))
    *before, last = running("cyclic", engine, reveal=True)
    assert all(part(r.tensors, WEIGHTS) == {} for r in before)
    assert torch.equal(part(last.tensors, WEIGHTS)["conv"], hidden.members[str(last.values["holder"])].weights["conv"])


ORDER = ("north", "west", "south")


@pytest.mark.parametrize(
    "failure", [SiteLost(), SiteTimeout(60.0), SiteError("MemoryError", "out_of_memory", "r"), Done()]
)
@pytest.mark.parametrize("site", ORDER)
def test_cyclic_goes_round_a_site_that_fails(site: str, failure: Any) -> None:
    engine = three()
    engine.failing = {(site, 2, Pass): failure}
    rounds = list(running("cyclic", engine, rounds=3, order=ORDER))
    assert [set(r.failures) for r in rounds] == [set(), {site}, set()]
    assert set(rounds[1].answers) == set(ORDER) - {site}
    targets = {"north": 2.0, "west": 6.0, "south": 10.0}
    expected = 0.0
    for number in (1, 2, 3):
        for name in ORDER:
            expected = expected if (number, name) == (2, site) else (expected + targets[name]) / 2
    assert float(engine.members["south"].weights["conv"][0, 0]) == expected


def test_cyclic_goes_on_from_the_last_that_is_left() -> None:
    """The west trained, the south failed, and then the west was gone: the north's weights go on, the west's turn is lost."""
    more = {"east": ToySite(4.0, 1)}
    engine = north_and_south(west=ToySite(6.0, 2), **more)
    engine.failing = {("south", 2, Pass): SiteLost(), ("west", 2, Hand): SiteLost()}
    _, second = running("cyclic", engine, rounds=2, order=("north", "west", "south", "east"))
    assert set(second.failures) == {"south", "west"}
    assert set(second.answers) == {"north", "east"}
    after_first = (((0 + 2) / 2 + 6) / 2 + 10) / 2
    after_first = (after_first + 4) / 2
    assert float(engine.members["east"].weights["conv"][0, 0]) == ((after_first + 2) / 2 + 4) / 2


def test_cyclic_stops_where_nobody_is_left_who_has_the_weights() -> None:
    engine = three()
    engine.failing = {("north", 2, Pass): SiteLost(), ("south", 2): SiteLost()}
    rounds = running("cyclic", engine, rounds=2, order=ORDER)
    assert next(rounds).number == 1
    with pytest.raises(
        EngineError, match=r"round 2: nobody is left who has the weights \(south: lost\)\. Expected one site"
    ):
        next(rounds)


def test_cyclic_stops_where_too_few_sites_answer() -> None:
    engine = three()
    engine.failing = {("north", 2, Pass): SiteLost(), ("west", 2): SiteTimeout(60.0)}
    rounds = running("cyclic", engine, order=ORDER, min_sites=2)
    assert next(rounds).number == 1
    with pytest.raises(EngineError, match="round 2: 1 of 3 sites answered"):
        next(rounds)


# ------------------------------------------------------------------------------ cohorts where sites do not share everything


def test_cohorts_of_sites_that_have_different_tensors() -> None:
    """`conv` is shared by all, `norm` by north and west: in the south's and north's rounds the north alone has it."""
    all_three, two = ("north", "south", "west"), ("north", "west")
    blocks = (
        Block({"conv": torch.empty(1, 2, device="meta")}, {s: {"conv": "conv"} for s in all_three}),
        Block({"norm": torch.empty(1, device="meta")}, {s: {"norm": "norm"} for s in two}),
    )
    sharing = Sharing(blocks=blocks, sizes={"north": 3, "south": 2, "west": 3})
    rounds = list(running("federated", three(), rounds=2, cohorts=TURNS, sharing=sharing))
    assert [set(r.answers) for r in rounds] == [{"north", "south"}, {"west"}]
    assert [values(r)[0] for r in rounds] == [4.0, 5.0]
    assert [values(r, "norm") for r in rounds] == [[(16 + 2) / 2], [((16 + 2) / 2 + 6) / 2]]
    only_south = list(running("federated", three(), rounds=1, cohorts=(("south",), ("north", "west")), sharing=sharing))
    assert values(only_south[0], "norm") == [16.0], "of which nobody was asked, it stays as it was"


def test_where_nobody_of_the_only_block_is_asked_weights_and_state_stay() -> None:
    """West shares nothing: alone in its turn, it leaves no update to make weights of."""
    two = ("north", "south")
    blocks = (Block({"conv": torch.empty(1, 2, device="meta")}, {s: {"conv": "conv"} for s in two}),)
    sharing = Sharing(blocks=blocks, sizes={"north": 2, "south": 2, "west": 3})

    class Lone(ToySite):
        def answer(self, request: Request) -> Reply | Failure:
            return Trained({}, self.n_cases, 1, 0.5, 0.25)

    engine, start = (
        north_and_south(west=Lone(6.0, 2)),
        start_with({"conv": part(START.tensors, WEIGHTS)["conv"]}),
    )

    def rule(total: Any, state: Tensors, *, before: Tensors) -> tuple[Tensors, Tensors]:
        return total.mean(), {"n": state.get("n", torch.zeros(())) + 1}

    rounds = list(running("federated", engine, start, rounds=2, cohorts=TURNS, sharing=sharing, rule=rule))
    assert [set(r.answers) for r in rounds] == [set(two), {"west"}]
    assert values(rounds[0]) == values(rounds[1])
    assert [float(r.tensors["rule/n"]) for r in rounds] == [1.0, 1.0]


def test_what_a_site_keeps_begins_in_its_own_first_round() -> None:
    engine = three()
    sharing = Sharing(kept=frozenset({"norm"}), sizes={"north": 3, "south": 3, "west": 3})
    start = start_with({"conv": part(START.tensors, WEIGHTS)["conv"]})
    rounds = list(running("federated", engine, start, rounds=4, cohorts=TURNS, sharing=sharing))
    assert [r.values[".begun"] for r in rounds] == [("north", "south")] + [("north", "south", "west")] * 3
    assert {s: [r.begins for r in engine.requests(s)] for s in ("north", "west")} == {
        "north": [True, False], "west": [True, False],
    }  # fmt: skip
