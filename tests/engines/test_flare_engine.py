"""The engine `flare`: the contract of every engine, with sites that dial in from threads of the test."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from concilium import wire
from concilium.answers import Policy, Settings
from concilium.data.phantom_sequences import write_sequences
from concilium.engines import ask, flare
from concilium.engines.flare import Flare, Place
from concilium.errors import ContractError, EngineError, StudyError
from concilium.line import run
from concilium.messages import (
    Done,
    Failure,
    PlugIn,
    Prepare,
    Prepared,
    Reply,
    Request,
    Restore,
    SiteError,
    SiteLost,
    SiteTimeout,
    Snapshot,
    Train,
    Trained,
    Training,
)
from concilium.sealing import Identity
from concilium.site import Site
from concilium.study import parse_study
from concilium.wire import Envelope

LONG_S = 30.0
"""Only against hanging: the machine may be busy."""
Answer = Callable[["Scripted", Any, Callable[[], bool]], Any]
pack = wire.pack
TRAINING = Training(
    "sgd", 0.01, 0.0, 0.9, "float32", 0.33, False, "none", 12.0, False, 0, PlugIn("dice_ce"), PlugIn("plain")
)
PREPARE = Prepare("{}", "3d_fullres", PlugIn("unet"), TRAINING, 5, 0, 1, 0.1)


def train(number: int = 1, *, model: str = "m", value: float = 1.0) -> Train:
    return Train(model, number, 0, 1, 1, {"w": torch.full((4, 5), value)}, True)


@dataclass
class Scripted:
    """What a site of the test does with a request. By default training doubles the weights."""

    answer: Answer = lambda site, request, cancelled: site.plainly(request)
    asked: list[tuple[int, Any]] = field(default_factory=list)
    """Epoch and request, in order."""
    sent: list[bytes] = field(default_factory=list)

    def __call__(self, packed: bytes, heading: Mapping[str, Any], cancelled: Callable[[], bool]) -> bytes:
        request = wire.unpack(packed)
        self.asked.append((heading["epoch"], request))
        reply = self.answer(self, request, cancelled)
        self.sent.append(reply if isinstance(reply, bytes) else pack(reply))
        return self.sent[-1]

    def plainly(self, request: Request) -> Reply:
        match request:
            case Prepare():
                return Prepared(3, 1, 4, (), ())
            case Train():
                return Trained({n: 2 * t for n, t in request.weights.items()}, 3, request.steps, 0.5, 0.1)
        return Done()

    @property
    def kinds(self) -> list[str]:
        return [type(request).__name__ for _, request in self.asked]


@dataclass
class Federation:
    """An engine with its sites, each at the end of a wire of its own."""

    engine: Flare
    scripts: dict[str, Scripted]
    wires: dict[str, Any]
    threads: dict[str, Any]

    def lose(self, site: str, soon: Any) -> None:
        """Cut the site off until the server has given it up."""
        self.wires[site].refusing = True
        self.wires[site].cut()
        soon(lambda: not self.engine.hub.present(site), "the server gave it up")

    def back(self, site: str, soon: Any) -> None:
        """Let it dial again; it comes in a new life."""
        before = self.engine.hub.epoch(site)
        self.wires[site].refusing = False
        soon(
            lambda: self.engine.hub.epoch(site) != before and len(self.engine.hub._places[site].lines) == 2,
            "it is back",
        )

    def ask(self, requests: Mapping[str, Request], **options: Any) -> dict[str, Reply | Failure]:
        """All replies; each site gives one."""
        replies = list(ask(self.engine, requests, **options))
        assert sorted(site for site, _ in replies) == sorted(requests)
        return dict(replies)


@pytest.fixture
def federate(
    authority: Any, join: Any, wire_to: Any, tmp_path: Path, quick_beats: None
) -> Iterator[Callable[..., Federation]]:
    """`federate(north=Scripted(), ...)`: the sites are here when it returns."""
    made: list[Flare] = []

    def make(*, absence_s: float = LONG_S, **scripts: Scripted) -> Federation:
        place = Place(authority.issue("server"), ("127.0.0.1", 0), wait_s=LONG_S, absence_s=absence_s, silence_s=LONG_S)
        engine = Flare(dict.fromkeys(scripts, "site"), place, run="run1", spool=tmp_path / "spool")
        made.append(engine)
        wires = {name: wire_to(engine.hub.port) for name in scripts}
        threads = {name: join(name, wires[name].port, script) for name, script in scripts.items()}
        engine.wait(place)
        assert all(engine.hub.present(name) for name in scripts)
        return Federation(engine, scripts, wires, threads)

    yield make
    for engine in made:
        engine.close()
    assert not (tmp_path / "spool").exists()


def until_released(release: threading.Event) -> Answer:
    """Works until it is released, whoever cancels it."""

    def answer(site: Scripted, request: Request, cancelled: Callable[[], bool]) -> Reply:
        if isinstance(request, Train) and not release.is_set():
            assert release.wait(LONG_S)
        return site.plainly(request)

    return answer


# ----------------------------------------------------------------------------------------------------------- what holds


def test_every_site_gives_its_own_reply_and_bytes_are_those_that_were_packed(federate: Any) -> None:
    f = federate(north=Scripted(), south=Scripted())
    requests = {"north": train(value=1.0), "south": train(value=3.0, model="longer-name")}
    replies = f.ask(requests)
    for site, value in (("north", 2.0), ("south", 6.0)):
        assert replies[site].weights["w"].equal(torch.full((4, 5), value))
        traffic = f.engine.traffic[site]
        assert (traffic.down, traffic.up) == (len(pack(requests[site])), len(f.scripts[site].sent[0]))
    assert f.engine.dropped == 0
    assert {name: info.role for name, info in f.engine.sites.items()} == {"north": "site", "south": "site"}


def test_one_request_is_outstanding_per_site(federate: Any) -> None:
    release = threading.Event()
    f = federate(north=Scripted(until_released(release)), south=Scripted())
    f.engine.send({"north": train()})
    for wrong in ("north", "elsewhere"):
        with pytest.raises(ContractError, match=f"A request for '{wrong}' cannot be sent"):
            f.engine.send({"south": train(), wrong: train()})
    release.set()
    assert [site for site, _ in f.engine.replies()] == ["north"]  # nothing was sent to south
    assert f.scripts["south"].asked == []


def test_a_shared_message_is_packed_once(federate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f = federate(north=Scripted(), south=Scripted(), west=Scripted())
    packed: Counter[str] = Counter()
    monkeypatch.setattr(wire, "pack", lambda message: packed.update([type(message).__name__]) or pack(message))
    f.ask(dict.fromkeys(f.scripts, train()))
    assert packed == {"Train": 1}
    f.ask({"north": train(), "south": train()})
    assert packed == {"Train": 3}


def test_requests_may_be_sent_while_replies_arrive(federate: Any) -> None:
    """As split training does: each site at its own pace."""
    f = federate(north=Scripted(), south=Scripted())
    left = {"north": 20, "south": 7}
    got: Counter[str] = Counter()
    f.engine.send({site: train() for site in left})
    for site, reply in f.engine.replies():
        assert isinstance(reply, Trained)
        got[site] += 1
        if got[site] < left[site]:
            f.engine.send({site: train(got[site])}, deadline_s=LONG_S)
    assert got == left
    assert [request.round for _, request in f.scripts["north"].asked] == [1, *range(1, 20)]


def test_what_a_consumer_leaves_is_there_for_the_next(federate: Any) -> None:
    f = federate(north=Scripted(), south=Scripted())
    f.engine.send(dict.fromkeys(f.scripts, train()))
    first, _ = next(iter(f.engine.replies()))
    assert {first, *(site for site, _ in f.engine.replies())} == {"north", "south"}
    assert list(f.engine.replies()) == []


def test_replies_wait_on_disk_and_leave_nothing_there(federate: Any, soon: Any, tmp_path: Path) -> None:
    f = federate(north=Scripted(), south=Scripted())
    f.engine.send(dict.fromkeys(f.scripts, train()))
    soon(lambda: len(list((tmp_path / "spool").glob("*.reply"))) == 2)
    assert len(list(f.engine.replies())) == 2
    assert list((tmp_path / "spool").glob("*.reply")) == []


# ------------------------------------------------------------------------------------------------------------ deadlines


def test_a_late_reply_is_dropped_and_counted(federate: Any) -> None:
    release = threading.Event()
    f = federate(north=Scripted(until_released(release)), south=Scripted())
    replies = f.ask({"north": train(value=1.0), "south": train()}, deadline_s=1.0)
    assert replies["north"] == SiteTimeout(1.0)
    assert isinstance(replies["south"], Trained)
    release.set()
    again = f.ask({"north": train(value=5.0)}, deadline_s=LONG_S)["north"]
    assert again.weights["w"].eq(10.0).all()  # its own reply, and not the late one
    assert f.engine.dropped == 1
    assert f.engine.traffic["north"].up == len(f.scripts["north"].sent[1])


def test_a_deadline_and_a_cancellation_reach_the_site(federate: Any, soon: Any) -> None:
    gave_up: list[float] = []

    def patient(site: Scripted, request: Request, cancelled: Callable[[], bool]) -> Any:
        began = time.monotonic()
        soon(cancelled)
        gave_up.append(time.monotonic() - began)
        return SiteTimeout(1.0)

    f = federate(north=Scripted(patient))
    assert f.ask({"north": train()}, deadline_s=0.5)["north"] == SiteTimeout(0.5)
    soon(lambda: gave_up)
    f.engine.send({"north": train()})
    f.engine.cancel(["north", "elsewhere"])
    assert list(f.engine.replies()) == [("north", SiteTimeout(1.0))]
    f.engine.cancel(["north"])  # it has nothing to do: no harm


def test_a_deadline_holds_while_other_sites_are_busy(federate: Any) -> None:
    """The server computes between their replies, of which the next is always there already."""
    release = threading.Event()
    f = federate(north=Scripted(until_released(release)), south=Scripted())
    f.engine.send({"north": train()}, deadline_s=0.5)
    f.engine.send({"south": train()})
    for n, (site, reply) in enumerate(f.engine.replies()):
        if site == "north":
            assert reply == SiteTimeout(0.5)
            break
        if n == 60:
            release.set()
            pytest.fail("six times its deadline has passed")
        f.engine.send({"south": train()})
        time.sleep(0.05)
    release.set()
    assert [site for site, _ in f.engine.replies()] == ["south"]


def test_a_reply_in_time_counts_however_late_it_is_read(federate: Any, soon: Any, tmp_path: Path) -> None:
    """The server was busy with the other one."""
    f = federate(north=Scripted(), south=Scripted())
    f.engine.send(dict.fromkeys(f.scripts, train()), deadline_s=1.0)
    soon(lambda: len(list((tmp_path / "spool").glob("*.reply"))) == 2)
    replies = f.engine.replies()
    first, _ = next(replies)
    time.sleep(1.3)
    ((second, reply),) = replies
    assert {first, second} == {"north", "south"}
    assert isinstance(reply, Trained)


def test_a_late_reply_is_late_however_busy_the_server_is(federate: Any, soon: Any, tmp_path: Path) -> None:
    release = threading.Event()
    f = federate(north=Scripted(until_released(release)), south=Scripted())
    f.engine.send(dict.fromkeys(f.scripts, train()), deadline_s=0.5)
    replies = f.engine.replies()
    assert next(replies)[0] == "south"
    time.sleep(0.8)
    release.set()
    soon(lambda: len(f.scripts["north"].sent) == 1)
    time.sleep(0.3)
    assert list(replies) == [("north", SiteTimeout(0.5))]


# ----------------------------------------------------------------------------------------------------------- lost sites


def test_a_lost_site_fails_at_once_and_the_others_go_on(federate: Any, soon: Any) -> None:
    release = threading.Event()
    f = federate(absence_s=0.5, north=Scripted(until_released(release)), south=Scripted())
    f.engine.send(dict.fromkeys(f.scripts, train()))
    soon(lambda: f.scripts["north"].asked)
    f.wires["north"].refusing = True
    f.wires["north"].cut()
    replies = dict(f.engine.replies())
    assert replies["north"] == SiteLost()
    assert isinstance(replies["south"], Trained)
    began = time.monotonic()
    assert f.ask({"north": train()})["north"] == SiteLost()
    assert time.monotonic() - began < 5
    release.set()


def test_a_site_that_never_came_is_lost(authority: Any, tmp_path: Path) -> None:
    place = Place(authority.issue("server"), ("127.0.0.1", 0), wait_s=0.2)
    engine = Flare({"north": "site"}, place, run="run1", spool=tmp_path / "spool")
    try:
        engine.wait(place)
        assert list(ask(engine, {"north": train()})) == [("north", SiteLost())]
    finally:
        engine.close()


def test_waiting_ends_when_what_brings_the_sites_has_ended(authority: Any, tmp_path: Path) -> None:
    place = Place(authority.issue("server"), ("127.0.0.1", 0), wait_s=LONG_S, stands=lambda: False)
    with pytest.raises(EngineError, match="FLARE's server has ended before all sites were here"):
        flare.connect(sites={"north": None}, test=None, folder=tmp_path, run="run1", place=place)


def test_a_site_that_comes_back_is_brought_to_where_it_was(federate: Any, soon: Any) -> None:
    f = federate(absence_s=0.5, north=Scripted(), south=Scripted())
    f.ask(dict.fromkeys(f.scripts, PREPARE))
    for number in (1, 2):
        f.ask(dict.fromkeys(f.scripts, train(number)))
        f.ask(dict.fromkeys(f.scripts, Snapshot("m", number)))
    f.ask(dict.fromkeys(f.scripts, Snapshot("other", 7)))
    north = f.scripts["north"]
    (first,) = {epoch for epoch, _ in north.asked}
    n_before = len(north.asked)
    bytes_before = f.engine.traffic["north"].down
    f.lose("north", soon)
    f.back("north", soon)
    replies = list(ask(f.engine, dict.fromkeys(f.scripts, train(3))))
    if dict(replies)["north"] == SiteLost():  # the loss was news to whoever asked; the next request goes through
        replies = list(ask(f.engine, {"north": train(3)}))
    assert isinstance(dict(replies)["north"], Trained)
    told = [request for _, request in north.asked[n_before:]]
    assert told[:1] == [PREPARE]
    assert {(r.model, r.number) for r in told if isinstance(r, Restore)} == {("m", 2), ("other", 7)}
    assert north.kinds[-1] == "Train"
    assert first not in {epoch for epoch, _ in north.asked[n_before:]}
    assert f.engine.traffic["north"].down - bytes_before <= 2 * len(pack(train(3)))  # what goes first is not counted
    f.ask(dict.fromkeys(f.scripts, train(4)))
    assert north.kinds[-2:] == ["Train", "Train"]  # it is told once
    assert f.scripts["south"].kinds.count("Prepare") == 1


def test_what_a_site_lost_with_its_life_is_told_before_it_is_relied_on(federate: Any, soon: Any) -> None:
    """It trained, was started again, and is then asked to write down what it has learnt: it has not."""
    f = federate(absence_s=0.5, north=Scripted(), south=Scripted())
    f.ask(dict.fromkeys(f.scripts, PREPARE))
    f.ask(dict.fromkeys(f.scripts, train(1)))
    f.lose("north", soon)
    f.back("north", soon)
    # no request was on its way meanwhile, so nobody knows
    replies = f.ask(dict.fromkeys(f.scripts, Snapshot("m", 1)))
    assert replies == {"north": SiteLost(), "south": Done()}


def test_a_new_life_before_anybody_noticed_the_end_of_the_old_one(
    federate: Any, soon: Any, authority: Any, join: Any
) -> None:
    """A process that is started again at once: the same name, another epoch."""
    f = federate(north=Scripted(), south=Scripted())
    f.ask(dict.fromkeys(f.scripts, PREPARE))
    f.ask(dict.fromkeys(f.scripts, train(1)))
    f.threads["north"].stop.set()
    soon(lambda: f.threads["north"].ended)
    before, again = f.engine.hub.epoch("north"), Scripted()
    join("north", f.wires["north"].port, again)
    soon(lambda: f.engine.hub.epoch("north") != before and len(f.engine.hub._places["north"].lines) == 2)
    replies = f.ask(dict.fromkeys(f.scripts, Snapshot("m", 1)))
    assert replies == {"north": SiteLost(), "south": Done()}
    assert isinstance(f.ask({"north": train(2)})["north"], Trained)
    assert again.kinds[0] == "Prepare"
    assert again.kinds[-1] == "Train"


def test_a_site_that_is_not_ready_again_by_the_deadline_gets_another_chance(federate: Any, soon: Any) -> None:
    release = threading.Event()
    release.set()

    def slow_to_prepare(site: Scripted, request: Request, cancelled: Callable[[], bool]) -> Reply:
        if isinstance(request, Prepare):
            assert release.wait(LONG_S)
        return site.plainly(request)

    f = federate(absence_s=0.5, north=Scripted(slow_to_prepare))
    f.ask({"north": PREPARE})
    f.ask({"north": Snapshot("m", 4)})
    f.lose("north", soon)
    assert f.ask({"north": train(5)})["north"] == SiteLost()
    f.back("north", soon)
    release.clear()
    while (reply := f.ask({"north": train(5)}, deadline_s=1.0)["north"]) == SiteLost():
        pass
    assert reply == SiteTimeout(1.0)
    release.set()
    assert isinstance(f.ask({"north": train(6)}, deadline_s=LONG_S)["north"], Trained)
    assert f.scripts["north"].kinds[-3:] == ["Prepare", "Restore", "Train"]


# --------------------------------------------------------------------------------------------------------- wrong replies


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (b"garbage", "damaged_reply"),
        (b"", "damaged_reply"),
        (pack(Done())[:-3], "damaged_reply"),
        (train(), "wrong_reply"),
    ],
    ids=["garbage", "nothing", "cut short", "a request"],
)
def test_a_reply_that_is_none_is_the_failure_of_its_site(reply: Any, code: str, federate: Any) -> None:
    f = federate(north=Scripted(lambda *_: reply), south=Scripted())
    replies = f.ask(dict.fromkeys(f.scripts, train()))
    assert replies["north"] == SiteError("ContractError", code, "")
    assert isinstance(replies["south"], Trained)
    assert f.ask({"north": train()})["north"] == SiteError("ContractError", code, "")


def test_a_failure_is_passed_on(federate: Any) -> None:
    failure = SiteError("ValueError", "failed", "north-12ab")
    f = federate(north=Scripted(lambda *_: failure))
    assert f.ask({"north": train()})["north"] == failure


def test_this_engine_is_not_started_without_a_place(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"\[engine\] name = 'flare'.*concilium serve.*concilium join"):
        flare.connect(sites={"north": None}, test=None, folder=tmp_path, run="run1")


# ------------------------------------------------------------------------------------------------------------ real sites


@pytest.mark.parametrize(
    ("protocol", "collect", "tensors"),
    [
        ("federated", "plain", None),
        pytest.param("federated", "plain", ["decoder"], marks=pytest.mark.slow),
        pytest.param("federated", "secure_sum", None, marks=pytest.mark.slow),
        ("splitfed", "plain", None),
        pytest.param("splitfed v2 int8", "plain", None, marks=pytest.mark.slow),
        pytest.param("splitfed sequential float16", "plain", None, marks=pytest.mark.slow),
        ("cyclic", "plain", None),
        ("vertical", "plain", None),
        pytest.param("vertical stay", "plain", None, marks=pytest.mark.slow),
    ],
)
def test_a_study_gives_the_bits_of_the_simulation(
    protocol: str, collect: str, tensors: list[str] | None, phantom: Path, tmp_path: Path, authority: Any, join: Any
) -> None:
    """Also where some tensors are frozen, which each site reads from its own copy of the file that the study starts from."""
    # in one process, server and sites share the libraries' generators: where both draw, they must take turns
    protocol, *how = protocol.split()
    names = {"splitfed": ("north",), "vertical": ("first", "second")}.get(protocol, ("north", "west"))
    names = ("north", "west") if "sequential" in how else names
    if protocol == "vertical":
        phantom = tmp_path / "sequences"
        write_sequences(phantom, n_cases=6, n_test=1, size=16)
    raw: dict[str, Any] = {
        "study": {"name": "small", "seed": 3},
        "sites": {name: {"data": str(phantom / name)} for name in names},
        "protocol": {"name": protocol, "rounds": 2, "steps": 2},
        "collect": {"name": collect},
        "network": {"name": "unet", "levels": 3, "base_features": 4},
        "training": {"optimizer": "adamw", "batch_size": 2, "patch_size": [16, 16, 8], "mirror": False},
        "engine": {"threads": 1, "device": "cpu"},
    }
    raw["protocol"] |= dict(zip(("fronts",) if protocol == "vertical" else ("variant", "transport"), how, strict=False))
    if protocol == "vertical":
        raw["protocol"] |= {"labels": "first", "cut": "shallow", "drop": 0.3, "new_patients": True}
        for channel, name in enumerate(names):
            raw["sites"][name]["holds"] = [name]
            (new,) = (phantom / "test/imagesTr").glob(f"*_{channel:04d}.nii.gz")
            (phantom / name / "imagesTs").mkdir()
            shutil.copyfile(new, phantom / name / "imagesTs/new_0000.nii.gz")
    if tensors is not None:
        raw["network"]["weights"] = str(begun_elsewhere(raw, phantom, tmp_path))
        raw["training"]["tensors"] = tensors
    study = parse_study(raw, folder=phantom)
    run(study, tmp_path / "here")
    one_at_a_time = threading.Lock()
    sites: dict[str, Site] = {}

    def connect(**given: Any) -> flare.Engine:
        roles = dict.fromkeys(given["sites"], "site")
        place = Place(authority.issue("server"), ("127.0.0.1", 0), wait_s=LONG_S)
        engine = Flare(roles, place, run=given["run"], spool=given["folder"] / "spool")

        def handle(name: str, packed: bytes, heading: Mapping[str, Any], cancelled: Callable[[], bool]) -> bytes:
            envelope = Envelope(heading["run"], heading["epoch"], heading["sequence"])
            with one_at_a_time:
                if name not in sites:
                    files = authority.issue(name)
                    s = Settings(
                        name, "site", {name: phantom / name}, None, tmp_path / name, tmp_path / "cache", 1, "cpu",
                        Policy(open_weights=collect == "plain"),
                        identity=Identity(files.authority, files.certificate, files.key, names),
                        weights=tuple(tmp_path.glob("first/weights/*.safetensors")),
                    )  # fmt: skip
                    sites[name] = Site(s, run=envelope.run, epoch=envelope.epoch)
                return sites[name].handle(packed, envelope, cancelled)

        for name in roles:
            join(name, engine.hub.port, partial(handle, name))
        engine.wait(place)
        return engine

    outcome = run(study, tmp_path / "there", connect=connect)
    assert outcome.exit_code == 0
    places = ["here/weights", "there/weights"] if protocol != "cyclic" else ["here/sites/west/models", "west/models"]
    here, there = (load_file(tmp_path / place / f"{protocol}.safetensors") for place in places)
    assert here.keys() == there.keys()
    assert all(here[name].equal(there[name]) for name in here)
    before = json.loads((tmp_path / "here/results.json").read_text())
    assert scores_of(outcome.results) == scores_of(before)
    assert len(scores_of(before)) > 0
    if protocol == "vertical":  # a patient who is new is segmented by both; the label map stays where the labels are
        maps = [tmp_path / place / "segmented/vertical/new.nii.gz" for place in ("here/sites/first", "first")]
        assert maps[0].read_bytes() == maps[1].read_bytes()
        assert not [*tmp_path.glob("second/segmented"), *tmp_path.glob("there/**/new.nii.gz")]
        same_parts(tmp_path, names)
        assert any(n.startswith("fronts.") for n in here) == ("stay" not in how)


def same_parts(folder: Path, names: tuple[str, ...]) -> None:
    """Each party has its own part of the model in its folder, which may be nowhere else."""
    for name in names:
        mine, its = (load_file(folder / at / name / "models/vertical.safetensors") for at in ("here/sites", ""))
        assert any(n.startswith(f"fronts.{name}.") for n in mine)
        assert mine.keys() == its.keys()
        assert all(mine[n].equal(its[n]) for n in mine)


def begun_elsewhere(raw: Mapping[str, Any], folder: Path, out: Path) -> Path:
    """A run of the same study with another seed."""
    study = parse_study({**raw, "study": {"name": "first", "seed": 4}}, folder=folder)
    return run(study, out / "first").folder


def scores_of(results: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return sorted((c["site"], c["subset"], c["label"], str(c["dice"]), str(c["hd95"])) for c in results["cases"])
