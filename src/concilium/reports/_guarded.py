"""Results as they may be shown where the patients are others': nothing that describes few of them, or lets it be computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from concilium.disclosure import MIN_CASES
from concilium.statistics import ALL_SITES

Row = Mapping[str, Any]
Key = tuple[str, str, str, str]
"""Model without its site, subset, label, metric."""


def guarded(results: Mapping[str, Any], least: int = MIN_CASES) -> dict[str, Any]:
    """The results without figures of fewer than `least` patients, and without those that give such a figure by subtraction.

    A row of the summary that must not be shown has neither mean nor number of patients; why is in `hidden`. A mean over all sites
    is such a row where the sites that are hidden have patients in it, but fewer than `least`: less what the others are known to
    add, it would be the mean of these few. So is a difference between two models on all sites.
    """
    summary: Sequence[Row] = results["summary"]
    hidden = _hidden_patients(summary, least)
    rows = [_shown(row, hidden, least) for row in summary]
    shown = {(*_key(row), row["site"]) for row in rows if "hidden" not in row}
    return {
        **results,
        "summary": rows,
        "sites": [s for s in results.get("sites", ()) if _both_shown(s, shown)],
        "comparisons": [
            c for c in results.get("comparisons", ()) if c["n"] >= least and not _gives_away(c, hidden, least)
        ],
    }


def undefined(row: Row) -> str:
    """How many scores are undefined, in words; nothing where none is."""
    n = row.get("n_undefined", 0)
    return f"{n} undefined" if n else ""


def _key(row: Row) -> Key:
    return row["model"].partition(":")[0], row["subset"], row["label"], row["metric"]


def _hidden_patients(summary: Iterable[Row], least: int) -> Counter[Key]:
    """The patients of all sites that have too few each, so far as their scores count in a mean over all sites."""
    found: Counter[Key] = Counter()
    for row in summary:
        if row["site"] != ALL_SITES and row["n"] < least and row["mean"] is not None:
            found[_key(row)] += row["n"]
    return found


def _shown(row: Row, hidden: Counter[Key], least: int) -> dict[str, Any]:
    why = ""
    if row["n"] < least:
        why = f"n < {least}"
    elif row["site"] == ALL_SITES and 0 < hidden[_key(row)] < least:
        why = "not shown"
    elif row["mean"] is None:  # the site keeps scores back, and has too few patients in each fold
        why = "not told"
    if why:
        return {**row, "mean": None, "ci_low": None, "ci_high": None, "n": None, "n_undefined": 0, "hidden": why}
    n = row.get("n_undefined", 0)
    return {**row, "n_undefined": f"fewer than {least}" if 0 < n < least else n}


def _both_shown(spread: Row, shown: Collection[tuple[str, ...]]) -> bool:
    return all((*_key(spread), spread[end]) in shown for end in ("worst", "best"))


def _gives_away(comparison: Row, hidden: Counter[Key], least: int) -> bool:
    rest = (comparison.get("subset", ""), comparison["label"], comparison["metric"])
    return any(0 < hidden[comparison[model], *rest] < least for model in ("a", "b"))
