"""A run's report, with the pictures that its sites made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from concilium import cli
from concilium.study import Study, to_toml

Make = Callable[..., Study]


def test_a_run_ends_with_a_report(
    small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = small_study(protocol__rounds=1)
    (tmp_path / "study.toml").write_text(to_toml(study))
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["concilium", "run", str(tmp_path / "study.toml"), "--out", str(run)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 0
    assert f"Report: {run / 'report.html'}" in capsys.readouterr().out.replace("\n", "")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") >= 10
    for site in ("north", "south", "west", "test"):
        subset = "test" if site == "test" else "validation"
        table = json.loads((run / "sites" / site / "scores" / f"federated.{subset}.json").read_text())
        for row in table["cases"]:
            assert (run / "sites" / site / row["picture"]).stat().st_size <= 15_000
        plans = [json.loads(path.read_text()) for path in (run / "sites" / site / "plan.json", run / "plans.json")]
        assert plans[0] == plans[1], "what a site's own report looks for reasons in"


def test_a_report_that_fails_does_not_undo_the_run(
    small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import concilium.reports.html

    def fail(folder: Path, **_: object) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(concilium.reports.html, "write_report", fail)
    study = small_study(protocol__rounds=1, test=False, engine__pictures=False)
    (tmp_path / "study.toml").write_text(to_toml(study))
    monkeypatch.setattr(sys, "argv", ["concilium", "run", str(tmp_path / "study.toml"), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 0
    assert "No report could be made: ZeroDivisionError: by design" in capsys.readouterr().err.replace("\n", " ")
    assert not list((tmp_path / "run").glob("sites/*/pictures"))
