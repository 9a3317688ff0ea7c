"""Texts about others' patients: no small number, no path, no name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import concilium
from concilium.disclosure import MIN_CASES, count, without_counts, without_names, without_paths

MODULES = sorted(Path(concilium.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("what", [r"^MIN_CASES\b.*=", r'"95 % Hausdorff distance"'])
def test_what_views_share_is_said_in_one_place(what: str) -> None:
    found = [path for path in MODULES if re.search(what, path.read_text(encoding="utf-8"), re.MULTILINE)]
    assert len(found) == 1, found


def test_small_numbers_are_not_counted_out() -> None:
    assert [count(n) for n in (0, 1, MIN_CASES - 1, MIN_CASES)] == ["0", "fewer than 5", "fewer than 5", "5"]
    assert count(5, 6) == "fewer than 6"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("federated, validation at tiny: 1 of 4 cases not scored (unreadable)", "fewer than 5 of the cases not scored"),
        ("north: 1 cases set aside (unreadable).", "north: fewer than 5 cases set aside (unreadable)."),
        ("north: 1 case set aside (unreadable).", "north: fewer than 5 cases set aside (unreadable)."),
        ("north: 5 cases set aside (unreadable).", "north: 5 cases set aside (unreadable)."),
        ("5 of 40 cases not scored", "5 of 40 cases not scored"),
        ("The test set has 3 patients.", "The test set has fewer than 5 patients."),
        ("federated, round 2: tiny: no reply within 3 s", "federated, round 2: tiny: no reply within 3 s"),
    ],
)
def test_texts_lose_small_numbers_of_cases(text: str, told: str) -> None:
    assert told in without_counts(text)


def test_texts_lose_paths_and_names() -> None:
    text = "FileNotFoundError: /data/a b/c_1.png\nis gone, C:\\x\\y.png too; case c_1 of 17"
    assert without_paths(text) == "FileNotFoundError: [path] [path] is gone, [path] too; case c_1 of 17"
    assert without_names(text, ["c_1", "17"]).endswith("case [case] of 17")
