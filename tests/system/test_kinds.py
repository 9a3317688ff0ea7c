"""The line with other kinds of images, plans and networks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skimage import io

from concilium.line import run
from concilium.predict import predict
from concilium.reports.table import build, to_text
from concilium.study import Study

Make = Callable[..., Study]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colour PNGs of differing size at two sites and a test set: a bright disc on a dark ground, two frames a video."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for site, n, shape in (("norway", 8, (64, 72)), ("spain", 4, (56, 64)), ("test", 4, (64, 64))):
        folder = root / site
        for sub in ("imagesTr", "labelsTr"):
            (folder / sub).mkdir(parents=True)
        rows, columns = np.mgrid[: shape[0], : shape[1]]
        for i in range(n):
            label = ((rows - rng.integers(20, 36)) ** 2 + (columns - rng.integers(20, 44)) ** 2 < 12**2).astype(
                np.uint8
            )
            image = np.clip(rng.normal(70, 15, (*shape, 3)) + 90 * label[..., None], 0, 255).astype(np.uint8)
            io.imsave(folder / f"imagesTr/{site}{i}_0000.png", image, check_contrast=False)
            io.imsave(folder / f"labelsTr/{site}{i}.png", label, check_contrast=False)
        about = {
            "channel_names": {"0": "R", "1": "G", "2": "B"},
            "labels": {"background": 0, "polyp": 1},
            "numTraining": n,
            "file_ending": ".png",
            "patient": {f"{site}{i}": f"video{i // 2}" for i in range(n)},
        }
        (folder / "dataset.json").write_text(json.dumps(about))
    return root


@pytest.fixture
def polyps(small_study: Make, pictures: Path) -> Study:
    return small_study(
        sites=("norway", "spain"), data=pictures, test__data=str(pictures / "test"), plan__configuration="2d",
        training__patch_size=[32, 32], training__mirror=True, training__optimizer="sgd",
    )  # fmt: skip


def test_colour_pictures_in_2d(polyps: Study, pictures: Path, tmp_path: Path) -> None:
    outcome = run(polyps, tmp_path / "run")
    assert outcome.exit_code == 0
    assert {c["unit"] for c in outcome.results["cases"]} == {"px"}  # PNG has no spacing
    patients = {c["patient"] for c in outcome.results["cases"] if c["site"] == "norway"}
    assert len(patients) == 1  # a fold of four videos holds out one, whole
    assert len({c["case"] for c in outcome.results["cases"] if c["site"] == "norway"}) == 2
    assert predict(tmp_path / "run", pictures / "test" / "imagesTr", tmp_path / "out") == []
    written = io.imread(tmp_path / "out" / "test0.png")
    assert written.shape == io.imread(pictures / "test" / "labelsTr" / "test0.png").shape
    assert set(np.unique(written)) <= {0, 1}


def test_volumes_slice_by_slice(small_study: Make, tmp_path: Path) -> None:
    study = small_study(plan__configuration="2d", training__patch_size=[16, 16], protocol__rounds=1)
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    assert {c["unit"] for c in outcome.results["cases"]} == {"mm"}


def test_a_residual_encoder_by_its_preset(small_study: Make, tmp_path: Path) -> None:
    outcome = run(small_study(plan__planner="resenc_m", protocol__rounds=1, test=False), tmp_path / "run")
    assert outcome.exit_code == 0
    assert any(name.startswith("stem.") for name in load_file(tmp_path / "run" / "weights" / "federated.safetensors"))


def test_a_network_from_outside_is_one_stage(small_study: Make, tmp_path: Path) -> None:
    study = small_study(
        network__name="faults:blob", network__base_features=None, network__width=4, test=False,
        protocol__compare=["local"], sites=("north",),
    )  # fmt: skip
    assert run(study, tmp_path / "run").exit_code == 0
    shared = load_file(tmp_path / "run" / "weights" / "federated.safetensors")
    own = load_file(tmp_path / "run" / "sites" / "north" / "models" / "local.safetensors")
    assert all(name.startswith("whole.") for name in shared)
    assert all(torch.equal(shared[name], own[name]) for name in shared)  # dropout included


def test_no_environment_variable_of_nnu_net_is_needed() -> None:
    assert not [name for name in os.environ if name.lower().startswith("nnunet")]


def test_a_site_that_names_no_patients_is_told_beside_its_figures(
    small_study: Make, phantom: Path, tmp_path: Path
) -> None:
    """Two images of a patient then count as two patients: the run goes on, and says so."""
    for site in ("north", "south"):
        shutil.copytree(phantom / site, tmp_path / site)
    about = json.loads((tmp_path / "south" / "dataset.json").read_text())
    del about["patient"]
    (tmp_path / "south" / "dataset.json").write_text(json.dumps(about))
    study = small_study(
        sites=("north", "south"), data=tmp_path, test=False, protocol__rounds=1, protocol__steps=1,
        protocol__compare=["centralized"],
    )  # fmt: skip
    results = run(study, tmp_path / "run").results
    (told,) = [w for w in results["warnings"] if "atients unknown" in w]
    assert told.startswith("south: Patients unknown (no complete patient table in dataset.json)")
    assert "intervals may be too narrow" in told
    table = to_text(build([results]), "markdown")
    assert "patients unknown at south" in table
