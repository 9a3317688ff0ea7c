"""What splitting costs: a step of split training over the same step of the whole network, and its bytes over those forecast.

    python benchmarks/split_step.py --study studies/hippocampus.toml            # float32, deep split points
    python benchmarks/split_step.py --study studies/hippocampus.toml --cut shallow --precision bfloat16

Both sides run through the same simulation, one site, the same batches, optimiser and threads, in one process, in turn: a round of
`local` (the whole network at the site), a round of `splitfed` (its body at the server, every map packed, sent and unpacked).
Neither sends weights in the rounds that are counted but for those with which split training begins and ends a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from concilium import catalog
from concilium.aggregation import weight_of
from concilium.beginning import initial_weights
from concilium.demo import demo_study
from concilium.engines.simulation import connect
from concilium.forecast import split_bytes
from concilium.preparation import Ledger, ask_sites, network_of, plan_for, prepare_sites
from concilium.protocols import Round, start_with
from concilium.record import Record
from concilium.schedule import settings
from concilium.study import Study, read_study, training_of

TARGET_TIME, TARGET_BYTES = 1.10, 0.02


def measure(study: Study, folder: Path, *, cut: tuple[str, ...], rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of every step (mean over a round) on both sides, in turn, and bytes of the split side beside the forecast."""
    torch.set_num_threads(study.engine.threads)
    site = next(iter(study.sites))
    record = Record(folder, study, resume=False)
    engine = connect(
        sites={name: s.data for name, s in study.sites.items()},
        test=None,
        folder=folder,
        run=record.run_id,
        threads=study.engine.threads,
        device=study.engine.device,
        cache=study.engine.cache,
    )
    try:
        (setting,) = settings(study)[0]
        plans = plan_for(setting, ask_sites(study, engine, record, Ledger()), record, Ledger())
        prepare_sites(setting, engine, record, plans, Ledger())
        supplied: dict[str, Any] = {
            "collect": partial(catalog.load("collect", "plain"), weigh=weight_of("mean")),
            "rule": partial(catalog.load("aggregation", "mean")),
            "rounds": rounds + 1,  # the first warms up
            "steps": {site: steps},
            "min_sites": 1,
            "deadline_s": None,
            "network": network_of(study, plans),
            "training": training_of(study),
            "seed": study.study.seed,
            "device": torch.device("cpu"),
            "weigh": weight_of("mean"),
        }
        start = start_with(initial_weights(study, plans))
        sides: dict[str, Iterator[Round]] = {
            "whole": catalog.load("protocols", "local")(engine, start, model="whole", **supplied),
            "split": catalog.load("protocols", "splitfed")(engine, start, model="split", cut=cut, **supplied),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(rounds + 1):
            for side, protocol in sides.items():
                began = time.perf_counter()
                done = next(protocol)
                if number:
                    seconds[side].append((time.perf_counter() - began) / steps)
                print(f"round {number}, {side}: {(time.perf_counter() - began) / steps:.4f} s a step", flush=True)
        traffic = done.traffic[site]
        network, batch = network_of(study, plans), (plans.batch_size, len(plans.channels), *plans.patch_size)
        up, down = split_bytes(network, cut, batch=batch, precision=study.training.precision).round(steps)
    finally:
        engine.close()
        record.close()
    return {
        "seconds": seconds,
        "ratio": statistics.median(seconds["split"]) / statistics.median(seconds["whole"]),
        "pairs": [s / w for s, w in zip(seconds["split"], seconds["whole"], strict=True)],
        "bytes": {"up": [traffic.up, up], "down": [traffic.down, down]},
    }


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, help="Study file; omitted: the phantom of `concilium demo`.")
    parser.add_argument("--cut", default="deep", help="shallow, deep, or two stages with a comma between.")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Write every figure as JSON.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = read_study(given.study) if given.study else demo_study(Path(folder) / "phantom")
        study = replace(
            study,
            engine=replace(study.engine, threads=given.threads, workers=1, device="cpu"),
            training=replace(study.training, precision=given.precision),
        )
        cut = tuple(given.cut.split(","))
        found = measure(study, Path(folder) / "run", cut=cut, rounds=given.rounds, steps=given.steps)
    low, high = min(found["pairs"]), max(found["pairs"])
    print(f"Time: {found['ratio']:.3f} (pairs {low:.3f} to {high:.3f}); target: at most {TARGET_TIME}")
    for way, (measured, forecast) in found["bytes"].items():
        print(
            f"Bytes {way}: {measured} measured, {forecast} forecast, {measured / forecast:.4f}; target: within {TARGET_BYTES}"
        )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
