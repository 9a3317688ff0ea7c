"""Site by model: one figure per cell, as a table for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from concilium.statistics import FOREGROUND_MEAN

TITLES = {"dice": "Dice", "iou": "IoU", "hd95": "95 % Hausdorff distance", "nsd": "Normalised surface Dice"}


@dataclass(frozen=True)
class Matrix:
    """Cells as text; a row per site and subset, a column per model. `notes` say what the cells mean."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def matrix(results: Mapping[str, Any], metric: str = "dice") -> Matrix:
    """Mean of a metric over the foreground labels, over the patients of each site.

    A site's own model (`local:SITE`) stands in the column `local` in the row of its site; on the test set, which each of them
    segments, the mean over these models stands there.
    """
    labels = {s["label"] for s in results["summary"]}
    label = FOREGROUND_MEAN if FOREGROUND_MEAN in labels else next(iter(sorted(labels)), "")
    cells: dict[tuple[str, str, str], list[float]] = {}
    patients: dict[tuple[str, str], set[int]] = {}
    for s in results["summary"]:
        if s["metric"] == metric and s["label"] == label and s["mean"] is not None:
            cells.setdefault((s["site"], s["subset"], s["model"].split(":")[0]), []).append(s["mean"])
            patients.setdefault((s["site"], s["subset"]), set()).add(s["n"])
    models = [m["name"] for m in results["models"]]
    rows = []
    for (site, subset), n in patients.items():
        name = "test set" if subset == "test" else site
        several = "–".join(
            str(x) for x in sorted({min(n), max(n)})
        )  # the metric is undefined for some under some model
        rows.append((f"{name}, n = {several}", *(_cell(cells.get((site, subset, model))) for model in models)))
    notes = ["Sites: their validation cases. n: patients."]
    if any(len(v) > 1 for v in cells.values()):
        notes.append("local: each site's own model; on the test set the mean over these models.")
    title = f"{TITLES.get(metric, metric)}, {'mean over the foreground labels' if label == FOREGROUND_MEAN else label}"
    return Matrix(title, ("site", *models), tuple(rows), tuple(notes))


def to_markdown(table: Matrix) -> str:
    """The table, ready to paste."""
    lines = [table.header, tuple("---" for _ in table.header), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(values: Sequence[float] | None) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f}"
