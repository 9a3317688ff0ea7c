"""What real connections cost: rounds of one study in a simulation, and the same between processes that a kit has joined.

    python benchmarks/loopback.py --study studies/splitfed-hippocampus.toml --site north

One site, `splitfed` and `federated`, with the study's network, batch and precision: by `concilium run`, and by `concilium
provision`, `join` and `serve` over FLARE and mutual TLS on this machine's loopback, one after the other. Both train the same
batches, to the same bits, which is checked; what differs is the way. Figures are median seconds of a step, over rounds but the
first.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from safetensors.torch import load_file

from concilium.study import Study, read_study, to_toml

PATIENCE_S = 600.0
PROTOCOLS = ("splitfed", "federated")


def tables(study: Study, site: str, protocol: str, *, rounds: int, steps: int, engine: str) -> dict[str, Any]:
    """The study for one site, with this protocol and no baselines."""
    one = replace(study, sites={site: study.sites[site]}, test=None, variants={})
    found: dict[str, Any] = tomllib.loads(to_toml(one))
    options = {"cut": "deep"} if protocol == "splitfed" else {}
    found["protocol"] = {"name": protocol, "rounds": rounds, "steps": steps, "min_sites": 1} | options
    found["engine"] |= {
        "name": engine,
        "workers": 1,
        "threads": 1,
    }  # as a site's own settings say, unless it says otherwise
    if engine == "flare":
        del found["sites"][site]["data"]
    return found


def simulated(study: Mapping[str, Any], folder: Path) -> Path:
    """Run it on this machine; the run folder."""
    path = folder / "study.toml"
    path.write_text(tomli_w.dumps(dict(study)), encoding="utf-8")
    _concilium(folder, "run", path, "--out", folder / "run").wait(PATIENCE_S)
    return folder / "run"


def joined(study: Mapping[str, Any], folder: Path, site: str, data: Path) -> Path:
    """Run it between a server and a site, each a process of its own; the run folder."""
    path, kits = folder / "study.toml", folder / "kits"
    path.write_text(tomli_w.dumps(dict(study)), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = ("--port", one.getsockname()[1], "--message-port", other.getsockname()[1])
    made = _concilium(folder, "provision", path, "--out", kits, "--host", "127.0.0.1", *ports)
    if made.wait(PATIENCE_S):
        raise RuntimeError(f"Kits could not be made: {(folder / 'log').read_text()}")
    with _running(_concilium(folder, "join", kits / site, "--data", data, "--folder", folder / "private", "--split")):
        served = _concilium(folder, "serve", kits / "server", path, "--out", folder / "run")
        with _running(served):
            served.wait(PATIENCE_S)
    return folder / "run"


def _concilium(folder: Path, *arguments: object) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "concilium", *map(str, arguments)], stdout=log, stderr=log)


@contextmanager
def _running(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the process, and what it has started, in the end."""
    try:
        yield
    finally:
        try:
            parent = psutil.Process(process.pid)
            members = [*parent.children(recursive=True), parent]
        except psutil.NoSuchProcess:
            members = []
        for member in members:
            member.kill()
        process.wait(PATIENCE_S)


def figures(run: Path, protocol: str, steps: int) -> dict[str, float]:
    """Median seconds of a step, over rounds but the first, and the bytes of a round."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    ours = [line for line in lines if line["model"] == protocol][1:]
    (site,) = ours[-1]["sites"].values()
    seconds = statistics.median(line["seconds"] for line in ours) / steps
    return {"step_s": seconds, "up": site["bytes_up"], "down": site["bytes_down"]}


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights."""
    a, b = (load_file(next((run / "weights").glob("*.safetensors"))) for run in (one, other))
    return a.keys() == b.keys() and all(bool((a[n] == t).all()) for n, t in b.items())


def measure(study: Study, site: str, *, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Figures of both ways for each protocol."""
    data = study.sites[site].data
    if data is None:
        raise SystemExit(f"The study does not say where the data of {site} lie. Give one that does.")
    found = []
    for protocol in PROTOCOLS:
        with tempfile.TemporaryDirectory() as name:
            runs = {}
            for way, engine in (("simulation", "simulation"), ("loopback", "flare")):
                folder = Path(name) / way
                folder.mkdir()
                told = tables(study, site, protocol, rounds=rounds, steps=steps, engine=engine)
                began = time.monotonic()
                runs[way] = simulated(told, folder) if way == "simulation" else joined(told, folder, site, data)
                print(f"{protocol}, {way}: {time.monotonic() - began:.0f} s in all", flush=True)
            each = {way: figures(run, protocol, steps) for way, run in runs.items()}
            found.append({"protocol": protocol, "same_bits": same_bits(*runs.values()), **each})
    return found


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--site", required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args(arguments)
    found = measure(read_study(given.study), given.site, rounds=given.rounds, steps=given.steps)
    print(
        "| protocol | a step simulated, over loopback [s] | ratio | MB up, down a round | same bits |\n|---|---|---|---|---|"
    )
    for f in found:
        one, other = f["simulation"], f["loopback"]
        print(
            f"| `{f['protocol']}` | {one['step_s']:.3f}, {other['step_s']:.3f} | {other['step_s'] / one['step_s']:.2f} | "
            f"{other['up'] / 1e6:.1f}, {other['down'] / 1e6:.1f} | {'yes' if f['same_bits'] else 'no'} |"
        )
    return found


if __name__ == "__main__":
    main()
