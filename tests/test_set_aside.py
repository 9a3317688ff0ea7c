"""Cases that sites elsewhere set aside: what they tell again and again is counted once."""

from __future__ import annotations

from typing import Any

import pytest

from concilium._set_aside import DATA, UNSEEN, added_up, told
from concilium.messages import Evaluated, Excluded
from concilium.scoring import Scored

ABOUT = {"model": "federated", "seed": 0, "fold": 2}


def total(*stages: tuple[str, int]) -> int:
    ((row),) = added_up([row for stage, n in stages for row in told("north", [Excluded("unreadable", n)], stage)])
    assert row == {"site": "north", "case": None, "reason": "unreadable", "text": None, "count": row["count"]}
    return int(row["count"])


@pytest.mark.parametrize(
    ("stages", "n"),
    [
        ([(DATA, 2)], 2),
        ([(DATA, 2), (DATA, 3), (DATA, 3)], 3),  # examined, and prepared for two models
        ([(DATA, 2), ("fold 0", 1), ("fold 0", 1)], 3),  # a case that two models could not be scored on
        ([(DATA, 2), ("fold 0", 1), ("fold 1", 2)], 5),
        ([(DATA, 2), ("fold 0", 1), (UNSEEN, 4)], 6),  # all its cases, those of the fold again
    ],
)
def test_a_case_counts_once(stages: list[tuple[str, int]], n: int) -> None:
    assert total(*stages) == n


def test_sites_and_reasons_are_told_apart() -> None:
    rows = told("north", [Excluded("unreadable", 2), Excluded("missing_label", 1)]) + told(
        "test", [Excluded("unreadable", 1)]
    )
    assert [(r["site"], r["reason"], r["count"]) for r in added_up(rows)] == [
        ("north", "unreadable", 2), ("north", "missing_label", 1), ("test", "unreadable", 1),
    ]  # fmt: skip
    assert added_up([]) == []


@pytest.mark.parametrize(
    ("subset", "site", "stage"),
    [("validation", "north", "fold 2"), ("unseen", "north", UNSEEN), ("test", "test", DATA)],
)
def test_what_could_not_be_scored_is_kept(subset: str, site: str, stage: str) -> None:
    """Of a site elsewhere, whose cases have no names here; a simulated one has a list of its own."""
    reply = Evaluated((), (Excluded("unreadable", 2),), 1.0)
    row: dict[str, Any] = {"site": site, "stage": stage, "reason": "unreadable", "count": 2}
    for names, expected in (({}, [row]), ({0: {"case": "c", "patient": "p"}}, [])):
        scored = Scored()
        scored.add(ABOUT, "north", subset, reply, names)
        assert scored.excluded == expected
