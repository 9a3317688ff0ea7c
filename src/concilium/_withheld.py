"""Summaries that hold sites which keep the scores of their cases back, and tell averages over their patients instead.

The interval of such a site is Student's, from mean and deviation (`_resampling.interval` needs the patients themselves). A pool
with such a site in it has a mean and no interval: what was told of the others does not say how that site's patients scatter
beside theirs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from scipy.stats import t as student

from concilium.statistics import ALL_SITES, FOREGROUND_MEAN, MIN_PATIENTS, Scale

Row = Mapping[str, Any]
Place = tuple[str, str, str, str]
"""Model, subset, label, metric."""


def with_averages(
    summary: Sequence[Row], averages: Iterable[Row], metrics: Mapping[str, Scale]
) -> list[dict[str, Any]]:
    """The summary of the cases that were told, with the sites of which averages were told.

    Args:
        averages: a row per model, seed, fold, site, subset, label and metric, as `messages.Average` says it.
    """
    told: dict[tuple[str, str, str, str, str], list[Row]] = defaultdict(list)
    for row in averages:
        label = row["label"] or FOREGROUND_MEAN
        told[row["model"], row["site"], row["subset"], label, row["metric"]].append(row)
    rows = [_of_site(key, found, metrics[key[-1]]) for key, found in told.items()]
    touched = {_place(row) for row in rows}
    named = {r["model"].partition(":")[0] for r in [*summary, *rows] if ":" in r["model"]}

    def is_pool(row: Row) -> bool:
        return row["site"] == ALL_SITES or row["model"] in named

    # a pool of those sites only that told their cases would be taken for that of all
    single = [dict(r) for r in summary if not (is_pool(r) and _place(r) in touched)] + rows
    members: dict[Place, list[Row]] = defaultdict(list)
    for r in single:
        if _place(r) in touched and not is_pool(r):
            members[_place(r)].append(r)
    return [*single, *(pool for place, found in members.items() for pool in _pool(place, found))]


def _place(row: Row) -> Place:
    return row["model"].partition(":")[0], row["subset"], row["label"], row["metric"]


def _of_site(key: tuple[str, str, str, str, str], found: Sequence[Row], scale: Scale) -> dict[str, Any]:
    """The row of a site: the mean over seeds, its interval from the mean deviation, as if patients had one seed."""
    model, site, subset, label, metric = key
    of_seed: dict[Any, list[Row]] = defaultdict(list)
    for row in found:
        of_seed[row["seed"]].append(row)
    seeds = [_over_folds(rows) for rows in of_seed.values()]
    n = min(n for n, _, _ in seeds)
    mean = low = high = None
    if all(m is not None for _, m, _ in seeds):
        mean = fmean(m for _, m, _ in seeds if m is not None)
        half = float(student.ppf(0.975, n - 1)) * fmean(deviation for _, _, deviation in seeds) / math.sqrt(n)
        if n >= MIN_PATIENTS:
            low, high = max(0.0, mean - half), min(scale.highest, mean + half)
    return {
        "model": model, "site": site, "subset": subset, "label": label, "metric": metric,
        "mean": mean, "ci_low": low, "ci_high": high, "n": n,
        "n_cases": max(sum(r["n_cases"] for r in rows) for rows in of_seed.values()),
        "n_undefined": sum(r["n_undefined"] for r in found), "n_seeds": len(of_seed),
    }  # fmt: skip


def _over_folds(found: Sequence[Row]) -> tuple[int, float | None, float]:
    """Number, mean and deviation of the patients of all folds, of which each validates others; of those folds that told."""
    told = [r for r in found if r["mean"] is not None]
    if not told:
        return sum(r["n"] for r in found), None, 0.0
    n = sum(r["n"] for r in told)
    mean = sum(r["n"] * r["mean"] for r in told) / n
    squares = sum((r["n"] - 1) * r["deviation"] ** 2 + r["n"] * (r["mean"] - mean) ** 2 for r in told)
    return n, mean, math.sqrt(squares / (n - 1))


def _pool(place: Place, found: Sequence[Row]) -> list[dict[str, Any]]:
    """The row of all sites, weighted by their patients; of several models on the same patients, the mean over the models."""
    model, subset, label, metric = place
    sites = sorted({r["site"] for r in found})
    if len(sites) == 1 and not any(":" in r["model"] for r in found):
        return []
    told = [r for r in found if r["mean"] is not None]
    weights = [r["n"] if len(sites) > 1 else 1 for r in told]
    several = len(sites) > 1
    return [{
        "model": model, "site": ALL_SITES if several else sites[0], "subset": subset, "label": label, "metric": metric,
        "mean": sum(w * r["mean"] for w, r in zip(weights, told, strict=True)) / sum(weights) if told else None,
        "ci_low": None, "ci_high": None, "n": (sum if several else min)([r["n"] for r in told] or [0]),
        "n_cases": (sum if several else max)(r["n_cases"] for r in found),
        "n_undefined": sum(r["n_undefined"] for r in found), "n_seeds": max(r["n_seeds"] for r in found),
    }]  # fmt: skip
