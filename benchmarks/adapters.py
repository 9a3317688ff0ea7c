"""Adapters of a large network, trained in a federation and in one place: the same network, starting weights, cases and folds.

    python benchmarks/adapters.py studies/fedsam-polyps.toml --seeds 3 --out runs/adapters-polyps

A study has one kind of `centralized`, of its own network. Here each variant that is named becomes a study of its own, without
left-out sites, so that each has its own: `centralized` takes as many steps in sequence as a site does, `centralized_long` as many
as all sites together. Differences are paired by patient, with 95 % intervals. A run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import concilium

VARIANTS = ("msa", "lora")
PLACES = ("centralized", "centralized_long")


def alone(study: Mapping[str, Any], variant: str, folder: Path) -> dict[str, Any]:
    """The tables of a study of this variant alone, with paths from anywhere.

    Raises:
        KeyError: there is no such variant.
    """
    tables = {name: dict(table) for name, table in study.items() if name != "variants"}
    for name, changes in study["variants"][variant].items():
        tables[name] = tables.get(name, {}) | changes
    tables["study"] |= {"name": f"{study['study']['name']}-{variant}"}
    tables["sites"] = {n: site | {"data": str((folder / site["data"]).resolve())} for n, site in study["sites"].items()}
    tables["test"]["data"] = str((folder / tables["test"]["data"]).resolve())
    if tables["network"].get("weights"):
        tables["network"]["weights"] = str((folder / tables["network"]["weights"]).resolve())
    tables["protocol"] |= {"compare": ["centralized"]}
    tables["protocol"].pop("min_sites", None)
    tables.get("validation", {}).pop("leave_one_site_out", None)
    return tables


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run each variant, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    study = tomllib.loads(given.study.read_text(encoding="utf-8"))
    lines = ["| variant | trained | test Dice | federated − this |", "|---|---|---|---|"]
    for variant in given.variants:
        out = given.out / variant
        done = concilium.run(alone(study, variant, given.study.parent), out, resume=out.exists(), seeds=given.seeds)
        if not done.complete:
            raise RuntimeError(f"{variant} is not complete: {done.problems}.")
        for place, (mean, more) in measured(done.results).items():
            lines.append(f"| {variant} | {place} | {mean:.3f} | {more} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
