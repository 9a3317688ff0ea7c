"""In what distances and volumes are: sites whose files tell no spacing measure in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PICTURES = (".png", ".bmp")
"""Endings of files that never tell a spacing; TIFF may."""
VOLUMES = {"mm": "ml", "px": "px"}


def unit_of(cases: Iterable[Mapping[str, Any]], ending: str = "") -> str:
    """`mm`, `px`, or `mm or px` where cases differ; without a case what files of this ending tell, if that is known."""
    found = {case["unit"] for case in cases}
    if not found and ending:
        found = {"px"} if ending in PICTURES else set() if ending.startswith(".tif") else {"mm"}
    return " or ".join(sorted(found or VOLUMES))


def volume_of(unit: str) -> str:
    """The unit of volumes where that of distances is `unit`."""
    return " or ".join(VOLUMES[part] for part in unit.split(" or "))
