"""Adapters of a large network, trained in a federation and in one place: the same network, starting weights, cases and folds.

    python benchmarks/adapters.py studies/fedsam-polyps.toml --seeds 3 --out runs/adapters-polyps

A study has one kind of `centralized`, of its own network. Here each variant that is named becomes a study of its own, without
left-out sites, so that each has its own: `centralized` takes as many steps in sequence as a site does, `centralized_long` as many
as all sites together. Differences are paired by patient, with 95 % intervals. A run that was cut off goes on where it was.

    python benchmarks/adapters.py studies/fedsam-polyps.toml --only-steps 15

A step of the study's network and of each variant's, which take turns in one process on random pictures: processor time, which
other work on the machine does not stretch.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import concilium
from concilium.data.patches import Batch
from concilium.freezing import freeze, frozen_names
from concilium.local_updates import Local
from concilium.local_updates.plain import step
from concilium.networks.sam import build, trains
from concilium.study import Study, read_study

VARIANTS = ("msa", "lora")
PLACES = ("centralized", "centralized_long")


def alone(study: Study, variant: str) -> Study:
    """This variant as a study of its own, with the baselines in one place and without left-out sites.

    Raises:
        KeyError: there is no such variant.
    """
    chosen = study.variants[variant]
    return replace(
        chosen,
        study=replace(study.study, name=f"{study.study.name}-{variant}"),
        protocol=replace(chosen.protocol, compare=("centralized",), min_sites=min(2, len(study.sites))),
        validation=replace(study.validation, leave_one_site_out=False),
        variants={},
    )


def measured(results: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Place -> its mean test Dice over patients, and what the federation has more."""
    labels = list(dict.fromkeys(s["label"] for s in results["summary"]))
    label = "foreground_mean" if "foreground_mean" in labels else labels[0]
    wanted = {"metric": "dice", "label": label}
    means = {s["model"]: s["mean"] for s in results["summary"] if s.items() >= (wanted | {"site": "test"}).items()}
    found = {"federated": (means["federated"], "")}
    for c in results["comparisons"]:
        if c.items() >= wanted.items() and "federated" in (c["a"], c["b"]) and {c["a"], c["b"]} & set(PLACES):
            sign, other = (1, c["b"]) if c["a"] == "federated" else (-1, c["a"])
            text = f"{sign * c['difference']:+.3f}"
            if c["ci_low"] is not None:  # below 6 patients there is no interval
                low, high = sorted((sign * c["ci_low"], sign * c["ci_high"]))
                text += f" [{low:+.3f}, {high:+.3f}]"
            found[other] = (means[other], text)
    return found


def seconds_of(study: Mapping[str, Any], variants: Sequence[str], n_steps: int) -> dict[str, float]:
    """Processor time of a step of each network: the median, the first step left out."""
    size, n = study["preprocessing"]["size"], study["training"]["batch_size"]
    plan = {"patch_size": size, "architecture": {"arch_kwargs": {"strides": [[1, 1], [2, 2]]}}}
    batch = Batch(torch.randn(n, 3, *size), (torch.randint(0, 2, (n, 1, *size)).short(),))
    ways = {}
    for name in ("whole", *variants):
        options = dict(study["network"]) | (study["variants"][name]["network"] if name != "whole" else {})
        options = {key: value for key, value in options.items() if key not in ("name", "weights")}
        options["whole_image_blocks"] = tuple(options["whole_image_blocks"])
        network = build(n_channels=3, n_labels=2, plan=plan, **options)
        freeze(network, frozen_names(network, trains(adapt=options.get("adapt", "none")) or ("*",)))
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-4)
        ways[name] = Local(network, optimizer, _loss, lambda: torch.autocast("cpu", torch.bfloat16), {}, 12.0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(n_steps + 1):
        for name, local in ways.items():
            began = time.process_time()
            step(local, batch)
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def _loss(logits: Sequence[Tensor], batch: Batch) -> Tensor:
    return cross_entropy(logits[0], batch.labels[0][:, 0].long())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run each variant, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--only-steps", type=int, help="time so many steps, and train nothing")
    given = parser.parse_args(arguments)
    if given.only_steps:
        torch.set_num_threads(1)
        found = seconds_of(tomllib.loads(given.study.read_text(encoding="utf-8")), given.variants, given.only_steps)
        print("\n".join(f"{name}: {s:.3f} s a step, {s / found['whole']:.2f} of whole" for name, s in found.items()))
        return
    lines = ["| variant | trained | test Dice | federated − this |", "|---|---|---|---|"]
    for variant in given.variants:
        out = given.out / variant
        done = concilium.run(alone(read_study(given.study), variant), out, resume=out.exists(), seeds=given.seeds)
        if not done.complete:
            raise RuntimeError(f"{variant} is not complete: {done.problems}.")
        for place, (mean, more) in measured(done.results).items():
            lines.append(f"| {variant} | {place} | {mean:.3f} | {more} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
