"""What a review found: each test was red before its fix."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sessions import Killed, Mortal

import concilium.site
from concilium import wire
from concilium.answers import Settings
from concilium.answers.train import Learner
from concilium.engines import _workers, simulation
from concilium.engines._workers import Call, News
from concilium.errors import CODES, DataError, StudyError
from concilium.line import Event, run
from concilium.messages import (
    Done,
    Forget,
    Keep,
    Reply,
    Request,
    Restore,
    SiteError,
    SiteLost,
    SiteTimeout,
    Snapshot,
    Train,
    Trained,
)
from concilium.record import Record
from concilium.site import Site
from concilium.study import Study
from concilium.wire import Envelope, write_tensors

Make = Callable[..., Study]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def models(folder: Path) -> dict[str, bytes]:
    """The files of the models that never left their sites."""
    return {p.parts[-3]: p.read_bytes() for p in folder.glob("sites/*/models/local.safetensors")}


@pytest.fixture
def fuse(tmp_path: Path) -> str:
    path = tmp_path / "fuse"
    path.touch()
    return str(path)


# ------------------------------------------------------------------------------------- workers that die, hang or are late


def break_training(monkeypatch: pytest.MonkeyPatch, broken: Callable[[str, int], BaseException | None]) -> None:
    """`broken(site, round)` is what training there ends with."""
    train = Learner.train

    def instead(self: Learner, request: Train, *, site: str, cancelled: Callable[[], bool]) -> Trained:
        trained = train(self, request, site=site, cancelled=cancelled)
        if (e := broken(site, request.round)) is not None:
            raise e
        return trained

    monkeypatch.setattr(Learner, "train", instead)


def test_a_worker_that_dies_takes_its_sites_back_one_round_and_all_are_told(
    small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies when `south` is at it: `north`, which has answered, had its new state in that worker's memory."""
    study = small_study(
        protocol__name="local", protocol__rounds=3, sites=("north", "south"), test=False, training__optimizer="sgd"
    )
    with monkeypatch.context() as patch:
        patch.setattr(simulation, "InlineWorker", Mortal)
        at = ("south", 2)
        break_training(patch, lambda site, number: Killed() if (site, number) == at else None)
        assert run(study, tmp_path / "died").exit_code == 4
    first, second, third = lines(tmp_path / "died")
    assert first["failures"] == third["failures"] == {}
    assert {site: f["type"] for site, f in second["failures"].items()} == {"north": "SiteLost", "south": "SiteLost"}
    break_training(monkeypatch, lambda _, number: RuntimeError() if number == 2 else None)
    run(study, tmp_path / "failed")  # the oracle: nobody took the second round, and nothing died
    assert models(tmp_path / "died") == models(tmp_path / "failed")


@pytest.mark.parametrize("late", ["step", "reply"])
def test_a_site_that_trained_too_late_is_as_if_it_had_not(
    late: str, small_study: Make, fuse: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "protocol__name": "local", "protocol__steps": 1, "protocol__round_seconds": 1.5, "sites": ("north",),
        "test": False, "local_update__fuse": fuse,
    }  # fmt: skip
    if late == "step":
        study = small_study(local_update__name="faults:sleeps", local_update__seconds=2.0, **changes)
    else:
        study = small_study(local_update__name="faults:sleeps", local_update__seconds=0.0, **changes)
        answer = Site.answer

        def slowly(self: Site, request: Request, cancelled: Callable[[], bool]) -> Reply:
            reply = answer(self, request, cancelled)
            time.sleep(2.0 if isinstance(request, Train) and request.round == 1 else 0)
            return reply

        monkeypatch.setattr(Site, "answer", slowly)
    run(study, tmp_path / "late")
    monkeypatch.undo()
    assert lines(tmp_path / "late")[0]["failures"]["north"]["type"] == "SiteTimeout"
    Path(fuse).touch()
    run(small_study(local_update__name="faults:raises", **changes), tmp_path / "failed")
    assert models(tmp_path / "late") == models(tmp_path / "failed")


