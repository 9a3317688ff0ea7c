"""What maps and gradients of split training lose as they travel as float16, bfloat16 or int8, and what they then weigh.

    python benchmarks/transport.py                                                  # the phantom of `concilium demo`
    python benchmarks/transport.py --study studies/hippocampus.toml --cut shallow

One site trains for `--rounds` rounds with all bits; what crossed the cuts in the first and in the last step is then encoded and
decoded as each kind. Errors are those of a channel: its largest error over its largest value, of which the worst channel counts,
and the root of the mean squared error over the root mean square of the values. "Lost" are values that were not 0 and arrived as
0; "float16 as it is" has no scale.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concilium import catalog
from concilium.aggregation import weight_of
from concilium.beginning import initial_weights
from concilium.demo import demo_study
from concilium.engines import Engine
from concilium.engines.simulation import connect
from concilium.forecast import split_bytes
from concilium.messages import Failure, Finish, Front, Gradients, Maps, Reply, Request, Tail
from concilium.preparation import Ledger, ask_sites, network_of, plan_for, prepare_sites
from concilium.protocols import start_with
from concilium.record import Record
from concilium.schedule import settings
from concilium.study import Study, read_study, training_of
from concilium.transport import KINDS, decode, encode

Crossed = dict[str, list[tuple[Tensor, ...]]]
WAYS = ("maps up", "maps down", "gradients up", "gradients down")
BARE = "float16 as it is"


class Watching:
    """An engine that keeps what crosses the cuts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.sites, self.traffic = engine.sites, engine.traffic
        self.crossed: Crossed = {way: [] for way in WAYS}

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        for request in requests.values():
            if isinstance(request, Tail):
                self._keep("maps down", request.maps)
            elif isinstance(request, Front | Finish):
                self._keep("gradients down", request.gradients)
        self._engine.send(requests, deadline_s=deadline_s)

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        for site, reply in self._engine.replies():
            if isinstance(reply, Maps):
                self._keep("maps up", reply.maps)
            elif isinstance(reply, Gradients):
                self._keep("gradients up", reply.gradients)
            yield site, reply

    def cancel(self, sites: Iterable[str]) -> None:
        self._engine.cancel(sites)

    def _keep(self, way: str, tensors: tuple[Tensor, ...]) -> None:
        if tensors:
            kept = self.crossed[way]
            kept[1:] = [tuple(t.detach().cpu().clone() for t in tensors)]  # of the first step and of the last one


def measure(study: Study, folder: Path, *, cut: tuple[str, ...], rounds: int, steps: int) -> dict[str, Any]:
    """Rows of errors, for each way, step and kind, and the bytes of a step for each kind."""
    torch.set_num_threads(study.engine.threads)
    site = next(iter(study.sites))
    record = Record(folder, study, resume=False)
    e = study.engine
    engine = connect(
        sites={name: s.data for name, s in study.sites.items()},
        test=None,
        folder=folder,
        run=record.run_id,
        threads=e.threads,
        device=e.device,
        cache=e.cache,
    )
    try:
        (setting,) = settings(study)[0]
        plans = plan_for(setting, ask_sites(study, engine, record, Ledger()), record, Ledger())
        prepare_sites(setting, engine, record, plans, Ledger())
        watching, network = Watching(engine), network_of(study, plans)
        supplied: dict[str, Any] = {
            "collect": partial(catalog.load("collect", "plain"), weigh=weight_of("mean")),
            "rule": partial(catalog.load("aggregation", "mean")),
            "weigh": weight_of("mean"),
            "rounds": rounds,
            "steps": {site: steps},
            "min_sites": 1,
            "deadline_s": None,
            "network": network,
            "training": training_of(study),
            "seed": study.study.seed,
            "device": torch.device("cpu"),
        }
        start = start_with(initial_weights(study, plans))
        for _ in catalog.load("protocols", "splitfed")(watching, start, model="split", cut=cut, **supplied):
            pass
        forecast = partial(
            split_bytes,
            network,
            cut,
            batch=(plans.batch_size, len(plans.channels), *plans.patch_size),
            precision=study.training.precision,
        )
        weight = {kind: (f.step_up, f.step_down) for kind in KINDS for f in [forecast(transport=kind)]}
    finally:
        engine.close()
        record.close()
    return {"errors": rows(watching.crossed), "bytes": weight}


def rows(crossed: Crossed) -> list[dict[str, Any]]:
    """The errors of every kind on what crossed."""
    return [
        {"way": way, "step": step, "kind": kind, "largest": max(float(m.abs().max()) for m in maps)}
        | errors(maps, kind)
        for way in WAYS
        for step, sent in zip(("first", "last"), crossed[way], strict=True)
        for maps in [[m.float() for m in sent if m.is_floating_point() and m.numel()]]
        for kind in (*KINDS[1:], BARE)
    ]


def errors(maps: Sequence[Tensor], kind: str) -> dict[str, float]:
    """Of maps (B, C, *spatial): the worst channel's largest error, the error in the mean square, and the share of values lost."""
    came = [m.half().float() for m in maps] if kind == BARE else decode(encode(maps, kind), kind, dtype=torch.float32)
    worst, lost, there, squared, of = 0.0, 0, 0, 0.0, 0.0
    for m, c in zip(maps, came, strict=True):
        off, largest = (t.abs().transpose(0, 1).flatten(1).amax(1) for t in (m - c, m))
        worst = max(worst, float((off / largest.where(largest > 0, 1)).max()))
        lost += int(((m != 0) & (c == 0)).sum())
        there += int((m != 0).sum())
        squared, of = squared + float((m - c).double().square().sum()), of + float(m.double().square().sum())
    return {"worst": worst, "squared": (squared / of) ** 0.5 if of else 0.0, "lost": lost / max(there, 1)}


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, help="Study file; omitted: the phantom of `concilium demo`.")
    parser.add_argument("--cut", default="deep", help="shallow, deep, or two stages with a comma between.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Write every figure as JSON.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = read_study(given.study) if given.study else demo_study(Path(folder) / "phantom")
        study = replace(study, engine=replace(study.engine, threads=given.threads, workers=1, device="cpu"))
        cut = tuple(given.cut.split(","))
        found = measure(study, Path(folder) / "run", cut=cut, rounds=given.rounds, steps=given.steps)
    print("| what | step | largest value | kind | worst channel | mean square | lost |\n|---|---|---|---|---|---|---|")
    for row in found["errors"]:
        print(
            f"| {row['way']} | {row['step']} | {row['largest']:.2g} | {row['kind']} | {row['worst']:.1e} | "
            f"{row['squared']:.1e} | {100 * row['lost']:.1f} % |"
        )
    whole = sum(found["bytes"]["float32"])
    for kind, (up, down) in found["bytes"].items():
        print(f"{kind}: {up} bytes up and {down} down a step; of float32 {(up + down) / whole:.4f}")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
