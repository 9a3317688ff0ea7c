"""What defences cost and what they are worth: of every model of a run its Dice, and the most that attacks find in what it sends.

Each attack is trained anew against each model, with its defences as it sends. A model is in the Pareto set where no other has as
good a Dice and as little leakage, and one of the two better.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from concilium.attacks import AUDITED
from concilium.defences import described
from concilium.errors import StudyError
from concilium.leakage import Asked, leakage
from concilium.leakage.audit import ALL_CHANNELS
from concilium.statistics import FOREGROUND_MEAN
from concilium.study import Study, read_study

FILE = "price.json"
MEASURES = ("ssim", "dice", "reidentified")
"""What is taken of an audit: the most that any attack finds in any map, of the mean over channels."""


def price(run: Path, *, asked: Asked, watch: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Audit every model of a run that can be: what is written into `leakage/price.json`.

    Raises:
        StudyError: no such run, or no model of it can be audited.
        DataError, EngineError: as in an audit.
    """
    study = read_study(run / "study.toml", check_data=False)
    models = {study.protocol.name: study, **study.variants}
    if asked.model is not None or not (audited := {n: s for n, s in models.items() if s.protocol.name in AUDITED}):
        raise StudyError(
            f"All models of {run} were to be audited: {asked.model or ', '.join(models)}. Allowed: no single model, and "
            f"protocols {', '.join(AUDITED)}. Leave --model out, or choose another run."
        )
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    rows = []
    for name, own in audited.items():
        watch(f"{name}: {_told(own)}")
        found = leakage(run, run / "leakage" / name, asked=replace(asked, model=name), watch=watch)
        rows.append({"model": name, "defended": _told(own), **_dice(results, name), "leaks": _most(found["rows"])})
    of = "prediction" if asked.predicting else "training"
    made = {
        "version": 1,
        "study": study.study.name,
        "of": of,
        "rows": _with_pareto(rows),
        "notes": _falls(audited, rows),
    }
    (run / "leakage" / FILE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


def _told(study: Study) -> str:
    """What stands between a model and those who look."""
    cut = study.protocol.options.get("cut")
    words = [f"cut {cut if isinstance(cut, str) else ' '.join(cut)}"] if cut else []
    kind = study.protocol.options.get("transport", "float32")
    words += [kind] if kind != "float32" else []
    return ", ".join([*words, described(study.defences) or "no defence"])


def _dice(results: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The mean over patients of the held-out set, or where there is none of all validation cases."""
    of = [s for s in results["summary"] if s["model"] == model and s["metric"] == "dice"]
    for subset, site in (("test", "test"), ("validation", "all")):
        there = {s["label"]: s for s in of if (s["subset"], s["site"]) == (subset, site)}
        if there:
            chosen = there.get(FOREGROUND_MEAN, next(iter(there.values())))
            return {"subset": subset, "dice": chosen["mean"], "low": chosen["ci_low"], "high": chosen["ci_high"]}
    return {"subset": "", "dice": None, "low": None, "high": None}


def _most(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Measure -> the most that was found, and what a guess without looking gets there, of the last audited round."""
    last = max((row["round"] for row in rows), default=0)
    several = any(row["channel"] == ALL_CHANNELS and row["metric"] == "ssim" for row in rows)
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        counts = row["metric"] != "ssim" or not several or row["channel"] == ALL_CHANNELS
        is_one = row["metric"] in MEASURES and row["round"] == last and row["attack"] and counts
        if is_one and row["value"] > found.get(row["metric"], {"found": -1.0})["found"]:
            found[row["metric"]] = {"found": row["value"], "naive": row["naive"]}
    return found


def _falls(models: Mapping[str, Study], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each defence of which four models or more differ in one number only: how SSIM goes with it."""
    series: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        study = models[row["model"]]
        for key, value in study.defences[0].options.items() if len(study.defences) == 1 else ():
            others = {k: v for k, v in study.defences[0].options.items() if k != key}
            if isinstance(value, int | float) and not isinstance(value, bool) and "ssim" in row["leaks"]:
                same = repr((study.protocol, study.network, study.training, others))
                series[study.defences[0].name, key, same].append((float(value), row["leaks"]["ssim"]["found"]))
    told = []
    for (name, key, _), points in series.items():
        levels, found = zip(*sorted(points), strict=True)
        if len(set(levels)) > 3:
            rank = float(spearmanr(levels, found).statistic)
            each = ", ".join(f"{level:g}: {value:.2f}" for level, value in zip(levels, found, strict=True))
            told.append(f"{name}, SSIM found by {key}: {each}; Spearman {rank:.2f}.")
    return told


def _with_pareto(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with whether no other is as good in Dice and in SSIM and better in one."""
    points = [(row["dice"], row["leaks"].get("ssim", {}).get("found")) for row in rows]

    def beaten(i: int) -> bool:
        dice, leak = points[i]
        return any(
            d is not None and s is not None and d >= dice and s <= leak and (d, s) != (dice, leak)
            for j, (d, s) in enumerate(points)
            if j != i
        )

    return [{**row, "pareto": None not in points[i] and not beaten(i)} for i, row in enumerate(rows)]
