"""What an audit of leakage found (leakage.json): rows of text, and a section of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from concilium.reports._cases import View
from concilium.reports._elements import e, figure, number, table
from concilium.reports._figures import legend, scatter
from concilium.reports._sections import section

AUDITS = "leakage"
"""Folder of a run: its audits, one beside or below the other."""
FILE, PRICE = "leakage/leakage.json", "leakage/price.json"
HEADER = ("attack", "cut", "map", "channel", "figure", "found", "naive", "n")
CALLED = {
    "ssim": "SSIM",
    "psnr": "PSNR [dB]",
    "distance_correlation": "distance correlation",
    "dice": "Dice of the mask",
    "auc": "AUC",
    "tpr_at_1_fpr": "found at 1 % false alarms",
    "reidentified": "share re-identified",
}
MEASURES = ("ssim", "dice", "reidentified")
PRICE_HEADER = (
    "model",
    "defended by",
    "Dice",
    "SSIM found (naive)",
    "Dice of the mask (naive)",
    "re-identified (naive)",
    "Pareto",
)
PRICE_NOTE = "Further left leaks less, further up segments better. Each attack was trained anew against each model."
NAIVE = (
    "Naive: what a guess without looking gets: the mean image, the most likely mask, chance. n: patches, or "
    "candidates. SSIM and "
    "PSNR inside the body."
)


def rows_by_round(found: Mapping[str, Any]) -> dict[int, tuple[tuple[str, ...], ...]]:
    """The rows of each audited round."""
    rounds = dict.fromkeys(row["round"] for row in found["rows"])
    return {number: tuple(_cells(row) for row in found["rows"] if row["round"] == number) for number in rounds}


def title(found: Mapping[str, Any], number: int) -> str:
    """What stands above the rows of a round."""
    return f"What leaks: {found['model']}, after round {number}"


def price_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every model with its Dice and what attacks find, as text; those of the Pareto set have a mark."""
    rows = []
    for row in found["rows"]:
        leaks = [row["leaks"].get(measure) for measure in MEASURES]
        shown = ["–" if x is None else f"{x['found']:.3f} ({x['naive']:.3f})" for x in leaks]
        dice = number(row["dice"])
        rows.append((row["model"], row["defended"], dice, *shown, "yes" if row["pareto"] else ""))
    return rows


def _price(folder: Path) -> list[Element]:
    """Dice against leakage of all models, where they were compared."""
    path = folder / PRICE
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    groups: dict[str, list[tuple[float, float]]] = {"in the Pareto set": [], "others": []}
    for row in found["rows"]:
        if row["dice"] is not None and "ssim" in row["leaks"]:
            groups["in the Pareto set" if row["pareto"] else "others"].append(
                (row["leaks"]["ssim"]["found"], row["dice"])
            )
    colours = dict.fromkeys(groups, 0) | {"others": 1}
    made = [table(PRICE_HEADER, price_rows(found), caption="What defences cost, and what they are worth", words=2)]
    if any(groups.values()):
        axes = {"x": "SSIM of what the best attack finds", "y": "Dice"}
        drawn = scatter(groups, title="Dice against leakage", colours=colours, equal=False, **axes)
        made += [figure(drawn, PRICE_NOTE), legend(colours, [g for g, points in groups.items() if points])]
    return made


def leaks(view: View) -> Element | None:
    """What attacks found, in the report of a simulation that was audited; nothing where the data are others'."""
    if view.private or view.found.site is not None:
        return None
    path, compared = view.found.folder / FILE, _price(view.found.folder)
    if not path.is_file():
        return section("What leaks", *compared, e("p", NAIVE, class_="note")) if compared else None
    found = json.loads(path.read_text(encoding="utf-8"))
    tables = [
        table(HEADER, rows, caption=title(found, number), words=5) for number, rows in rows_by_round(found).items()
    ]
    who = [e("li", f"{a['name']}: {a['who']}.") for a in found["attacks"]]
    notes = [e("p", note, class_="note") for note in (NAIVE, *found["notes"])]
    return section("What leaks", *compared, *tables, e("p", "Who could do it:"), e("ul", who), *notes)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    digits = 1 if row["metric"] == "psnr" else 3
    values = [f"{row[key]:.{digits}f}" for key in ("value", "naive")]
    of = ": ".join(filter(None, (row.get("site", ""), row["map"]))) + (" (prediction)" if row.get("predicting") else "")
    places: Sequence[str] = (row["attack"] or "none", row["cut"], of, row["channel"])
    return (*places, CALLED.get(row["metric"], row["metric"]), *values, str(row["n"]))
