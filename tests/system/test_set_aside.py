"""A site that is elsewhere tells how many cases it set aside; the run counts them, also after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import concilium
from concilium.data.phantom import write_phantom
from concilium.line import run
from concilium.preparation import Event
from concilium.record import Record
from concilium.reports.html import write_report
from concilium.study import Study

Make = Callable[..., Study]
ROW = {"site": "north", "case": None, "reason": "unreadable", "text": None, "count": 1}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The phantom with all its cases, at sites whose own folders the server cannot see."""
    monkeypatch.setattr(Record, "case_names", lambda *_: {})
    monkeypatch.setattr(Record, "excluded", lambda *_: [])
    write_phantom(tmp_path / "data", n_test=3, scale=0.5)
    return tmp_path / "data"


def break_case(data: Path) -> str:
    """Cut off the last image of the north; its name."""
    image = max((data / "north" / "imagesTr").iterdir())
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    return image.name


def test_counts_come_into_the_results(small_study: Make, data: Path, tmp_path: Path) -> None:
    broken = break_case(data)
    study = small_study(data=data, protocol__rounds=1, protocol__compare=["centralized"], test=False)
    results = run(study, tmp_path / "run").results
    assert results["excluded"] == [ROW]
    assert "north: 1 case set aside (unreadable)." in results["warnings"]
    assert not any("pooled" in text for text in results["warnings"])
    schema = json.loads((Path(concilium.__file__).parent / "results.schema.json").read_text())
    Draft202012Validator(schema).validate(results)
    ready = json.loads((tmp_path / "run" / "checkpoints" / "federated.json").read_text())
    patient = json.loads((data / "north" / "dataset.json").read_text())["patient"]
    assert ready["patients"]["north"] == len({p for case, p in patient.items() if case not in broken})
    again = run(study, tmp_path / "run", resume=True).results
    assert again["excluded"] == [ROW]
    assert "No case was set aside" not in write_report(tmp_path / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", ["Preprocessing", "scoring the validation cases"])
def test_a_case_that_is_lost_later_counts_too(stage: str, small_study: Make, data: Path, tmp_path: Path) -> None:
    """When the sites prepare, or when the model is scored: then every one of the fold's images is gone."""
    broken: list[Any] = []

    def watch(event: Event) -> None:
        if stage in event.text and not broken:
            broken.extend([break_case(data)] if stage == "Preprocessing" else (data / "north" / "imagesTr").iterdir())
            for image in broken if stage != "Preprocessing" else ():
                image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])

    study = small_study(data=data, protocol__rounds=1, test=False, study__max_excluded=1.0)
    results = run(study, tmp_path / "run", watch=watch).results
    (row,) = results["excluded"]
    assert broken
    assert row == ROW | {"count": row["count"]}
    assert (row["count"] == 1) == (stage == "Preprocessing")


def test_what_sites_told_first_is_kept_where_a_run_stops(small_study: Make, data: Path, tmp_path: Path) -> None:
    break_case(data)

    def watch(event: Event) -> None:
        if "Preprocessing" in event.text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small_study(data=data, test=False), tmp_path / "run", watch=watch)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["excluded"] == [ROW]
