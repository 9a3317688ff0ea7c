"""Whether time and memory of a round grow with the number of sites, where ten of them take part in each.

    python benchmarks/many_sites.py --sites 10 30 100

Every number of sites is a study of its own, run by a process of its own: the network, batch, optimiser and precision of
studies/hippocampus.toml, two workers, and sites with two small cases of the phantom each. Ten sites are drawn for each round
(`[protocol] participation`). In one round a site is held up for longer than `round_seconds`: it is timed out and recorded, the
run goes on and ends with exit code 4. Nothing is left out: reading, planning, preparing and scoring all sites are part of the
run, and told apart.

Memory is the highest resident memory of the server's process and of the larger worker in the whole run; and what the server's was
when it had planned, before it prepared the sites.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from concilium.data.patches import Batch
from concilium.data.phantom import PhantomSite, write_phantom
from concilium.line import Event, run
from concilium.local_updates import Local
from concilium.local_updates.plain import step as plain
from concilium.messages import PlugIn
from concilium.study import Study, parse_study, read_study

PER_ROUND, WORKERS = 10, 2
FOLDER = Path(__file__).resolve().parent


def held_up(local: Local, batch: Batch, *, fuse: str, seconds: float) -> Tensor:
    """A local update: plain, but the first step that finds the fuse takes so long."""
    loss = plain(local, batch)
    with suppress(FileNotFoundError):
        Path(fuse).unlink()
        time.sleep(seconds)
    return loss


# ------------------------------------------------------------------------------------------------------------- the study


def many(
    base: Study, n_sites: int, data: Path, *, rounds: int, steps: int, round_seconds: float, width: int | None = None
) -> Study:
    """The study with so many sites of the phantom in place of its own, ten of which take part in a round."""
    sites = [PhantomSite(f"site{i:03d}", 2, spacing=(1.0, 1.0, 1.0)) for i in range(n_sites)]
    write_phantom(data, sites=sites, n_test=0)
    t = base.training
    update = {"name": "many_sites:held_up", "fuse": str(data / "fuse"), "seconds": 1.2 * round_seconds}
    study = parse_study(
        {
            "study": {"name": "many"},
            "sites": {site.name: {"data": site.name} for site in sites},
            "protocol": {
                "rounds": rounds, "steps": steps, "round_seconds": round_seconds,
                "participation": min(1.0, PER_ROUND / n_sites),
            },
            "training": {"patch_size": [40, 56, 40] if t.patch_size is None else list(t.patch_size), "batch_size": t.batch_size},
            "validation": {"folds": 2},
            "local_update": update,
            "engine": {"workers": WORKERS, "threads": 1, "pictures": False},
        },
        folder=data,
    )  # fmt: skip
    own = replace(t, patch_size=study.training.patch_size, loader_workers=0)
    network = PlugIn(base.network.name, {**base.network.options, **({"base_features": width} if width else {})})
    return replace(study, training=own, network=network)


# -------------------------------------------------------------------------------------------------------------- measuring


def resident_mb(process: int | str = "self", *, highest: bool) -> float:
    """Resident memory [MB] of a process, now or at its highest so far; 0 where it is gone or the system does not tell."""
    key = "VmHWM:" if highest else "VmRSS:"
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
    return 0.0


def busiest(asked: Sequence[str], sites: Sequence[str]) -> int:
    """How many of those that are asked the busier worker has: site number i is the business of worker i modulo 2."""
    first = sum(sites.index(site) % WORKERS == 0 for site in asked)
    return max(first, len(asked) - first)


def measure(study: Study, folder: Path, *, straggler: int) -> dict[str, Any]:
    """Run the study; in round `straggler` a site is held up."""
    fuse = Path(str(study.local_update.options["fuse"]))
    seen: dict[str, float] = {}
    began = time.perf_counter()

    def watch(event: Event) -> None:
        if event.kind == "stage" and event.text.startswith("Planned"):
            seen["before_mb"] = resident_mb(highest=False)
        if event.kind == "round":
            if event.round == straggler - 1:
                fuse.touch()
            seen["workers_mb"] = max(resident_mb(p.pid or 0, highest=True) for p in multiprocessing.active_children())
            seen["trained"] = time.perf_counter()

    outcome = run(study, folder / "run", watch=watch)
    ended = time.perf_counter()
    lines = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    ordinary = [line for line in lines if line["round"] != straggler]
    others = [line["seconds"] for line in ordinary]
    return {
        "sites": len(study.sites),
        "asked": [len(line["asked"]) for line in lines],
        "round_s": others,
        "turn_s": [line["seconds"] / busiest(line["asked"], list(study.sites)) for line in ordinary],
        "straggler_s": lines[straggler - 1]["seconds"],
        "failures": {str(line["round"]): line["failures"] for line in lines if line["failures"]},
        "exit_code": outcome.exit_code,
        "training_s": sum(line["seconds"] for line in lines),
        "before_s": seen["trained"] - began - sum(line["seconds"] for line in lines),
        "after_s": ended - seen["trained"],
        "server_before_mb": seen["before_mb"],
        "server_peak_mb": resident_mb(highest=True),
        "worker_peak_mb": seen["workers_mb"],
        "parameters": outcome.results["models"][0]["parameters"],
        "cases_scored": len({(c["site"], c["case"]) for c in outcome.results["cases"]}),
    }


# ------------------------------------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, and write it as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=FOLDER.parent / "studies" / "hippocampus.toml")
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--rounds", type=int, default=5, help="the third has a straggler (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=2, help="optimiser steps per site and round (default: %(default)s)"
    )
    parser.add_argument("--round-seconds", type=float, default=20.0, help="deadline of a site (default: %(default)s)")
    parser.add_argument(
        "--base-features", type=int, help="width of the network (default: the study's; nnU-Net's own is 32)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    several = len(options.sites) > 1
    figures = [(_in_its_own_process if several else _alone)(options, n) for n in sorted(options.sites)]
    print("\n".join(_lines(figures)))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def _alone(options: argparse.Namespace, n_sites: int) -> dict[str, Any]:
    if str(FOLDER) not in sys.path:  # where the workers find `held_up`
        sys.path.insert(0, str(FOLDER))
    with tempfile.TemporaryDirectory() as name:
        base = read_study(options.study, check_data=False)
        study = many(
            base,
            n_sites,
            Path(name) / "data",
            rounds=options.rounds,
            steps=options.steps,
            round_seconds=options.round_seconds,
            width=options.base_features,
        )
        return measure(study, Path(name), straggler=3)


def _in_its_own_process(options: argparse.Namespace, n_sites: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "figures.json"
        given = {
            "study": options.study, "sites": n_sites, "rounds": options.rounds, "steps": options.steps,
            "round-seconds": options.round_seconds, "base-features": options.base_features, "out": out,
        }  # fmt: skip
        told = (text for k, v in given.items() if v is not None for text in (f"--{k}", str(v)))
        command = [sys.executable, __file__, *told]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (figures,) = json.loads(out.read_text(encoding="utf-8"))
        return dict(figures)


def _lines(figures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"{figures[0]['parameters']:,} parameters. Round: median, highest. Turn: a round over the sites of the busier worker."
    yield (
        "\nsites   asked   round [s]      turn [s]   straggler [s]   server: before, peak [MB]   worker: peak [MB]   "
        "before, after [s]   exit"
    )
    for f in figures:
        times, asked = f["round_s"], sorted(set(f["asked"]))
        yield (
            f"{f['sites']:5d}   {'/'.join(map(str, asked)):>5}   {statistics.median(times):5.1f}, {max(times):5.1f}   "
            f"{statistics.median(f['turn_s']):8.2f}   {f['straggler_s']:13.1f}   "
            f"{f['server_before_mb']:14.0f}, {f['server_peak_mb']:9.0f}   "
            f"{f['worker_peak_mb']:17.0f}   {f['before_s']:8.1f}, {f['after_s']:7.1f}   {f['exit_code']}"
        )
        for number, failed in f["failures"].items():
            yield f"        round {number}: " + "; ".join(f"{site}: {told['text']}" for site, told in failed.items())


if __name__ == "__main__":
    main()
