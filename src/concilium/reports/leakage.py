"""What an audit of leakage found (leakage.json), as a table for the terminal and as a section of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from concilium.reports._cases import View
from concilium.reports._elements import e, table
from concilium.reports._sections import section
from concilium.reports.networks import Grid

FILE = "leakage/leakage.json"
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
NAIVE = (
    "Naive: what a guess without looking gets: the mean image, the most likely mask, chance. n: patches, or candidates. SSIM and "
    "PSNR inside the body."
)


def grids(found: Mapping[str, Any]) -> list[Grid]:
    """A table for each audited round."""
    rounds = dict.fromkeys(row["round"] for row in found["rows"])
    return [
        Grid(
            f"What leaks: {found['model']}, after round {number}",
            HEADER,
            tuple(_cells(row) for row in found["rows"] if row["round"] == number),
            (NAIVE,),
        )
        for number in rounds
    ]


def leaks(view: View) -> Element | None:
    """What attacks found, in the report of a simulation that was audited; nothing where the data are others'."""
    path = view.found.folder / FILE
    if view.private or view.found.site is not None or not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    tables = [table(grid.header, grid.rows, caption=grid.title, words=5) for grid in grids(found)]
    who = [e("li", f"{a['name']}: {a['who']}.") for a in found["attacks"]]
    notes = [e("p", note, class_="note") for note in (NAIVE, *found["notes"])]
    return section("What leaks", *tables, e("p", "Who could do it:"), e("ul", who), *notes)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    digits = 1 if row["metric"] == "psnr" else 3
    values = [f"{row[key]:.{digits}f}" for key in ("value", "naive")]
    places: Sequence[str] = (row["attack"] or "none", row["cut"], row["map"], row["channel"])
    return (*places, CALLED.get(row["metric"], row["metric"]), *values, str(row["n"]))
