"""The same study between machines, by the real commands: each site a process of its own, provisioned, over real connections."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from safetensors.torch import load_file

from concilium.data.phantom import write_phantom
from concilium.line import run
from concilium.study import parse_study

pytestmark = pytest.mark.slow
SITES = ("north", "south", "west")
SILENT = "west"
"""Keeps the scores of its cases back."""
LONG_S = 240.0
"""Only against hanging: the machine may be busy."""


def wait_until(condition: Callable[[], Any], what: str, *, seconds: float = LONG_S) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {seconds:.0f} s: {what}")


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process and what it has started."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def stopped_all(processes: list[psutil.Process], *, seconds: float = 40.0) -> list[psutil.Process]:
    """Those that are still there after a while."""
    return psutil.wait_procs(processes, timeout=seconds)[1]


@dataclass
class Federation:
    """Kits, and the commands that run with them."""

    folder: Path
    data: Path
    kits: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    joined: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, log: str, *arguments: object) -> subprocess.Popen[bytes]:
        """`concilium ARGUMENTS`."""
        command = [sys.executable, "-m", "concilium", *map(str, arguments)]
        with (self.folder / log).open("ab") as file:
            self.processes.append(
                subprocess.Popen(
                    command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
                )
            )
        return self.processes[-1]

    def join(self, *sites: str) -> None:
        for site in sites:
            data, private = self.data / site, self.private(site)
            self.joined[site] = self.start(
                f"{site}.log", "join", self.kits / site, "--data", data, "--folder", private, "--split",
                "--no-case-scores" if site == SILENT else "--case-scores",
            )  # fmt: skip

    def private(self, site: str) -> Path:
        return self.folder / "private" / site

    def serve(self, study: Mapping[str, Any], run: str, *options: object) -> subprocess.Popen[bytes]:
        path = self.folder / f"{run}.toml"
        path.write_text(tomli_w.dumps(dict(study)))
        return self.start(
            f"{run}.log", "serve", self.kits / "server", path, "--out", self.folder / run, "--wait", 200, *options
        )

    def said(self, log: str) -> str:
        """What a command has shown, as one line."""
        return " ".join((self.folder / f"{log}.log").read_text(errors="replace").split())

    def rounds(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / run / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def results(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / run / "results.json").read_text())
        return found

    def job_of(self, site: str) -> psutil.Process:
        """The process in which a site answers."""

        def find() -> psutil.Process | None:
            for process in family(self.joined[site])[1:]:
                with suppress(psutil.NoSuchProcess):
                    if any("worker_process" in argument for argument in process.cmdline()):
                        return process
            return None

        return wait_until(find, f"{site} has a process")

    def until_round(self, run: str, number: int, serving: subprocess.Popen[bytes]) -> None:
        """Wait until this round is complete, and the next is under way."""
        wait_until(lambda: len(self.rounds(run)) >= number or serving.poll() is not None, f"round {number}")
        assert serving.poll() is None, self.said(run)
        time.sleep(1.0)

    def kill(self, *processes: subprocess.Popen[bytes]) -> None:
        """End processes and all that they have started, whatever state they are in."""
        members = [member for process in processes for member in family(process)]
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        for process in processes:
            process.wait(LONG_S)
        assert stopped_all(members) == []


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


def study_of(data: Path | None, **changes: Any) -> dict[str, Any]:
    """A study on the phantom; keyword arguments replace whole keys of tables, named table__key."""
    sites: dict[str, Any] = {name: {"data": str(data / name)} if data else {} for name in SITES}
    raw: dict[str, Any] = {
        "study": {"name": "small", "seed": 3},
        "sites": sites,
        "protocol": {"rounds": 2, "steps": 2},
        "network": {"name": "unet", "levels": 3, "base_features": 4},
        "training": {"optimizer": "adamw", "batch_size": 2, "patch_size": [16, 16, 8], "mirror": False},
        "engine": {"name": "simulation" if data else "flare", "threads": 1, "device": "cpu"},
    }
    for name, value in changes.items():
        table, key = name.split("__")
        raw[table][key] = value
    return raw


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all its cases, at half size: from a site of six cases a federation and a simulation end with other bits."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, n_test=3, scale=0.5)
    return folder


@pytest.fixture(scope="module")
def federation(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites that have joined. What a test ends of it, it starts again."""
    folder = tmp_path_factory.mktemp("federation")
    f = Federation(folder, phantom, folder / "kits")
    (folder / "study.toml").write_text(tomli_w.dumps(study_of(None)))
    port, message_port = free_ports()
    made = f.start(
        "provision.log", "provision", folder / "study.toml", "--out", f.kits, "--host", "127.0.0.1", "--port", port,
        "--message-port", message_port,
    )  # fmt: skip
    assert made.wait(LONG_S) == 0, f.said("provision")
    f.join(*SITES)
    yield f
    f.kill(*f.processes)


