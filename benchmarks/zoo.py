"""Ten networks trained alone, in one place, federated and split, on three tasks: what each way finds, and what it takes.

    python benchmarks/zoo.py data --out runs/zoo                               # every network, one seed
    python benchmarks/zoo.py data --out runs/zoo --networks unet segnet --seeds 3
    python benchmarks/zoo.py data --out runs/zoo --table                       # of what is there

Tasks: polyps in endoscopy, lesions in dermoscopy, and nuclei in microscopy, which stand in for the blastocysts of MedSegNet10
(Shiranthika et al. 2026, arXiv:2503.20830), since those cannot be had. `data` holds the federations (`data/polyps/norway` and
others). Every picture is resized to 128×128, and every network narrowed so that a step takes a fraction of a second on a core.
Each network and task is a run of its own, which is gone on with where it stopped, and with more seeds. `centralized` takes as
many steps as one site, `centralized_long` as many as all together. Targets, of the means over patients: split training is ahead
of training alone by 3 points of IoU on average, within 2 points of training in one place, and its Dice is 0.92 of that or more
everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import concilium

SITES = {
    "polyps": ("norway", "spain"),
    "skin": ("one", "two", "three"),
    "nuclei": ("brightfield", "fluorescence", "histology"),
}
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "unet": {"base_features": 8},
    "segnet": {"base_features": 8},
    "deeplabv3": {"base_features": 16},
    "deeplabv3plus": {"base_features": 16},
    "refinenet": {"base_features": 8, "refine_features": 32},
    "cgnet": {"base_features": 16},
    "sunet": {"base_features": 8},
    "ducknet": {"base_features": 2},
    "attention_unet": {"base_features": 8},
    "swin_unet": {"base_features": 32, "head_features": 16},
}
"""Narrow enough for a core."""
WAYS = ("local", "centralized", "centralized_long", "federated", "splitfed")
LEAD, WITHIN, RATIO = 0.03, 0.02, 0.92


def study(data: Path, task: str, network: str, *, seeds: int, rounds: int, steps: int) -> dict[str, Any]:
    """One network on one task, in all four ways."""
    return {
        "study": {"name": f"{task}-{network}", "seed": 1, "seeds": seeds},
        "sites": {site: {"data": str(data / task / site)} for site in SITES[task]},
        "test": {"data": str(data / task / "test")},
        "protocol": {
            "name": "splitfed", "variant": "v1", "cut": "deep", "rounds": rounds, "steps": steps,
            "compare": ["local", "centralized"],
        },
        "plan": {"configuration": "2d"},
        "preprocessing": {"name": "resize", "size": [128, 128]},
        "network": {"name": network, **NETWORKS[network]},
        "training": {
            "optimizer": "adamw", "learning_rate": 1e-3, "batch_size": 4, "mirror": False, "precision": "bfloat16",
            "deep_supervision": False,
        },
        "engine": {"threads": 1, "pictures": False},
        "forecast": {"site_gflops": 1.0, "server_gflops": 1.0},  # so that seconds are operations
        "variants": {"federated": {"protocol": {"name": "federated"}}},
    }  # fmt: skip


def train(data: Path, out: Path, tasks: Sequence[str], networks: Sequence[str], **how: int) -> int:
    """Train what is not there yet; how many runs did not end as asked."""
    failed = 0
    for network in networks:
        for task in tasks:
            folder = out / task / network
            made = concilium.run(study(data, task, network, **how), folder, resume=(folder / "study.toml").is_file())
            print(f"{task}, {network}: exit code {made.exit_code}", flush=True)
            failed += made.exit_code != 0
    return failed


# ------------------------------------------------------------------------------------------------------------------ table


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Way -> IoU and Dice of the mean over labels, bytes a site sends, operations of a step at a site, seconds and memory."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    taken = {m["name"]: m for m in results["models"]}
    found = {}
    for way in WAYS:
        of = [s for s in results["summary"] if (s["model"], s["subset"]) == (way, "test")]
        figures = {s["metric"]: s for s in of}  # the tasks have one label each
        sites = taken[way]["sites"].values() if way in taken else ()
        found[way] = {metric: figures.get(metric) for metric in ("iou", "dice")} | {
            "up": fmean(s["bytes_up"] for s in sites),
            "seconds": fmean(s["seconds"] / max(1, s["n_steps"]) for s in sites),
            "operations": _operations(folder, way),
        }
    return found


def _operations(folder: Path, way: str) -> tuple[float, int] | None:
    """Of a step at a site, in 1e9, and the memory of its tensors, where the run forecast them."""
    path = folder / "forecast" / f"{way}.json"
    if not path.is_file():
        return None
    site = next(iter(json.loads(path.read_text(encoding="utf-8"))["sites"].values()))
    return site["seconds"] / site["steps"], site["memory"]


def table(out: Path) -> Iterator[str]:
    """Lines of Markdown: what each way finds, and what it takes; and how the targets are met."""
    found = {f"{p.parent.parent.name} | {p.parent.name}": rows(p.parent) for p in sorted(out.glob("*/*/results.json"))}
    for metric, title in (("iou", "IoU"), ("dice", "Dice")):
        yield f"| {title}: task | network | {' | '.join(WAYS)} |"
        yield "|---" * (2 + len(WAYS)) + "|"
        for name, ways in found.items():
            yield f"| {name} | {' | '.join(_figure(ways[way][metric]) for way in WAYS)} |"
        yield ""
    yield "| task | network | MB sent federated, split | GFLOP a step whole, at site | s a step | MB of tensors |"
    yield "|---" * 6 + "|"
    for name, ways in found.items():
        whole, split = ways["federated"], ways["splitfed"]
        cells = (
            _pair(whole, split, "up", 1e6),
            _both(whole, split, 0),
            _pair(whole, split, "seconds", 1),
            _both(whole, split, 1),
        )
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield from _targets(found)


def _targets(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    means = {
        name: {w: {m: ways[w][m]["mean"] for m in ("iou", "dice")} for w in WAYS if ways[w]["iou"]}
        for name, ways in found.items()
    }
    whole = {name: ways for name, ways in means.items() if len(ways) == len(WAYS)}
    if not whole:
        return
    lead = fmean(ways["splitfed"]["iou"] - ways["local"]["iou"] for ways in whole.values())
    yield f"Split − alone, IoU: {lead:+.3f} on average (target {LEAD:+.2f} or more)."
    for place in ("centralized", "centralized_long"):
        behind = {n: ways[place]["iou"] - ways["splitfed"]["iou"] for n, ways in whole.items()}
        ratio = {n: ways["splitfed"]["dice"] / max(1e-9, ways[place]["dice"]) for n, ways in whole.items()}
        most, least = max(behind, key=behind.__getitem__), min(ratio, key=ratio.__getitem__)
        far, low = sum(b > WITHIN for b in behind.values()), sum(r < RATIO for r in ratio.values())
        yield (
            f"{place} − split, IoU: {fmean(behind.values()):+.3f} on average, {behind[most]:+.3f} at most ({most}; target "
            f"{WITHIN:.2f} or less: {far} of {len(whole)} are not)."
        )
        yield f"Split / {place}, Dice: {ratio[least]:.3f} at least ({least}; target {RATIO} or more: {low} are not)."


def _figure(summary: Mapping[str, Any] | None) -> str:
    if summary is None or summary["mean"] is None:
        return "–"
    ends = "" if summary["ci_low"] is None else f" [{summary['ci_low']:.2f}, {summary['ci_high']:.2f}]"
    return f"{summary['mean']:.3f}{ends}"


def _pair(whole: Mapping[str, Any], split: Mapping[str, Any], key: str, unit: float) -> str:
    return f"{whole[key] / unit:.3g}, {split[key] / unit:.3g}"


def _both(whole: Mapping[str, Any], split: Mapping[str, Any], which: int) -> str:
    told = [of["operations"] for of in (whole, split)]
    unit = (1.0, 1e6)[which]
    return ", ".join("–" if t is None else f"{t[which] / unit:.3g}" for t in told)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or print the table of what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder that holds the federations")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", choices=sorted(SITES), default=list(SITES))
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--table", action="store_true", help="print the table, and train nothing")
    given = parser.parse_args(arguments)
    failed = 0
    if not given.table:
        how = {"seeds": given.seeds, "rounds": given.rounds, "steps": given.steps}
        failed = train(given.data.resolve(), given.out, given.tasks, given.networks, **how)
    sys.stdout.write("\n".join(table(given.out)) + "\n")
    raise SystemExit(4 if failed else 0)


if __name__ == "__main__":
    main()
