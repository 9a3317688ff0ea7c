"""Site by model: one figure per cell, as a table for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from concilium.reports import TITLES
from concilium.statistics import ALL_SITES, FOREGROUND_MEAN, WITHOUT

WIDTH = 100
"""Columns of a terminal in which the intervals must have a place."""
INTERVAL = "    95 %"
UNSEEN = "unseen"
ORDER = ("validation", UNSEEN, "test")
"""Of the rows."""


@dataclass(frozen=True)
class Matrix:
    """Cells as text; a row per site and subset, a column per model. `notes` say what the cells mean."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def matrix(results: Mapping[str, Any], metric: str = "dice") -> Matrix:
    """Mean of a metric over the foreground labels, over the patients of each site, and of all.

    A site's own model (`local:SITE`) stands in the column `local` in the row of its site; on the test set, which each of them
    segments, the mean over these models stands there. So do those that are trained beside a shared one. What the models trained
    without a site reach on it stands in a row of its own. The patients of all sites, and the test set, have their intervals
    below, where the table then fits a terminal.
    """
    labels = {s["label"] for s in results["summary"]}
    label = FOREGROUND_MEAN if FOREGROUND_MEAN in labels else next(iter(sorted(labels)), "")
    cells: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    patients: dict[tuple[str, str], set[int]] = {}
    for s in sorted(results["summary"], key=lambda s: s["site"] == ALL_SITES):
        model, _, own = s["model"].partition(":")
        model, _, without = model.partition(WITHOUT)
        if without and s["subset"] != UNSEEN:
            continue
        if s["metric"] == metric and s["label"] == label and s["mean"] is not None and own in ("", s["site"]):
            cells[s["site"], s["subset"], model] = s
            patients.setdefault((s["site"], s["subset"]), set()).add(s["n"])
    models = list(dict.fromkeys(m["name"] for m in results["models"] if WITHOUT not in m["name"]))
    rows: list[tuple[str, ...]] = []
    for (site, subset), n in sorted(patients.items(), key=lambda item: ORDER.index(item[0][1])):
        name = "test set" if subset == "test" else "all sites" if site == ALL_SITES else site
        name += " unseen" if subset == UNSEEN else ""
        several = "–".join(map(str, sorted({min(n), max(n)})))  # undefined for some patients under some model
        found = [cells.get((site, subset, model)) for model in models]
        rows.append((f"{name}, n = {several}", *("–" if s is None else f"{s['mean']:.3f}" for s in found)))
        if name in ("test set", "all sites"):
            rows += _intervals(found, rows, models)
    notes = ["Sites: their validation cases. n: patients."]
    if any(row[0] == INTERVAL for row in rows):
        notes.append("In brackets: 95 % intervals.")
    own = dict.fromkeys(s["model"].partition(":")[0] for s in results["summary"] if ":" in s["model"])
    if "test set" in {row[0].partition(",")[0] for row in rows} and own:
        notes.append(f"{', '.join(own)}: each site's own model; on the test set the mean over these models.")
    if any(subset == UNSEEN for _, subset in patients):
        notes.append("unseen: all its cases, by the model trained without that site.")
    title = f"{TITLES.get(metric, metric)}, {'mean over the foreground labels' if label == FOREGROUND_MEAN else label}"
    return Matrix(title, ("site", *models), tuple(rows), tuple(notes))


def _intervals(
    found: Sequence[Mapping[str, Any] | None], rows: Sequence[tuple[str, ...]], models: Sequence[str]
) -> list[tuple[str, ...]]:
    """The row of intervals, unless there is none or the table grows too wide."""
    texts = ["" if s is None or s["ci_low"] is None else f"[{s['ci_low']:.3f}, {s['ci_high']:.3f}]" for s in found]
    widths = [max(len(row[0]) for row in rows), *(max(len(a), len(b)) for a, b in zip(texts, models, strict=True))]
    return [(INTERVAL, *texts)] if any(texts) and sum(w + 3 for w in widths) < WIDTH else []


def to_markdown(table: Matrix) -> str:
    """The table, ready to paste."""
    lines = [table.header, tuple("---" for _ in table.header), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