@pytest.fixture
def serving(federation: Federation) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`serving(study, run, ...)`: `concilium serve`, ended with the test if it has not by itself."""
    served: list[subprocess.Popen[bytes]] = []

    def make(study: Mapping[str, Any], run: str, *options: object) -> subprocess.Popen[bytes]:
        served.append(federation.serve(study, run, *options))
        return served[-1]

    yield make
    for process in served:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            federation.kill(process)


def weights_of(run_folder: Path) -> dict[str, Any]:
    (path,) = (run_folder / "weights").glob("*.safetensors")
    return load_file(path)


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []


def simulated(data: Path, out: Path, **changes: Any) -> Path:
    """The run folder of the same study as a simulation."""
    assert run(parse_study(study_of(data, **changes), folder=data), out).exit_code == 0
    return out


# ------------------------------------------------------------------------------------------------------------- as asked


@pytest.mark.parametrize("protocol", ["federated", pytest.param("splitfed", marks=pytest.mark.exhaustive)])
def test_a_federation_gives_the_bits_of_the_simulation_and_tells_nothing_else(
    protocol: str, federation: Federation, serving: Any, phantom: Path, tmp_path: Path
) -> None:
    process = serving(study_of(None, protocol__name=protocol), protocol)
    here = simulated(phantom, tmp_path / "here", protocol__name=protocol)
    assert process.wait(LONG_S) == 0, federation.said(protocol)
    assert_same_bits(here, federation.folder / protocol)
    results = federation.results(protocol)
    assert results["complete"]
    assert {case["site"] for case in results["cases"]} == set(SITES) - {SILENT}
    assert {row["site"] for row in results["summary"]} == {*SITES, "all"}
    assert any(SILENT in text and "kept back" in text for text in results["warnings"])
    assert all(line["sites"].keys() == set(SITES) for line in federation.rounds(protocol))
    there = federation.folder / protocol
    content = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    assert content
    cases = [path.name.removesuffix("_0000.nii.gz") for s in SITES for path in (phantom / s / "imagesTr").iterdir()]
    assert len(cases) == 23
    secrets = [*cases, str(phantom), str(federation.folder / "private"), "imagesTr", "/labelsTr"]
    for path, text in content.items():
        assert [secret for secret in secrets if secret.encode() in text] == [], path
    for site in SITES:  # each site's own folder knows its own cases, and no other site's
        own = b"".join(path.read_bytes() for path in federation.private(site).rglob("*.json*") if path.is_file())
        assert f"{site}_000".encode() in own
        assert not any(f"{other}_0".encode() in own for other in SITES if other != site)


def test_weights_go_from_site_to_site_past_a_server_that_has_none(
    federation: Federation, serving: Any, phantom: Path, tmp_path: Path
) -> None:
    """With the certificates of real kits. What the server keeps is searched for the bytes of the finished model."""
    process = serving(study_of(None, protocol__name="cyclic"), "cyclic")
    here = simulated(phantom, tmp_path / "here", protocol__name="cyclic")
    assert process.wait(LONG_S) == 0, federation.said("cyclic")
    expected = load_file(here / "sites" / "north" / "models" / "cyclic.safetensors")
    for site in SITES:
        (path,) = federation.private(site).rglob("models/cyclic.safetensors")
        found = load_file(path)
        assert [name for name in expected if not expected[name].equal(found[name])] == []
        assert (federation.kits / site / "startup" / "sealing.key").stat().st_mode & 0o777 == 0o600
    there = b"".join(path.read_bytes() for path in (federation.folder / "cyclic").rglob("*") if path.is_file())
    assert len(there) > 10_000
    assert not any(t.numpy().tobytes()[:64] in there for t in expected.values() if t.numel() >= 64)
    assert {case["site"] for case in federation.results("cyclic")["cases"]} == set(SITES) - {SILENT}


# --------------------------------------------------------------------------------------------------------- what goes wrong

LONGER = {"protocol__rounds": 5, "protocol__steps": 120}


def test_a_site_whose_process_is_killed_is_left_out_and_comes_back(federation: Federation, serving: Any) -> None:
    process = serving(study_of(None, **LONGER | {"protocol__rounds": 10}), "killed")
    federation.until_round("killed", 1, process)
    first = federation.job_of("south")
    first.kill()
    assert process.wait(LONG_S) == 4, federation.said("killed")
    rounds = federation.rounds("killed")
    assert [line["round"] for line in rounds] == list(range(1, 11))
    missed = [line["round"] for line in rounds if line["failures"]]
    assert 1 <= len(missed) < 9
    assert all(line["failures"] in ({}, {"south": {"type": "SiteLost", "text": "lost"}}) for line in rounds)
    assert all({"north", "west"} <= set(line["sites"]) for line in rounds)
    assert "south" in rounds[-1]["sites"], "it has not come back"
    results = federation.results("killed")
    assert not results["complete"]
    assert f"federated, round {missed[0]}: south: lost" in results["problems"]
    assert {case["site"] for case in results["cases"]} == set(SITES) - {SILENT}


def test_a_site_that_stops_answering_ends_its_round_by_the_deadline(federation: Federation, serving: Any) -> None:
    process = serving(study_of(None, protocol__rounds=2, protocol__steps=60, protocol__round_seconds=40.0), "stopped")
    federation.until_round("stopped", 1, process)
    job = federation.job_of("west")
    job.suspend()
    try:
        # after the deadline, and once the silence has told that it is lost
        assert process.wait(LONG_S + 200) == 4, federation.said("stopped")
    finally:
        with suppress(psutil.NoSuchProcess):  # the end of the study may have ended it
            job.resume()
    rounds = federation.rounds("stopped")
    assert len(rounds) == 2
    assert rounds[1]["failures"]["west"]["type"] in ("SiteTimeout", "SiteLost")
    assert set(rounds[1]["sites"]) == {"north", "south"}
    assert any("west" in problem for problem in federation.results("stopped")["problems"])


def test_a_killed_server_goes_on_to_the_same_bits(
    federation: Federation, serving: Any, phantom: Path, tmp_path: Path
) -> None:
    changes = {"protocol__rounds": 3, "protocol__steps": 60}
    process = serving(study_of(None, **changes), "resumed")
    federation.until_round("resumed", 1, process)
    own = family(process)
    process.kill()
    process.wait(LONG_S)
    assert stopped_all(own[1:]) == [], "FLARE outlived the server"
    assert len(federation.rounds("resumed")) < 3
    process = serving(study_of(None, **changes), "resumed", "--resume")
    assert process.wait(LONG_S) == 0, federation.said("resumed")
    assert_same_bits(simulated(phantom, tmp_path / "here", **changes), federation.folder / "resumed")


def test_an_interrupted_server_leaves_no_process_behind(federation: Federation, serving: Any) -> None:
    process = serving(study_of(None, **LONGER), "interrupted")
    federation.until_round("interrupted", 1, process)
    own = [*family(process), *(federation.job_of(site) for site in SITES)]
    assert len(own) > 5
    process.send_signal(signal.SIGINT)
    assert process.wait(LONG_S) == 130
    assert stopped_all(own) == []
    assert "concilium serve" in federation.said("interrupted")
    assert "--resume" in federation.said("interrupted")
    assert not federation.results("interrupted")["complete"]
    assert all(joined.poll() is None for joined in federation.joined.values())  # they wait for the next run


@pytest.mark.parametrize("min_sites", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_site_whose_machine_is_gone_is_lost_for_good(min_sites: int, federation: Federation, serving: Any) -> None:
    name = f"gone{min_sites}"
    process = serving(study_of(None, **LONGER | {"protocol__rounds": 3}, protocol__min_sites=min_sites), name)
    federation.until_round(name, 1, process)
    federation.kill(federation.joined["north"])
    try:
        assert process.wait(LONG_S) == 4, federation.said(name)
        rounds = federation.rounds(name)
        if min_sites == 3:
            assert "2 of 3 sites answered" in federation.said(name)
            assert len(rounds) == 1
            assert not federation.results(name)["complete"]
            return
        assert [set(line["sites"]) for line in rounds[1:]] == [{"south", "west"}] * 2
        assert all(line["failures"]["north"]["type"] == "SiteLost" for line in rounds[1:])
        assert {case["site"] for case in federation.results(name)["cases"]} == {"south", "west"} - {SILENT}
    finally:
        federation.join("north")


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive), signal.SIGTERM])
def test_a_site_that_leaves_takes_its_processes_along(how: signal.Signals, federation: Federation) -> None:
    joined = federation.joined["west"]
    wait_until(lambda: len(family(joined)) > 1, "FLARE runs")
    own = family(joined)
    joined.send_signal(how)
    try:
        assert joined.wait(LONG_S) == 130
        assert stopped_all(own) == []
    finally:
        federation.join("west")


def test_nothing_listens_at_a_site(federation: Federation) -> None:
    """Connections go out only; FLARE's own between its processes on one machine stay there."""
    for site in SITES:
        for process in family(federation.joined[site]):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip in ("127.0.0.1", "::1"), (site, process.cmdline())
