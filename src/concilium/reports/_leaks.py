"""What an audit of leakage found (leakage.json): rows of text, and a section of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from concilium.reports._cases import View
from concilium.reports._elements import e, table
from concilium.reports._sections import section

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


def rows_by_round(found: Mapping[str, Any]) -> dict[int, tuple[tuple[str, ...], ...]]:
    """The rows of each audited round."""
    rounds = dict.fromkeys(row["round"] for row in found["rows"])
    return {number: tuple(_cells(row) for row in found["rows"] if row["round"] == number) for number in rounds}


def title(found: Mapping[str, Any], number: int) -> str:
    """What stands above the rows of a round."""
    return f"What leaks: {found['model']}, after round {number}"


def leaks(view: View) -> Element | None:
    """What attacks found, in the report of a simulation that was audited; nothing where the data are others'."""
    path = view.found.folder / FILE
    if view.private or view.found.site is not None or not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    tables = [
        table(HEADER, rows, caption=title(found, number), words=5) for number, rows in rows_by_round(found).items()
    ]
    who = [e("li", f"{a['name']}: {a['who']}.") for a in found["attacks"]]
    notes = [e("p", note, class_="note") for note in (NAIVE, *found["notes"])]
    return section("What leaks", *tables, e("p", "Who could do it:"), e("ul", who), *notes)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    digits = 1 if row["metric"] == "psnr" else 3
    values = [f"{row[key]:.{digits}f}" for key in ("value", "naive")]
    of = ": ".join(filter(None, (row.get("site", ""), row["map"])))
    places: Sequence[str] = (row["attack"] or "none", row["cut"], of, row["channel"])
    return (*places, CALLED.get(row["metric"], row["metric"]), *values, str(row["n"]))
