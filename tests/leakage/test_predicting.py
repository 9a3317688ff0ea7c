"""An audit of a finished vertical model at work: what parties send in prediction, and a defence that is off there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

import concilium
from concilium import catalog
from concilium.attacks import Release, releases
from concilium.cli import app
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.engines._transcript import Keeping, read_transcript
from concilium.errors import StudyError
from concilium.leakage import Amount, Asked, leakage
from concilium.leakage.parties import known_fronts
from concilium.leakage.predicting import look, predicting_scenes
from concilium.leakage.subject import subject_of
from concilium.line import run
from concilium.messages import Look, Looked, PlugIn
from concilium.study import Study, parse_study

pytestmark = pytest.mark.slow

FEW = Amount(victims=4, own=12, gallery=4)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Release, ...]]:
    """A finished run without a defence, with dropout, and with dropout that is off at prediction; and what was sent as the last
    of them was validated."""
    folder = tmp_path_factory.mktemp("predicted")
    write_sequences(folder / "data", n_cases=6, n_test=4, size=16)
    raw = {
        "study": {"name": "parties", "seed": 3},
        "sites": {name: {"data": str(folder / "data" / name), "holds": [name]} for name in SEQUENCES},
        "test": {"data": str(folder / "data/test")},
        "protocol": {"name": "vertical", "labels": "first", "cut": "shallow", "rounds": 1, "steps": 1},
        "network": {"name": "unet", "base_features": 4, "levels": 2},
        "training": {
            "optimizer": "sgd", "batch_size": 2, "patch_size": [8, 16, 16], "mirror": False, "augmentation": "none",
        },
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }  # fmt: skip

    def defended(base: Study, **options: Any) -> Study:
        filled, _ = catalog.fill("defences", "dropout", {"share": 0.9, **options}, "[[defences]]")
        return replace(base, defences=(PlugIn("dropout", filled),))

    def keeping(**told: Any) -> Any:
        return Keeping(catalog.load("engines", "simulation")(**told), folder / "said", kept=(Look, Looked))

    base = parse_study(raw, folder=folder)
    variants = {"dropout": defended(base), "dropout_off": defended(base, at_prediction=False)}
    run(replace(base, variants=variants), folder / "run", connect=keeping)
    last: dict[tuple[str, int, int], Release] = {
        (r.site, r.round, r.step): r for r in releases(read_transcript(folder / "said"))
    }
    return folder / "run", tuple(last.values())


def test_what_is_attacked_is_what_parties_sent_in_validation(
    predicted: tuple[Path, tuple[Release, ...]], tmp_path: Path
) -> None:
    folder, said = predicted
    of = subject_of(folder, "dropout_off", auxiliary=None, work=tmp_path)
    scenes = {s.site: s for s in predicting_scenes(of, FEW)}
    assert scenes.keys() == set(SEQUENCES)
    for site, scene in scenes.items():
        sent = [r for r in said if r.site == site][: len(scene.transcript)]
        assert len(sent) > 0
        assert all(
            torch.equal(a.maps[0], b.maps[0]) and (a.round, a.step) == (b.round, b.step)
            for a, b in zip(scene.transcript, sent, strict=True)
        )
        front = known_fronts(of)[site].eval()
        for i, r in enumerate(
            scene.transcript
        ):  # what is off: the truth gives the very map, for the attacker's cases too
            assert torch.equal(look(of, front, scene.truth.images[i : i + 1], 5).maps[0], r.maps[0])


def test_dropout_that_is_off_at_prediction_defends_training_only(
    predicted: tuple[Path, tuple[Release, ...]], tmp_path: Path
) -> None:
    share: dict[str, float] = {}
    for model in ("vertical", "dropout", "dropout_off"):
        of = subject_of(predicted[0], model, auxiliary=None, work=tmp_path / model)
        front, image = known_fronts(of)["first"], torch.randn(1, 1, 8, 16, 16)
        share[f"{model} {True}"], share[model] = (
            float((look(of, front.train(mode), image, 0).maps[-1] == 0).float().mean()) for mode in (True, False)
        )
    assert share["vertical"] < 0.7
    assert share["dropout"] > 0.85
    assert share["dropout_off"] < 0.7
    assert share["dropout_off True"] > 0.85


def test_the_command_compares_the_models_of_a_vertical_run_in_training_and_in_prediction(
    predicted: tuple[Path, tuple[Release, ...]],
) -> None:
    folder, _ = predicted
    quick = [
        "--compare", "--attack", "inversion", "--attack", "reidentify", "--option", "inversion.steps=2",
        "--option", "inversion.width=4", "--victims", "2", "--own", "4", "--gallery", "4",
    ]  # fmt: skip
    for more in ([], ["--predicting"]):
        done = CliRunner().invoke(app, ["leakage", str(folder), *quick, *more])
        assert done.exit_code == 0, done.output
        told = json.loads((folder / "leakage/price.json").read_text())
        assert [row["model"] for row in told["rows"]] == ["vertical", "dropout", "dropout_off"]
        assert all(set(row["leaks"]) == ({"ssim"} if more else {"ssim", "reidentified"}) for row in told["rows"])
        assert told["of"] == ("prediction" if more else "training")
    audit = json.loads((folder / "leakage/dropout_off/leakage.json").read_text())
    schema = json.loads((Path(concilium.__file__).parent / "leakage.schema.json").read_text())
    Draft202012Validator(schema).validate(audit)
    assert {row["predicting"] for row in audit["rows"]} == {True}
    assert any("maps of prediction" in note for note in audit["notes"])


def test_where_nothing_leaves_in_prediction_there_is_nothing_to_attack(split_run: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="sends nothing of a case that it segments"):
        leakage(split_run, tmp_path, asked=Asked(attacks=("inversion",), amount=FEW, predicting=True))