class Hanging:
    """A worker that never ends what it began, until it is killed."""

    def __init__(self, *_: object) -> None:
        self.calls: list[Call] = []
        self.found: list[News] = []

    def post(self, call: Call) -> None:
        self.found += [] if self.calls else [News("started", call.envelope.sequence)]
        self.calls.append(call)

    def news(self) -> list[News]:
        found, self.found = self.found, []
        return found

    def kill(self) -> None:
        self.found = [News("lost")]

    def restart(self, epochs: Mapping[str, int]) -> None:
        self.calls = []

    def close(self) -> None:
        pass


@pytest.mark.timeout(20)
def test_a_worker_that_hangs_is_killed_and_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "InlineWorker", Hanging)
    monkeypatch.setattr(simulation, "GRACE_S", 0.1)
    engine = simulation.connect(sites={"north": tmp_path}, test=None, folder=tmp_path, run="r")
    engine.send({"north": Train("m", 1, 0, 1, 1, {}, False)}, deadline_s=0.1)
    assert list(engine.replies()) == [("north", SiteTimeout(0.1))]
    engine.send({"north": Snapshot("m", 1)})  # nobody waits for this without end
    assert list(engine.replies()) == [("north", SiteLost())]
    engine.close()


def test_a_call_that_was_given_up_before_it_was_read_does_not_end_its_worker(tmp_path: Path) -> None:
    ours, theirs = Pipe()
    settings = Settings("north", "site", {}, None, tmp_path / "north", tmp_path, 1, "cpu")
    thread = threading.Thread(target=_workers._serve, args=(theirs, [settings], "r", {"north": 0}))
    thread.start()
    call = {"site": "north", "envelope": {"run": "r", "epoch": 0, "sequence": 1}, "deadline_s": None}
    ours.send_bytes(json.dumps(call | {"request": str(tmp_path / "gone"), "reply": str(tmp_path / "no")}).encode())
    assert [json.loads(ours.recv_bytes())["event"] for _ in range(2)] == ["started", "done"]
    ours.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_killed_runs_worker_cannot_write_into_the_next_ones_spool(tmp_path: Path) -> None:
    connect = {"sites": {"north": tmp_path}, "test": None, "folder": tmp_path, "run": "r"}
    calls = []
    for _ in range(2):
        engine: Any = simulation.connect(**connect)
        engine.send({"north": Snapshot("m", 1)})
        calls.append(engine._pending["north"].call.reply)  # the first engine is never closed: it was killed
    assert not calls[0].parent.exists()
    assert calls[1].parent.exists()


