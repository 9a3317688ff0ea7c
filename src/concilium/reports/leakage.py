"""What an audit of leakage found, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from concilium.reports._leaks import HEADER, NAIVE, rows_by_round, title


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def grids(found: Mapping[str, Any]) -> list[Grid]:
    """A table for each audited round."""
    return [Grid(title(found, number), HEADER, rows, (NAIVE,)) for number, rows in rows_by_round(found).items()]
