"""One site with a third of the memory and a quarter of the speed: what it costs the others to wait for it, or not to.

    python benchmarks/unequal_hardware.py data/hippocampus/north data/hippocampus/south data/hippocampus/west \
        --test data/hippocampus/test

The last site holds two patches of a batch of six (`micro_batch`), and sleeps after each step until four times its time is over.
Three runs of one study: `equal`, all sites alike; `waiting`, that site takes all its steps; `boxed`, rounds end (`time_box`)
when a quarter more time is over than the others need. Dice is the mean over the test set. A simulation takes sites in turn: the
time of a round between hospitals is that of the slowest site, so it is these that are added up; sending weights is not in them.

*Held* is the most that tensors take at once while a step is taken, of the plan's network and batch, whole and in parts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import concilium
from concilium.answers import time_box
from concilium.answers.train import Learner
from concilium.data.patches import Batch
from concilium.local_updates import Local, take

BATCH, PART, SLOWER, LONGER = 6, 2, 4, 1.25
"""Patches in a batch; in a part of it; by what steps of the slow site take longer; how long a box is, in equal rounds."""


# ------------------------------------------------------------------------------------------------------- a slow machine


@contextmanager
def at_sites(slow: str | None, kept: list[tuple[Local, Batch]]) -> Iterator[None]:
    """While this is entered, steps of the site of this name are slow; what the first step of all worked on is kept."""
    begin, now = Learner.begin, [""]

    def begins(self: Learner, *args: Any, site: str, **given: Any) -> Any:
        now[0] = site
        return begin(self, *args, site=site, **given)

    def taken(local: Local, batch: Batch) -> Tensor:
        began = time.monotonic()
        if not kept:
            kept.append((local, batch))
        loss = take(local, batch)
        if now[0] == slow:
            time.sleep((SLOWER - 1) * (time.monotonic() - began))
        return loss

    with mock.patch.object(Learner, "begin", begins), mock.patch("concilium.local_updates.plain.take", taken):
        yield


# --------------------------------------------------------------------------------------------------------------- memory


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakKeyDictionary[Any, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and (storage := t.untyped_storage()) not in self.known:
                self.known[storage] = size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self._gone, size)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


def held(local: Local, batch: Batch, micro_batch: int | None) -> int:
    """The most bytes that a step of the site holds at once, beside weights, gradients, optimiser and batch."""
    part = Local(**{**vars(local), "micro_batch": micro_batch})
    take(part, batch)  # gradients and optimiser are there, of whatever step comes first
    with Alive() as alive:
        take(part, batch)
    return alive.most


# ----------------------------------------------------------------------------------------------------------------- runs


def study(sites: Mapping[str, Path], test: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The study with equal sites."""
    return {
        "study": {"name": "unequal", "seed": given.seed},
        "sites": {name: {"data": str(path.resolve())} for name, path in sites.items()},
        "test": {"data": str(test.resolve())},
        "protocol": {"rounds": given.rounds, "steps": given.steps},
        "network": {"name": "nnunet", "base_features": given.features},
        "training": {"optimizer": "adamw", "batch_size": BATCH, "mirror": False} | (
            {"patch_size": given.patch} if given.patch else {}
        ),
        "engine": {"threads": given.threads, "device": "cpu", "pictures": False},
    }  # fmt: skip


def run(raw: Mapping[str, Any], out: Path, slow: str | None, kept: list[tuple[Local, Batch]]) -> dict[str, Any]:
    """Dice on the test set, seconds as between hospitals, and the part of its steps that each site took."""
    with at_sites(slow, kept):
        done = concilium.run(raw, out)
    if not done.complete:
        raise RuntimeError(f"The run is not complete: {done.problems}.")
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    (model,) = done.results["models"]
    rows = [r for r in done.results["summary"] if r["metric"] == "dice" and r["site"] == "test"]
    means = {r["label"]: r["mean"] for r in rows}
    return {
        "dice": means.get("foreground_mean", next(iter(means.values()))),
        "seconds": sum(max(s["seconds"] for s in line["sites"].values()) for line in lines),
        "rounds": [max(s["seconds"] for s in line["sites"].values()) for line in lines],
        "taken": {site: took["n_steps"] / took["n_asked"] for site, took in model["sites"].items()},
    }


def measure(sites: Mapping[str, Path], test: Path, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The three runs, and what a step holds."""
    raw, slow = study(sites, test, given), list(sites)[-1]
    raw["engine"]["cache"] = str(folder / "cache")
    kept: list[tuple[Local, Batch]] = []
    found = {"equal": run(raw, folder / "equal", None, kept)}
    memory = {str(size): held(*kept[0], size) for size in (BATCH, PART)}
    raw["sites"][slow]["micro_batch"] = PART
    found["waiting"] = run(raw, folder / "waiting", slow, kept)
    box = LONGER * max(found["equal"]["rounds"]) / (1 - time_box.ROOM)
    raw["protocol"] |= {"round_seconds": box, "time_box": True}
    found["boxed"] = run(raw, folder / "boxed", slow, kept)
    return {"runs": found, "held": memory, "slow": slow, "box_s": box}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the figures as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = partial(parser.add_argument, type=int)
    parser.add_argument("sites", type=Path, nargs="+", help="nnU-Net raw folders; the last one is the slow site")
    parser.add_argument("--test", type=Path, required=True, help="raw folder of the held-out cases")
    add("--rounds", default=8, help="(default: %(default)s)")
    add("--steps", default=20, help="in each (default: %(default)s)")
    add("--features", default=8, help="of the first resolution, a quarter of nnU-Net's (default: %(default)s)")
    add("--patch", nargs="+", help="(default: the plan's)")
    add("--seed", default=1, help="(default: %(default)s)")
    add("--threads", default=1, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure({path.name: path for path in given.sites}, given.test, given, Path(folder))
    print("| run | Dice | seconds of all rounds | part of its steps that the slow site took |\n|---|---|---|---|")
    for name, f in found["runs"].items():
        print(f"| {name} | {f['dice']:.4f} | {f['seconds']:.1f} | {f['taken'][found['slow']]:.2f} |")
    whole, part = found["held"][str(BATCH)], found["held"][str(PART)]
    print(
        f"Held in a step: {whole / 1e6:.1f} MB of a batch of {BATCH}, {part / 1e6:.1f} MB in parts of {PART} ({part / whole:.2f})"
    )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
