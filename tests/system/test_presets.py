"""Every preset in `studies/` runs from end to end on the phantom: its protocol, rules, losses, baselines and all its variants."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from presets import PARTIAL, SMALLER, changed, on_phantoms, shrunk

import concilium as cc
from concilium.errors import StudyError
from concilium.finished import open_finished
from concilium.schedule import names, settings
from concilium.study import parse_study

PRESETS = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
QUICK = {"fednova", "polyps", "splitfed-hippocampus"}
"""These run with the fast tests: one of each protocol, 2D and 3D. All others, also new ones, are slow."""
LIKE_OTHERS = {
    "abdomen-partial", "averaging-lungs", "averaging-nuclei", "averaging-polyps", "averaging-vessels", "blastocyst",
    "corrupted-masks", "defences", "fedsam-lungs", "fedsam-polyps", "glioma", "ham10k", "hippocampus-compared", "kvasir-seg",
    "leakage-defences", "leakage-glioma", "leakage-noise", "leakage-updates", "leakage-vertical", "polyps-compared",
    "transport",
}  # fmt: skip
"""The same tables as in others, on other data, or many models of what has system tests of its own."""


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """How much must be asked of `./test` for this preset to run."""
    if name in QUICK:
        return []
    return [pytest.mark.exhaustive if name in LIKE_OTHERS else pytest.mark.slow]


def raw(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=marks_of(p.stem)) for p in PRESETS])
def test_a_preset_runs(path: Path, tmp_path: Path) -> None:
    study = parse_study(on_phantoms(raw(path), tmp_path / "data"), folder=tmp_path, source=path.name)
    run = cc.run(study, tmp_path / "run")
    assert run.problems == ()
    assert run.exit_code == 0
    expected = {name for members in settings(study) for setting in members for name in names(setting)}
    assert {m["name"] for m in run.results["models"]} == expected
    assert expected >= {study.protocol.name, *raw(path).get("variants", {}), *raw(path)["protocol"].get("compare", ())}
    cases = run.cases
    for name in expected:
        own = cases[cases["model"].str.split(":").str[0] == name]
        for subset in ("validation", *(["test"] if study.test or (study.partition and study.partition.test) else [])):
            dice = own[(own["subset"] == subset) & (own["status"] != "not_annotated")]["dice"]
            assert len(dice.dropna()) > 0, f"{name}, {subset}"
            assert dice.dropna().between(0, 1).all()
    partial = {s.loss.name for s in (study, *study.variants.values())} & PARTIAL
    assert (cases["status"] == "not_annotated").any() == bool(partial), "sites annotate some labels only"
    losses = [s["loss"] for line in _rounds(run.folder) for s in line["sites"].values()]
    assert len(losses) > 0
    assert all(map(math.isfinite, losses))
    for model in run.models:
        export(run, model, tmp_path / "exported" / model.replace(":", "-"))


def export(run: cc.Run, model: str, out: Path) -> None:
    """A model is exported, or is a site's own that does not know all labels."""
    if open_finished(run.folder, model).unknown:
        with pytest.raises(StudyError, match="never learnt"):
            run.export(out, format="safetensors", model=model)
    else:
        folder, _ = run.export(out, format="safetensors", model=model)
        assert any(folder.iterdir())


def _rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_presets_are_found_and_the_quick_ones_are_among_them() -> None:
    assert len(PRESETS) >= 15
    assert {p.stem for p in PRESETS} >= QUICK


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_only_what_costs_time_is_changed(path: Path) -> None:
    """And the study's kind of data decides on nothing but the phantom."""
    tables = raw(path)
    small = shrunk(tables)
    assert changed(tables, small) <= set(SMALLER) | {"folds"}
    assert small.get("variants", {}).keys() == tables.get("variants", {}).keys()
    assert shrunk(small) == small
