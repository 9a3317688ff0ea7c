"""`concilium predict`, from the run folder alone, gives what was scored."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from concilium.errors import StudyError
from concilium.evaluation import evaluate
from concilium.line import run
from concilium.metrics import Pair
from concilium.metrics.dice import metric as dice
from concilium.predict import predict
from concilium.study import Study


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture(scope="module")
def run_folder(small_study: Callable[..., Study], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "run"
    run(small_study(protocol__rounds=2, protocol__steps=4, protocol__compare=["local"]), folder)
    shutil.rmtree(folder / "cache")
    return folder


@pytest.mark.parametrize("model", ["federated", "local:south"])
def test_predictions_are_what_was_scored(model: str, run_folder: Path, phantom: Path, tmp_path: Path) -> None:
    assert predict(run_folder, phantom / "test" / "imagesTr", tmp_path / "out", model=model) == []
    results = json.loads((run_folder / "results.json").read_text())
    scored = [c for c in results["cases"] if (c["model"], c["subset"]) == (model, "test")]
    assert len(scored) == 6  # 3 cases, 2 labels
    ids = json.loads((phantom / "test" / "dataset.json").read_text())["labels"]
    for case in scored:
        reference = sitk.ReadImage(str(phantom / "test" / "labelsTr" / f"{case['case']}.nii.gz"))
        predicted = sitk.ReadImage(str(tmp_path / "out" / f"{case['case']}.nii.gz"))
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(predicted, geometry)() == pytest.approx(getattr(reference, geometry)())
        value = ids[case["label"]]
        a, b = (sitk.GetArrayFromImage(x) == value for x in (predicted, reference))
        assert dice(Pair(a, b, None)) == case["dice"]
    evaluation = evaluate(tmp_path / "out", phantom / "test" / "labelsTr")
    told = [{k: v for k, v in case.items() if k not in ("model", "seed", "fold", "site", "subset")} for case in scored]
    assert list(evaluation.cases) == told  # `concilium evaluate` scores as a run does
    assert evaluation.problems == evaluation.warnings == ()


@pytest.mark.slow
def test_the_command_needs_neither_the_sites_nor_their_data(run_folder: Path, phantom: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("study.toml", "plans.json", "dataset.json", "weights"):
        (shutil.copytree if (run_folder / name).is_dir() else shutil.copy)(run_folder / name, moved / name)
    text = (moved / "study.toml").read_text()
    (moved / "study.toml").write_text(text.replace(str(phantom), "/no/such/folder"))
    command = [
        sys.executable,
        "-m",
        "concilium",
        "predict",
        str(moved),
        "-i",
        str(phantom / "test" / "imagesTr"),
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predict(run_folder, phantom / "test" / "imagesTr", tmp_path / "same")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert len(names) == 3
    for name in names:
        assert np.array_equal(voxels(tmp_path / "out" / name), voxels(tmp_path / "same" / name))


def test_a_model_that_is_not_there_is_refused_with_those_that_are(
    run_folder: Path, phantom: Path, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=r"'federated2'\. Did you mean 'federated'\? Known: federated, local:north"):
        predict(run_folder, phantom / "test" / "imagesTr", tmp_path, model="federated2")


def test_an_image_that_cannot_be_read_is_skipped_and_reported(run_folder: Path, phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom / "test" / "imagesTr", tmp_path / "images")
    broken = sorted((tmp_path / "images").iterdir())[0]
    broken.write_bytes(b"no image")
    ((case, reason),) = predict(run_folder, tmp_path / "images", tmp_path / "out")
    assert broken.name.startswith(case)
    assert "cannot be read" in reason
    assert len(list((tmp_path / "out").iterdir())) == 2
