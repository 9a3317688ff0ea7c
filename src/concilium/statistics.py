"""From scores of cases to figures: across labels, patients, sites and seeds. See docs/statistics.md."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium._resampling import Array, Draws, interval, sign_flip

FOREGROUND_MEAN = "foreground_mean"
"""Stands where a label stands: the mean over the foreground labels, within each patient."""
ALL_SITES = "all"
"""Stands where a site stands: the patients of all sites, each counting once."""
WITHOUT = "-without-"
"""Stands in a model's name before the site that its training never saw."""
NOT_ANNOTATED = "not_annotated"
"""The status (as in `metrics`) of a label that nobody looked for in a case: it is not undefined, there is nothing to score."""
MIN_PATIENTS = 6
"""Fewer patients give no interval and no p-value."""


@dataclass(frozen=True)
class Scale:
    """What a metric's values mean; the lowest is 0."""

    higher_is_better: bool = True
    highest: float = math.inf


@dataclass(frozen=True, eq=False)
class _Scores:
    """A model's scores in a subset, each the mean over a patient's cases."""

    patients: tuple[tuple[str, str], ...]
    """(site, patient), sorted."""
    seeds: tuple[int, ...]
    labels: tuple[str, ...]
    """`FOREGROUND_MEAN` last, where there are several."""
    values: Array
    """(patients, seeds, labels, metrics); not a number: undefined."""
    cases: Mapping[tuple[str, str], frozenset[str]]
    """(site, label) -> cases."""
    undefined: Mapping[tuple[str, str, int], int]
    """(site, label, place of the metric) -> undefined scores of cases."""

    def of(self, label: str, metric: int) -> Array:
        """(patients, seeds)."""
        found: Array = self.values[:, :, self.labels.index(label), metric]
        return found


Tables = dict[tuple[str, str], _Scores]
"""(model, subset) -> scores."""


# ------------------------------------------------------------------------------------------------------------ summary


