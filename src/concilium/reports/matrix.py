"""Site by model: one figure per cell, as a table for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concilium.disclosure import MIN_CASES
from concilium.reports import TITLES
from concilium.reports._found import is_simulation, study_of
from concilium.reports._guarded import guarded, undefined
from concilium.statistics import ALL_SITES, FOREGROUND_MEAN, WITHOUT

Row = Mapping[str, Any]
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


def matrix_of_run(folder: Path, results: Mapping[str, Any]) -> Matrix:
    """The table of a run in this folder; between hospitals without what describes few patients (`_guarded.py`)."""
    return matrix(results if is_simulation(study_of(folder)[0]) else guarded(results))


def matrix(results: Mapping[str, Any], metric: str = "dice") -> Matrix:
    """Mean of a metric over the foreground labels, over the patients of each site, and of all.

    A site's own model (`local:SITE`) stands in the column `local` in the row of its site; on the test set, which each of them
    segments, the mean over these models stands there. So do those that are trained beside a shared one. What the models trained
    without a site reach on it stands in a row of its own. The patients of all sites, and the test set, have their intervals
    below, where the table then fits a terminal.
    """
    labels = {s["label"] for s in results["summary"]}
    label = FOREGROUND_MEAN if FOREGROUND_MEAN in labels else next(iter(sorted(labels)), "")
    cells = _cells(results["summary"], metric, label)
    models = list(dict.fromkeys(m["name"] for m in results["models"] if WITHOUT not in m["name"]))
    rows: list[tuple[str, ...]] = []
    told: list[str] = []
    for place in sorted(dict.fromkeys(key[:2] for key in cells), key=lambda place: ORDER.index(place[1])):
        name = _name(*place)
        found = [cells.get((*place, model)) for model in models]
        rows.append((f"{name}{_patients(found)}", *map(_figure, found)))
        if name in ("test set", "all sites"):
            rows += _intervals(found, rows, models)
        missing = [f"{m} {s['n_undefined']}" for m, s in zip(models, found, strict=True) if s and undefined(s)]
        told += [f"{name} ({', '.join(missing)})"] if missing and place[0] != ALL_SITES else []
    notes = _notes(results["summary"], rows, cells)
    if told:
        notes.append(f"Undefined, and in no mean: {'; '.join(told)}.")
    title = f"{TITLES.get(metric, metric)}, {'mean over the foreground labels' if label == FOREGROUND_MEAN else label}"
    return Matrix(title, ("site", *models), tuple(rows), tuple(notes))


def _cells(summary: Sequence[Row], metric: str, label: str) -> dict[tuple[str, str, str], Row]:
    """Site, subset, model -> its row of the summary, where it has a figure, or says why it has none."""
    cells = {}
    for s in sorted(summary, key=lambda s: s["site"] == ALL_SITES):
        model, _, own = s["model"].partition(":")
        model, _, without = model.partition(WITHOUT)
        if without and s["subset"] != UNSEEN:
            continue
        there = s["mean"] is not None or "hidden" in s or undefined(s)
        if there and s["metric"] == metric and s["label"] == label and own in ("", s["site"]):
            cells[s["site"], s["subset"], model] = s
    return cells


def _name(site: str, subset: str) -> str:
    name = "test set" if subset == "test" else "all sites" if site == ALL_SITES else site
    return f"{name} unseen" if subset == UNSEEN else name


def _patients(found: Sequence[Row | None]) -> str:
    """How many patients the figures of a row are of: fewer and more where some are undefined under some model."""
    n = [s["n"] for s in found if s is not None and s["mean"] is not None]
    return f", n = {'–'.join(map(str, sorted({min(n), max(n)})))}" if n else ""


def _figure(s: Row | None) -> str:
    if s is None or s["mean"] is None:
        return "–" if s is None else str(s.get("hidden", "–"))
    return f"{s['mean']:.3f}"


def _notes(
    summary: Sequence[Row], rows: Sequence[tuple[str, ...]], cells: Mapping[tuple[str, str, str], Row]
) -> list[str]:
    notes = ["Sites: their validation cases. n: patients."]
    if any(row[0] == INTERVAL for row in rows):
        notes.append("In brackets: 95 % intervals.")
    own = dict.fromkeys(s["model"].partition(":")[0] for s in summary if ":" in s["model"])
    if any(subset == "test" for _, subset, _ in cells) and own:
        notes.append(f"{', '.join(own)}: each site's own model; on the test set the mean over these models.")
    if any(subset == UNSEEN for _, subset, _ in cells):
        notes.append("unseen: all its cases, by the model trained without that site.")
    if any("hidden" in s for s in cells.values()):
        notes.append(
            f"Not shown: figures of fewer than {MIN_CASES} patients, and means over all sites that would tell them."
        )
    return notes


def _intervals(
    found: Sequence[Row | None], rows: Sequence[tuple[str, ...]], models: Sequence[str]
) -> list[tuple[str, ...]]:
    """The row of intervals, unless there is none or the table grows too wide."""
    texts = ["" if s is None or s["ci_low"] is None else f"[{s['ci_low']:.3f}, {s['ci_high']:.3f}]" for s in found]
    widths = [max(len(row[0]) for row in rows), *(max(len(a), len(b)) for a, b in zip(texts, models, strict=True))]
    return [(INTERVAL, *texts)] if any(texts) and sum(w + 3 for w in widths) < WIDTH else []


def fitting(table: Matrix, width: int) -> Matrix:
    """The table in so many columns of text: with a row per model and a column per site, where the models do not fit beside one
    another."""
    columns = zip(table.header, *table.rows, strict=True)
    if sum(max(map(len, column)) + 3 for column in columns) < width:
        return table
    rows = [row for row in table.rows if row[0] != INTERVAL]
    header = ("model", *(row[0].replace(", n = ", " ") for row in rows))
    each = tuple((model, *(row[i] for row in rows)) for i, model in enumerate(table.header[1:], 1))
    notes = tuple(
        "Sites, with their patients: their validation cases." if "n: patients" in n else n for n in table.notes
    )
    return Matrix(table.title, header, each, tuple(n for n in notes if not n.startswith("In brackets")))


def to_markdown(table: Matrix) -> str:
    """The table, ready to paste."""
    lines = [table.header, tuple("---" for _ in table.header), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
