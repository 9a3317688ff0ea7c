"""A run folder from Python: what is no run, and results that are read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from concilium.api import Run, open_run
from concilium.errors import StudyError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "study.toml").write_text("")
    (tmp_path / "results.json").write_text(json.dumps({"complete": True, "problems": []}))
    return tmp_path


def test_what_is_no_run_folder_is_refused_at_once(tmp_path: Path) -> None:
    for make in (Run, open_run):
        with pytest.raises(StudyError, match=r"is no run folder: it has no study\.toml"):
            make(tmp_path)


def test_a_run_without_results_says_how_to_go_on(folder: Path) -> None:
    (folder / "results.json").unlink()
    assert Run(folder).report_file.name == "report.html"  # what needs no results works
    for read in (lambda: Run(folder).complete, lambda: open_run(folder)):
        with pytest.raises(StudyError, match=r"no results\.json.*--resume"):
            read()


def test_results_are_read_once_until_they_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    loads = json.loads

    def counted(text: str, **options: Any) -> Any:
        read.append(text)
        return loads(text, **options)

    monkeypatch.setattr(json, "loads", counted)
    run = open_run(folder)
    assert (run.complete, run.exit_code, run.problems, run.results is run.results) == (True, 0, (), True)
    assert len(read) == 1
    (folder / "results.json").write_text(json.dumps({"complete": False, "problems": ["north: lost"]}))
    assert (run.exit_code, run.problems) == (4, ("north: lost",))
    assert len(read) == 2
    assert run == open_run(folder)