def test_the_pool_has_no_sites_deadline(small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`centralized_long` takes in a round what all sites take together."""
    deadlines: dict[str, float | None] = {}
    send = simulation.Simulation.send

    def recording(self: Any, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        deadlines.update({s: deadline_s for s, r in requests.items() if isinstance(r, Train)})
        send(self, requests, deadline_s=deadline_s)

    monkeypatch.setattr(simulation.Simulation, "send", recording)
    changes = {"protocol__rounds": 1, "protocol__steps": 1, "protocol__compare": ["centralized"]}
    run(small_study(sites=("south", "west"), test=False, protocol__round_seconds=600.0, **changes), tmp_path / "run")
    assert deadlines == {"south": 600.0, "west": 600.0, "pooled": None}


# ------------------------------------------------------------------------------------------------------ one site by itself


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(
        Settings("north", "site", {}, None, tmp_path / "sites" / "north", tmp_path / "cache", 1, "cpu"),
        run="r", epoch=0,
    )  # fmt: skip


def ask(site: Site, request: Request, sequence: int = 1) -> Any:
    return wire.unpack(site.handle(wire.pack(request), Envelope("r", 0, sequence), lambda: False))


@pytest.mark.parametrize("name", ["..", "../..", "a/b", "", "absolute", "a\\b", "a\n"])
def test_a_model_cannot_be_called_by_a_path(name: str, site: Site, tmp_path: Path) -> None:
    name = str(tmp_path / "x") if name == "absolute" else name
    before = sorted(tmp_path.rglob("*"))
    weights = {"w": torch.ones(1)}
    own = (Keep("m", {}, name), Keep("m", {}, "", name)) if name else ()
    for request in (Forget(name), Keep(name, weights), Restore(name, 0), Snapshot(name, 1), *own):
        reply = ask(site, request)
        assert isinstance(reply, SiteError)
        assert reply.code == "contract"
        site._last = None
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "log.jsonl") == before


@pytest.mark.parametrize("kind", [OSError, RuntimeError, MemoryError, DataError, KeyError, SystemExit])
def test_names_and_codes_from_outside_do_not_leave(
    kind: type[BaseException], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = type("Patient4711", (kind,), {"__module__": "hospital"})
    error = outside("out of memory", code="patient-4711") if kind is DataError else outside("out of memory")

    def fails(*_: object) -> Reply:
        raise error

    monkeypatch.setattr(Site, "answer", fails)
    reply = ask(site, Forget("m"))
    assert isinstance(reply, SiteError)
    assert reply.exception == kind.__name__
    assert "4711" not in repr(reply)


def test_every_code_in_the_source_is_in_the_list() -> None:
    source = Path(concilium.site.__file__).parent
    used = {code for path in source.rglob("*.py") for code in re.findall(r'code="(\w+)"', path.read_text())}
    assert used
    assert used <= CODES


def test_a_reference_is_never_used_twice(site: Site, tmp_path: Path) -> None:
    """The log of a site goes on after a restart: an old entry must not pass for the new failure's words."""
    references = {ask(Site(site.settings, run="r", epoch=0), Forget("..")).reference for _ in range(3)}
    assert len(references) == 3


def test_a_site_that_waits_holds_no_reply_in_memory_and_still_repeats_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([Trained({"w": torch.rand(1000)}, 1, 1, 0.5, 1.0)])
    monkeypatch.setattr(Site, "answer", lambda *_: next(answers))
    request, envelope = wire.pack(Forget("m")), Envelope("r", 0, 7)
    first = site.handle(request, envelope, lambda: False)
    site.park()
    assert not any(isinstance(value, bytes) for value in (site._last or ()))
    assert site.handle(request, envelope, lambda: False) == first


def test_an_older_request_that_arrives_again_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else training would be done twice, unnoticed."""
    answered: list[Request] = []
    answer = Site.answer
    monkeypatch.setattr(Site, "answer", lambda *a: answered.append(a[1]) or answer(*a))
    replies = [ask(site, Restore("m", 0), sequence) for sequence in (1, 2, 1, 2)]
    assert len(answered) == 2
    assert [type(reply) for reply in replies] == [Done, Done, SiteError, Done]


def snapshots(site: Site, *numbers: int) -> Path:
    folder = site.settings.folder / "states" / "m"
    for number in numbers:
        write_tensors(folder / f"{number:06d}.safetensors", {"w": torch.tensor([number])}, {})
    return folder


def test_going_back_leaves_no_snapshot_of_a_round_that_never_was(site: Site) -> None:
    """Else a resumed run whose site misses that round could later go back to it."""
    folder = snapshots(site, 1, 2)
    ask(site, Restore("m", 1))
    assert sorted(p.name for p in folder.iterdir()) == ["000001.safetensors", "working.safetensors"]


def test_snapshots_need_no_hard_links(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshots(site, 1)

    def refuses(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuses)
    ask(site, Restore("m", 1), 1)
    ask(site, Snapshot("m", 2), 2)
    for name in ("000001", "000002", "working"):
        assert load_file(folder / f"{name}.safetensors")["w"].item() == 1


def test_weights_that_a_last_step_ruined_are_a_failure_and_not_kept(
    small_study: Make, fuse: str, tmp_path: Path
) -> None:
    study = small_study(
        local_update__name="faults:ruins", local_update__fuse=fuse, protocol__name="local", protocol__steps=1,
        sites=("north",), test=False,
    )  # fmt: skip
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 4
    assert "not_finite" in lines(tmp_path / "run")[0]["failures"]["north"]["text"]
    kept = load_file(tmp_path / "run" / "sites" / "north" / "models" / "local.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())


# ------------------------------------------------------------------------------------------------------------ resumption


def stop_after(number: int) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == number:
            raise KeyboardInterrupt

    return stop


def test_a_run_does_not_go_on_with_other_data(small_study: Make, phantom: Path, tmp_path: Path) -> None:
    data = shutil.copytree(phantom, tmp_path / "data")
    study = small_study(sites=("north", "south"), data=data, test=False)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop_after(1))
    plans = (tmp_path / "run" / "plans.json").read_bytes()
    first, second = (sorted((data / "north" / kind).iterdir())[0] for kind in ("imagesTr", "labelsTr"))
    for path in (first, second):
        path.rename(tmp_path / path.name)
    with pytest.raises(DataError, match=r"would change.*--out"):
        run(study, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "plans.json").read_bytes() == plans
    for path in (first, second):
        (tmp_path / path.name).rename(path)
    assert run(study, tmp_path / "run", resume=True).exit_code == 0


def test_scores_that_failed_are_made_on_resumption(
    small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small_study(protocol__rounds=1, protocol__steps=1, protocol__compare=["local"], sites=("south", "west"))

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(concilium.site, "evaluate", fails)
        assert run(study, tmp_path / "run").results["cases"] == []
    outcome = run(study, tmp_path / "run", resume=True)
    assert outcome.exit_code == 0
    assert {c["model"] for c in outcome.results["cases"]} == {"federated", "local:south", "local:west"}
    assert list((tmp_path / "run").glob("sites/*/states/*")) == []  # forgotten once there are scores


def test_a_site_that_was_not_there_in_the_beginning_is_remembered(
    small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small_study(protocol__steps=1, test=False)
    prepare = concilium.site.prepare

    def fails(settings: Settings, *rest: Any) -> Any:
        if settings.name == "west":
            raise RuntimeError
        return prepare(settings, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(concilium.site, "prepare", fails)
        with pytest.raises(KeyboardInterrupt):
            run(study, tmp_path / "run", watch=stop_after(1))
    outcome = run(study, tmp_path / "run", resume=True)
    assert set(lines(tmp_path / "run")[1]["sites"]) == {"north", "south", "west"}
    assert outcome.exit_code == 4
    assert outcome.results["problems"] == ["federated, round 1: west: not_prepared (EngineError)"]


# ----------------------------------------------------------------------------------------------- studies and their record


def test_a_case_of_the_test_set_is_excluded_once_and_there(small_study: Make, tmp_path: Path) -> None:
    record = Record(tmp_path, small_study(), resume=False)
    for site in ("north", "south", "test"):
        record.write_json(f"sites/{site}/excluded.json", {"test/t1": ["unreadable", "t1 cannot be read"]})
    assert record.excluded(["north", "south", "test"]) == [
        {"site": "test", "case": "t1", "reason": "unreadable", "text": "t1 cannot be read", "count": 1}
    ]


def test_two_processes_do_not_share_a_run_folder(small_study: Make, tmp_path: Path) -> None:
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    held = [sys.executable, "-c", script, str(tmp_path / "lock")]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StudyError, match="in use by another process"):
            Record(tmp_path, small_study(), resume=True)
        other.kill()
    Record(tmp_path, small_study(), resume=True)


def test_other_versions_on_resumption_are_told(small_study: Make, tmp_path: Path) -> None:
    assert Record(tmp_path, small_study(), resume=False).changes == []
    environment = json.loads((tmp_path / "environment.json").read_text())
    environment["sessions"][0]["packages"]["torch"] = "1.0"
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    (change,) = Record(tmp_path, small_study(), resume=True).changes
    assert change.startswith("The run began with torch 1.0 and went on with 2")


def test_a_held_out_set_is_nobodys_training_set(small_study: Make, phantom: Path) -> None:
    with pytest.raises(StudyError, match=r"\[sites\.south\] too"):
        small_study(test__data=str(phantom / "north" / ".." / "south"))


def test_sites_are_told_apart_on_every_disk(small_study: Make, phantom: Path, tmp_path: Path) -> None:
    data = shutil.copytree(phantom, tmp_path / "data")
    shutil.copytree(phantom / "south", data / "North", dirs_exist_ok=True)
    with pytest.raises(StudyError, match=r"\[sites\.north\] is also written \[sites\.North\]"):
        small_study(sites=("north", "North"), data=data)
