"""From scores of cases to figures: across labels, patients and sites."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOREGROUND_MEAN = "foreground_mean"
"""Stands where a label stands: the mean over the foreground labels, within each patient."""
MIN_PATIENTS = 6
"""Fewer patients give no interval."""
RESAMPLES = 2000


def summarize(cases: Iterable[Mapping[str, Any]], metrics: Sequence[str], *, seed: int = 0) -> list[dict[str, Any]]:
    """Mean and 95 % interval of every metric, by model, site, subset and label, over patients.

    A patient's cases are averaged first. Cases in which the metric is undefined do not count in the mean, and are
    counted in `n_undefined`. The interval is the percentile bootstrap over patients (Efron 1979), `None` below six patients.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for case in cases:
        groups[case["model"], case["site"], case["subset"]].append(case)
    summary = []
    for (model, site, subset), scores in groups.items():
        labels = list(dict.fromkeys(s["label"] for s in scores))
        for metric in metrics:
            by_label = {label: _patients([s for s in scores if s["label"] == label], metric) for label in labels}
            rows = list(by_label.items())
            if len(labels) > 1:
                rows.append((FOREGROUND_MEAN, _mean_over_labels(by_label.values())))
            for label, patients in rows:
                counted = [s for s in scores if label in (s["label"], FOREGROUND_MEAN)]
                values = np.array([v for v in patients.values() if v is not None])
                low, high = bootstrap_interval(values, seed=seed)
                summary.append({
                    "model": model, "site": site, "subset": subset, "label": label, "metric": metric,
                    "mean": float(values.mean()) if len(values) else None, "ci_low": low, "ci_high": high,
                    "n": len(values), "n_cases": len({s["case"] for s in counted}),
                    "n_undefined": sum(s[metric] is None for s in counted),
                })  # fmt: skip
    return summary


def bootstrap_interval(values: NDArray[np.float64], *, seed: int) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap interval of the mean; `None` below six values."""
    if len(values) < MIN_PATIENTS:
        return None, None
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def _patients(scores: Iterable[Mapping[str, Any]], metric: str) -> dict[str, float | None]:
    """Patient -> mean of the metric over its cases where defined; `None` where it is in none."""
    values: dict[str, list[float]] = {}
    for score in scores:
        found = values.setdefault(score["patient"], [])
        if score[metric] is not None:
            found.append(score[metric])
    return {patient: math.fsum(v) / len(v) if v else None for patient, v in values.items()}


def _mean_over_labels(by_label: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    values: dict[str, list[float]] = {}
    for patients in by_label:
        for patient, value in patients.items():
            found = values.setdefault(patient, [])
            if value is not None:
                found.append(value)
    return {patient: math.fsum(v) / len(v) if v else None for patient, v in values.items()}
