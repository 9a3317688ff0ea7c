"""Model by label by metric, with intervals and paired differences, as LaTeX, Markdown or CSV: ready to paste into a paper."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from concilium import catalog
from concilium.errors import StudyError
from concilium.reports import SHARES, TITLES
from concilium.reports._found import file_ending, is_simulation, study_of
from concilium.reports._guarded import guarded
from concilium.reports._typeset import DIFFERENCE, FIELDS, MEAN, WORST, WRITERS, Comparison, Figure, Group
from concilium.reports._units import unit_of
from concilium.statistics import ALL_SITES, FOREGROUND_MEAN, non_inferior

DEFAULT_METRICS = ("dice", "hd95")
PATIENTS_UNKNOWN = "Patients unknown"
"""How the warning of a site without patient ids begins, after the site's name."""


def read_runs(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The `results.json` of each run folder, and `file_ending`; between hospitals as it may be shown (`_guarded.py`).

    Raises:
        StudyError: there is none, or it was written by a version without what the table needs.
    """
    found = []
    for run in runs:
        path = run / "results.json"
        if not path.is_file():
            raise StudyError(
                f"{run} has no results.json. Expected the folder of a run. Give what `concilium run` printed."
            )
        results = json.loads(path.read_text(encoding="utf-8"))
        if "sites" not in results:
            raise StudyError(
                f"{path} has no comparisons of models: an older version wrote it. Resume that run: it is then written anew."
            )
        shown = results if is_simulation(study_of(run)[0]) else guarded(results)
        found.append(shown | {"file_ending": file_ending(run)})
    return found


def build(
    runs: Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[str] = (),
    labels: Sequence[str] = (),
    subset: str | None = None,
    margin: float | None = None,
) -> Comparison:
    """The figures of several runs; by default Dice and HD95, the test set where there is one, all labels if runs share them.

    Raises:
        StudyError: a metric, label or subset that no run has.
    """
    known = [tuple(dict.fromkeys(s["label"] for s in r["summary"] if s["label"] != FOREGROUND_MEAN)) for r in runs]
    every = tuple(dict.fromkeys(label for each in known for label in each))
    shared = every if all(set(each) == set(every) for each in known) else ()
    default = (FOREGROUND_MEAN, *shared) if len(every) > 1 else every
    labels = _checked("label", labels or default, (FOREGROUND_MEAN, *every))
    metrics = _checked("metric", metrics or DEFAULT_METRICS, tuple(TITLES))
    models = dict.fromkeys(m["name"] for r in runs for m in r["models"])
    figures: list[Figure] = []
    groups = []
    for number, (results, own) in enumerate(zip(runs, known, strict=True)):
        there = {s["subset"] for s in results["summary"]}
        chosen = subset or ("test" if "test" in there else "validation")
        if chosen not in there:
            raise StudyError(
                f"{results['study']} has no {chosen} cases. It has: {', '.join(sorted(there))}. Change --subset."
            )
        rows = _means(results, chosen, own) + _differences(results, chosen, own, margin) + _worst(results, own)
        rows = [
            {**dict.fromkeys(FIELDS), "run": number, **row}
            for row in rows
            if row["label"] in labels and row["metric"] in metrics
        ]
        groups.append(_group(results, chosen, rows))
        figures += [row | {"study": results["study"], "unit": _unit(row["metric"], groups[-1].unit)} for row in rows]
    return Comparison(tuple(groups), labels, metrics, tuple(figures), margin, tuple(models))


def _checked(what: str, given: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    for name in given:
        if name not in known:
            raise StudyError(f"There is no {what} {name!r}. {catalog.allowed(name, known)} Change --{what}.")
    return tuple(dict.fromkeys(given))


def _renamed(rows: Iterable[Mapping[str, Any]], own: Sequence[str]) -> list[dict[str, Any]]:
    """Rows, and where a run has one label, its rows once more as the mean over its labels."""
    found = [dict(row) for row in rows]
    return found + ([row | {"label": FOREGROUND_MEAN} for row in found] if len(own) == 1 else [])


def _means(results: Mapping[str, Any], subset: str, own: Sequence[str]) -> list[dict[str, Any]]:
    """Of every model, over the patients of all sites."""
    rows = [row for row in results["summary"] if row["subset"] == subset]
    sites = {row["site"] for row in rows}
    site = ALL_SITES if ALL_SITES in sites else next(iter(sites), "")
    kept = (row for row in rows if row["site"] == site and ":" not in row["model"])
    return [
        {
            "kind": MEAN, "subset": subset, "label": row["label"], "metric": row["metric"], "model": row["model"],
            "value": row["mean"], "ci_low": row["ci_low"], "ci_high": row["ci_high"], "n": row["n"], "n_seeds": row["n_seeds"],
            "n_undefined": row["n_undefined"], "hidden": row.get("hidden", ""),
        } for row in _renamed(kept, own)
    ]  # fmt: skip


def _worst(results: Mapping[str, Any], own: Sequence[str]) -> list[dict[str, Any]]:
    """The worst site of every model on validation cases, where two sites have patients enough."""
    rows = {
        (r["model"].partition(":")[0], r["site"], r["subset"], r["label"], r["metric"]): r for r in results["summary"]
    }
    found = []
    for s in results["sites"]:
        row = rows[s["model"], s["worst"], s["subset"], s["label"], s["metric"]]
        taken = {
            key: row[key] for key in ("subset", "label", "metric", "ci_low", "ci_high", "n", "n_seeds", "n_undefined")
        }
        taken |= {"kind": WORST, "model": s["model"], "value": s["worst_mean"], "site": s["worst"], "gap": s["gap"]}
        found.append(taken)
    return _renamed(found, own)


def _differences(
    results: Mapping[str, Any], subset: str, own: Sequence[str], margin: float | None
) -> list[dict[str, Any]]:
    """The run's first model minus each other."""
    first = results["models"][0]["name"] if results["models"] else ""
    found = []
    kept = (row for row in results["comparisons"] if row["subset"] == subset and first in (row["a"], row["b"]))
    for row in _renamed(kept, own):
        low, high, value = row["ci_low"], row["ci_high"], row["difference"]
        if row["b"] == first:
            low, high, value = (None if x is None else -x for x in (high, low, value))
        judged = margin is not None and row["metric"] in SHARES
        found.append({
            "kind": DIFFERENCE, "subset": subset, "label": row["label"], "metric": row["metric"], "model": first,
            "minus": row["a"] if row["b"] == first else row["b"], "value": value, "ci_low": low, "ci_high": high,
            "p_holm": row["p_holm"], "n": row["n"], "n_seeds": row["n_seeds"],
            "non_inferior": non_inferior({"ci_low": low, "ci_high": high}, margin or 0.0) if judged else None,
            "equivalent": _within(low, high, margin or 0.0) if judged else None,
        })  # fmt: skip
    return found


def _within(low: float | None, high: float | None, margin: float) -> bool | None:
    """Whether neither model is worse than the other by the margin; `None` where there is no interval."""
    return None if low is None or high is None else -margin < low <= high < margin


def _group(results: Mapping[str, Any], subset: str, rows: Sequence[Figure]) -> Group:
    cases = [c for c in results["cases"] if c["subset"] == subset]
    sites = dict.fromkeys(s["site"] for s in results["summary"] if s["subset"] == subset and s["site"] != ALL_SITES)
    told = {c["site"] for c in cases}
    unknown = (w.partition(": ") for w in results["warnings"])
    return Group(
        results["study"],
        subset,
        max((row["n"] for row in rows if row["kind"] == MEAN and row["n"] is not None), default=0),
        len(sites),
        max((row["n_seeds"] for row in rows), default=1),
        unit_of(cases, results.get("file_ending", "")),
        tuple(dict.fromkeys(site for site, _, text in unknown if text.startswith(PATIENTS_UNKNOWN))),
        tuple(site for site in sites if site not in told),
    )


def _unit(metric: str, unit: str) -> str:
    return "1" if metric in SHARES else unit


def to_text(table: Comparison, form: str) -> str:
    """The table as `latex`, `csv` or `markdown`, with a line break at its end.

    Raises:
        StudyError: no such format.
    """
    if form not in WRITERS:
        raise StudyError(f"There is no format {form!r}. {catalog.allowed(form, tuple(WRITERS))} Change --format.")
    return WRITERS[form](table)
