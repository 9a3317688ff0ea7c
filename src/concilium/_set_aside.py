"""Cases that sites elsewhere set aside: such a site tells how many and why, never which.

It tells of the same case again each time it is asked, so of what was told at one stage the most counts. What it met while it
prepared its data, and what it could not score of each fold, are different cases, and are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from concilium.messages import Excluded

DATA, UNSEEN = "data", "unseen"
"""Stages; the others are folds. Scoring as `UNSEEN` meets all cases, so those of every fold again."""
Row = Mapping[str, Any]


def told(site: str, excluded: Iterable[Excluded], stage: str = DATA) -> list[dict[str, Any]]:
    """What a site told at a stage; the test set is asked of at one only."""
    return [{"site": site, "stage": stage, "reason": e.reason, "count": e.count} for e in excluded]


def added_up(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows of `excluded` in results.json: a site and a reason each, without the cases' names."""
    most: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        stages = most.setdefault((row["site"], row["reason"]), {})
        stages[row["stage"]] = max(stages.get(row["stage"], 0), row["count"])
    return [
        {"site": site, "case": None, "reason": reason, "text": None, "count": _total(stages)}
        for (site, reason), stages in most.items()
    ]


def _total(stages: Mapping[str, int]) -> int:
    folds = sum(n for stage, n in stages.items() if stage not in (DATA, UNSEEN))
    return stages.get(DATA, 0) + max(folds, stages.get(UNSEEN, 0))