def summarize(
    cases: Iterable[Mapping[str, Any]], metrics: Mapping[str, Scale], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean and 95 % interval of every metric, by model, site, subset and label, over patients.

    A patient's cases are averaged first, then seeds. Scores that are undefined do not count in the mean, and are counted in
    `n_undefined`. The interval (`_resampling.interval`) is `None` below six patients. After the sites come the patients of all
    of them (site `ALL_SITES`, where there are several), and there the models `NAME:SITE` as one, `NAME`.
    """
    tables, draws = _tables(cases, metrics), Draws(seed)
    rows: list[dict[str, Any]] = []
    for (model, subset), scores in tables.items():
        for site in dict.fromkeys(site for site, _ in scores.cases):
            rows += _summary(scores, metrics, draws, about={"model": model, "site": site, "subset": subset})
    for (model, subset), scores in _together(tables).items():
        sites = sorted({site for site, _ in scores.patients})
        if len(sites) > 1 or (model, subset) not in tables:
            site = ALL_SITES if len(sites) > 1 else sites[0]
            rows += _summary(scores, metrics, draws, about={"model": model, "site": site, "subset": subset})
    return rows


def _summary(
    scores: _Scores, metrics: Mapping[str, Scale], draws: Draws, *, about: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """The rows of one model at one site, or at all."""
    members = [i for i, (site, _) in enumerate(scores.patients) if about["site"] in (site, ALL_SITES)]
    sites = sorted({scores.patients[i][0] for i in members})
    strata = [scores.patients[i][0] for i in members]
    for place, (metric, scale) in enumerate(metrics.items()):
        for label in scores.labels:
            single = [x for x in scores.labels if label in (x, FOREGROUND_MEAN) and x != FOREGROUND_MEAN]
            values = scores.of(label, place)[members]
            mean, low, high, n = _estimate(values, strata, draws, lowest=0, highest=scale.highest)
            yield {
                **about, "label": label, "metric": metric, "mean": mean, "ci_low": low, "ci_high": high, "n": n,
                "n_cases": sum(len({c for x in single for c in scores.cases.get((s, x), ())}) for s in sites),
                "n_undefined": sum(scores.undefined.get((s, x, place), 0) for s in sites for x in single),
                "n_seeds": len(scores.seeds),
            }  # fmt: skip


def _estimate(
    values: Array, strata: Sequence[str], draws: Draws, *, lowest: float, highest: float
) -> tuple[float | None, float | None, float | None, int]:
    """Mean, interval and number of the patients with a value under any seed."""
    defined: NDArray[np.bool_] = np.logical_not(np.isnan(values).all(axis=1))
    n = int(defined.sum())
    if n == 0:
        return None, None, None, 0
    kept = values[defined]
    mean = float(np.nanmean(kept, axis=1).mean())
    if n < MIN_PATIENTS:
        return mean, None, None, n
    low, high = interval(kept, [s for s, d in zip(strata, defined, strict=True) if d], draws)
    return mean, max(low, lowest), min(high, highest), n


def spread(summary: Iterable[Mapping[str, Any]], metrics: Mapping[str, Scale]) -> list[dict[str, Any]]:
    """Worst and best site of every model, and the gap between them, where two sites have six patients or more."""
    means: dict[tuple[str, str, str, str], dict[str, float]] = defaultdict(dict)
    for row in summary:
        model, _, own = row["model"].partition(":")
        told = row["n"] >= MIN_PATIENTS and row["mean"] is not None  # a site may tell how many there are, and not more
        if row["site"] != ALL_SITES and told and own in ("", row["site"]):
            means[model, row["subset"], row["label"], row["metric"]][row["site"]] = row["mean"]
    rows = []
    for (model, subset, label, metric), sites in means.items():
        ascending = sorted(sites, key=lambda site: (sites[site], site))
        worst, best = (
            (ascending[0], ascending[-1]) if metrics[metric].higher_is_better else (ascending[-1], ascending[0])
        )
        if len(sites) > 1:
            rows.append({
                "model": model, "subset": subset, "label": label, "metric": metric,
                "worst": worst, "worst_mean": sites[worst], "best": best, "best_mean": sites[best],
                "gap": abs(sites[best] - sites[worst]),
            })  # fmt: skip
    return rows


# -------------------------------------------------------------------------------------------------------- comparisons


def compare(cases: Iterable[Mapping[str, Any]], metrics: Mapping[str, Scale], *, seed: int = 0) -> list[dict[str, Any]]:
    """Every two models on the same patients: difference of means a - b with 95 % interval, and p before and after Holm.

    On the test set where there is one, else on the validation cases of all sites. Models `NAME:SITE` count as one, `NAME`: on
    validation cases each patient has the score of its own site's model, on the test set the mean over these models. Patients
    whose score is undefined for either, or that only one was scored on, do not count (`n_undefined`). Seeds that both models
    were trained with are paired. One family of Holm's correction: all pairs for one subset, label and metric.
    Models that were trained without a site are no member of it: they ask another question, and would weaken every answer.
    """
    tables = _together(_tables(cases, metrics))
    subset = "test" if any(s == "test" for _, s in tables) else "validation"
    models = {model: scores for (model, s), scores in tables.items() if s == subset and WITHOUT not in model}
    labels = dict.fromkeys(label for scores in models.values() for label in scores.labels)
    draws, rows = Draws(seed), []
    for place, (metric, scale) in enumerate(metrics.items()):
        for label in labels:
            family = []
            for a, b in combinations([m for m, scores in models.items() if label in scores.labels], 2):
                about = {"a": a, "b": b, "subset": subset, "label": label, "metric": metric}
                family.append(about | _difference(models[a], models[b], (label, place), draws, scale.highest))
            for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
                rows.append(row | {"p_holm": p})
    return rows


def _difference(a: _Scores, b: _Scores, which: tuple[str, int], draws: Draws, highest: float) -> dict[str, Any]:
    """What `compare` says of two models."""
    shared = sorted(set(a.patients) & set(b.patients))
    seeds = sorted(set(a.seeds) & set(b.seeds))
    differences = _taken(a, shared, seeds, which) - _taken(b, shared, seeds, which)
    mean, low, high, n = _estimate(differences, [site for site, _ in shared], draws, lowest=-highest, highest=highest)
    kept = differences[~np.isnan(differences).all(axis=1)]
    return {
        "difference": mean,
        "ci_low": low,
        "ci_high": high,
        "p": None if n < MIN_PATIENTS else sign_flip(kept, draws),
        "n": n,
        "n_undefined": len(set(a.patients) | set(b.patients)) - n,
        "n_seeds": len(seeds),
    }


def _taken(scores: _Scores, patients: Sequence[tuple[str, str]], seeds: Sequence[int], which: tuple[str, int]) -> Array:
    rows = {patient: i for i, patient in enumerate(scores.patients)}
    at = np.ix_([rows[p] for p in patients], [scores.seeds.index(s) for s in seeds])
    found: Array = scores.of(*which)[at] if patients and seeds else np.empty((0, 1))
    return found


def holm(p: Sequence[float | None]) -> list[float | None]:
    """The p-values of a family, corrected (Holm 1979); `None` is no member of it."""
    ascending = sorted((value, i) for i, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, i) in enumerate(ascending):
        largest = max(largest, min(1.0, value * (len(ascending) - rank)))
        corrected[i] = largest
    return corrected


def non_inferior(comparison: Mapping[str, Any], margin: float, *, higher_is_better: bool = True) -> bool | None:
    """Whether model a is worse than b by less than the margin: read from the interval's end, never from the mean.

    `None` where there is no interval. 95 % two-sided, so the error is 2.5 %.
    """
    end = comparison["ci_low"] if higher_is_better else comparison["ci_high"]
    if end is None:
        return None
    return bool(end > -margin if higher_is_better else end < margin)


# ------------------------------------------------------------------------------------------------------------- scores


def _tables(cases: Iterable[Mapping[str, Any]], metrics: Mapping[str, Scale]) -> Tables:
    """Scores by model, as named, and subset."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for case in cases:
        if case.get("status") != NOT_ANNOTATED:
            groups[case["model"], case["subset"]].append(case)
    # also of a model that was scored on one label, beside others: a mean over all of them must not lose its patients
    several = len({case["label"] for rows in groups.values() for case in rows}) > 1
    return {key: _scores(rows, list(metrics), several=several) for key, rows in groups.items()}


def _scores(rows: list[Mapping[str, Any]], metrics: Sequence[str], *, several: bool) -> _Scores:
    labels = {label: i for i, label in enumerate(dict.fromkeys(r["label"] for r in rows))}
    patients = {p: i for i, p in enumerate(sorted({(r["site"], r["patient"]) for r in rows}))}
    seeds = {s: i for i, s in enumerate(sorted({r.get("seed", 0) for r in rows}))}
    total = np.zeros((len(patients), len(seeds), len(labels), len(metrics)))
    count: NDArray[np.int64] = np.zeros(total.shape, dtype=np.int64)
    cases: dict[tuple[str, str], set[str]] = defaultdict(set)
    undefined: Counter[tuple[str, str, int]] = Counter()
    for r in sorted(rows, key=lambda r: (r["case"], str(r.get("fold")))):  # sums that do not depend on the rows' order
        site, label = r["site"], r["label"]
        at = patients[site, r["patient"]], seeds[r.get("seed", 0)], labels[label]
        cases[site, label].add(r["case"])
        for place, metric in enumerate(metrics):
            if r[metric] is None:
                undefined[site, label, place] += 1
            else:
                total[(*at, place)] += r[metric]
                count[(*at, place)] += 1
    values = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    names = tuple(labels)
    if several:
        values = np.concatenate([values, _mean(values, axis=2)[:, :, None]], axis=2)
        names = (*names, FOREGROUND_MEAN)
    in_order = {(r["site"], label): frozenset(cases[r["site"], label]) for r in rows for label in labels}
    return _Scores(tuple(patients), tuple(seeds), names, values, in_order, undefined)


def _together(tables: Tables) -> Tables:
    """The models `NAME:SITE` as one, `NAME`: the mean over these models where several have scored a patient."""
    named: dict[tuple[str, str], list[_Scores]] = defaultdict(list)
    for (model, subset), scores in tables.items():
        named[model.split(":")[0], subset].append(scores)
    return {key: found[0] if len(found) == 1 else _mean_of(found) for key, found in named.items()}


def _mean_of(members: Sequence[_Scores]) -> _Scores:
    patients = tuple(sorted({p for m in members for p in m.patients}))
    seeds = tuple(sorted({s for m in members for s in m.seeds}))
    single = dict.fromkeys(x for m in members for x in m.labels if x != FOREGROUND_MEAN)
    labels = (*single, FOREGROUND_MEAN) if any(FOREGROUND_MEAN in m.labels for m in members) else tuple(single)
    values = np.full((len(members), len(patients), len(seeds), len(labels), members[0].values.shape[-1]), np.nan)
    cases: dict[tuple[str, str], frozenset[str]] = {}
    undefined: Counter[tuple[str, str, int]] = Counter()
    row = {p: i for i, p in enumerate(patients)}
    for i, m in enumerate(members):
        at = np.ix_(
            [row[p] for p in m.patients], [seeds.index(s) for s in m.seeds], [labels.index(x) for x in m.labels]
        )
        values[i][at] = m.values
        cases |= {key: cases.get(key, frozenset()) | found for key, found in m.cases.items()}
        undefined.update(m.undefined)
    return _Scores(patients, seeds, labels, _mean(values, axis=0), cases, undefined)


def _mean(values: Array, *, axis: int) -> Array:
    """Mean of what is defined; not a number where nothing is."""
    defined = ~np.isnan(values)
    n = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis)
    found: Array = np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)
    return found
