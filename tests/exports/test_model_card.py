"""The card says what the record says, and no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from concilium.exports import export_run


@pytest.fixture
def card(picture_run: Path, tmp_path: Path) -> Callable[..., str]:
    """`card(results={...}, intended_use=...)`: the card of a run whose results are changed so."""

    def write(results: dict[str, Any] | None = None, **options: Any) -> str:
        run = tmp_path / "run"
        shutil.copytree(picture_run, run)
        path = run / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (results or {})))
        folder, _ = export_run(run, tmp_path / "out", format="safetensors", **options)
        return (folder / "MODEL_CARD.md").read_text()

    return write


def test_figures_with_interval_and_number_of_patients(card: Callable[..., str]) -> None:
    text = card()
    (line,) = [row for row in text.splitlines() if row.startswith("| north (validation) | polyp")]
    _, _, _, n, dice, iou, hd95, _, _ = (cell.strip() for cell in line.split("|"))
    assert n == "7"  # eight cases, one patient with two
    assert dice.startswith("0.400 [0.1")  # (0.1 + ... + 0.6 + 0.7) / 7
    assert iou == "–"
    assert hd95 == "2.00 [2.00, 2.00]"
    assert "| north | 17 | – | 8 | 7 |" in text


def test_what_is_not_known_is_said(card: Callable[..., str]) -> None:
    text = card()
    assert "## Intended use\n\nNot stated.\n" in text
    assert "not a medical device" in text
    assert "no privacy is claimed" in text
    assert "not complete" not in text
    assert text.startswith("---\nlicense: other\n")
    assert "torch 2.13.0" in text


def test_a_run_that_is_not_complete_says_so_at_the_top(card: Callable[..., str]) -> None:
    problems = [
        "north: FileNotFoundError: /data/alice/secret_3_0000.png is gone",
        "C:\\x\\y.png",
        *(f"p{i}" for i in range(30)),
    ]
    excluded = [
        {"site": "north", "case": "other_7", "reason": "unreadable", "text": "Case other_7: /data/x cannot be read"}
    ]
    warnings = ["north: case other_7 was slow"]
    text = card({"complete": False, "problems": problems, "excluded": excluded, "warnings": warnings})
    assert text.index("This run is not complete") < text.index("## Intended use")
    assert "> - north: FileNotFoundError: [path] is gone" in text
    assert "> - north: case [case] was slow" in text
    assert "> - and 12 more" in text
    assert "1 (north: 1)" in text
    for private in ("alice", "secret", "other_7", "C:\\"):
        assert private not in text


def test_the_intended_use_may_be_a_file(card: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "use.md").write_text("Teaching students.\n")
    assert "## Intended use\n\nTeaching students.\n\n##" in card(intended_use=str(tmp_path / "use.md"))


def test_the_intended_use_may_be_a_long_text(card: Callable[..., str]) -> None:
    assert "a " * 4000 in card(intended_use="a " * 4000 + "b")
