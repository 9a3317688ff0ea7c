"""What defences cost and what they are worth, in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from concilium.cli import app
from concilium.errors import StudyError
from concilium.leakage import Amount, Asked
from concilium.leakage.price import _falls, _with_pareto, price
from concilium.line import run
from concilium.messages import PlugIn
from concilium.reports._leaks import price_rows
from concilium.study import Study

Make = Callable[..., Study]
QUICK = Asked(attacks=("inversion",), options={"inversion": {"steps": 60}}, amount=Amount(8, 16, 4))


def row(name: str, dice: float | None, leak: float | None) -> dict[str, Any]:
    leaks = {} if leak is None else {"ssim": {"found": leak, "naive": 0.1}}
    return {"model": name, "defended": "", "subset": "test", "dice": dice, "leaks": leaks}


def test_the_pareto_set_is_what_nothing_beats() -> None:
    rows = [
        row("none", 0.8, 0.9),
        row("good", 0.79, 0.3),
        row("worse", 0.7, 0.5),
        row("deep", 0.6, 0.1),
        row("as", 0.6, 0.2),
    ]
    found = {
        r["model"]
        for r in _with_pareto([*rows, row("unscored", None, 0.0), row("unattacked", 0.9, None)])
        if r["pareto"]
    }
    assert found == {"none", "good", "deep"}


def test_equal_models_are_both_in_it() -> None:
    assert all(r["pareto"] for r in _with_pareto([row("a", 0.5, 0.5), row("b", 0.5, 0.5)]))


def test_how_leakage_goes_with_the_level_of_a_defence_is_told(small: Make) -> None:
    base = small("splitfed")
    levels = {0.5: 0.8, 4.0: 0.3, 1.0: 0.7, 2.0: 0.5}
    models = {f"n{i}": replace(base, defences=(PlugIn("gaussian", {"scale": i, "bound": 3.0}),)) for i in levels}
    rows = [row(f"n{i}", 0.5, leak) for i, leak in levels.items()]
    other = {"none": base, "tighter": replace(base, defences=(PlugIn("gaussian", {"scale": 9.0, "bound": 1.0}),))}
    found = _falls(models | other, [*rows, row("none", 0.5, 0.9), row("tighter", 0.5, 0.9)])
    assert found == ["gaussian, SSIM found by scale: 0.5: 0.80, 1: 0.70, 2: 0.50, 4: 0.30; Spearman -1.00."]
    assert _falls(models, rows[:3]) == [], "three levels are no series"


@pytest.mark.slow
def test_every_model_of_a_run_is_attacked_with_its_own_defence(small: Make, tmp_path: Path) -> None:
    base = small("splitfed", cut="shallow", rounds=1)
    strong = replace(base, defences=(PlugIn("gaussian", {"scale": 50.0, "bound": 1.0}),))
    study = replace(base, variants={"noisy": strong})
    folder = tmp_path / "run"
    run(study, folder)
    found = price(folder, asked=QUICK)
    assert json.loads((folder / "leakage/price.json").read_text()) == found
    rows = {r["model"]: r for r in found["rows"]}
    assert list(rows) == ["splitfed", "noisy"]
    assert "gaussian" in rows["noisy"]["defended"]
    assert rows["splitfed"]["leaks"]["ssim"]["found"] > rows["noisy"]["leaks"]["ssim"]["found"] + 0.1
    assert rows["splitfed"]["subset"] == "test"
    assert [len(r) for r in price_rows(found)] == [7, 7]
    with pytest.raises(StudyError, match="Leave --model out"):
        price(folder, asked=replace(QUICK, model="noisy"))
    shown = CliRunner().invoke(
        app,
        ["leakage", str(folder), "--compare", "--attack", "inversion", "--option", "inversion.steps=2", "--victims", "4",
         "--own", "8"],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "Pareto" in shown.output
    assert "What defences cost, and what they are worth" in (folder / "report.html").read_text()
