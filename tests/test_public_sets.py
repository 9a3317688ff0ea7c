"""The studies of three public sets, on fakes that are laid out as the sets are when they are downloaded."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

import concilium as cc
from concilium.data.dataset import open_dataset

STUDIES = Path(__file__).parents[1] / "studies"
ROWS, COLUMNS = 40, 48
NAMES = tuple(f"{i:02d}" for i in range(20))
LAYOUTS = ("kvasir-seg", "ham10k", "blastocyst", "blastocyst-three-masks")


@pytest.fixture(scope="module")
def public_sets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("public_sets", STUDIES / "public_sets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(values.astype(np.uint8), isVector=values.ndim == 3), path)


def image(number: int, *, grey: bool = False) -> np.ndarray:
    draw = np.random.default_rng(number)
    return draw.integers(0, 200, (ROWS, COLUMNS) if grey else (ROWS, COLUMNS, 3))


def square(number: int, *, value: int = 255, size: int = 12) -> np.ndarray:
    found = np.zeros((ROWS, COLUMNS), int)
    start = 4 + number % 8
    found[start : start + size, start : start + size] = value
    return found


def fake(layout: str, folder: Path) -> None:
    """A set of twenty pictures, as it is downloaded."""
    for i, name in enumerate(NAMES):
        if layout == "kvasir-seg":
            write(folder / "images" / f"cju{name}.jpg", image(i))
            write(folder / "masks" / f"cju{name}.jpg", np.repeat(square(i)[..., None], 3, axis=2))
        elif layout == "ham10k":
            part = folder / f"HAM10000_images_part_{1 + i % 2}"
            write(part / f"ISIC_00{name}.jpg", image(i))
            masks = folder / "HAM10000_segmentations_lesion_tschandl"
            write(masks / f"ISIC_00{name}_segmentation.png", square(i))
        elif layout == "blastocyst":
            levels = square(i, value=105, size=20) + square(i, value=23, size=10)
            levels[:3], levels[-3:] = 226, 255
            write(folder / "images" / f"Blast {name}.bmp", image(i, grey=True))
            write(folder / "masks" / f"Blast {name}.png", levels)
        else:
            write(folder / "Images" / f"Blast_PCRM_{name} D5.BMP", image(i))
            for j, of in enumerate(("ZP", "TE", "ICM")):
                write(folder / f"GT_{of}" / f"Blast_PCRM_{name} D5 {of}_Mask.bmp", square(i, size=24 - 8 * j))
    if layout == "ham10k":
        rows = [f'"HAM_{i // 2:07d}","ISIC_00{name}","nv"' for i, name in enumerate(NAMES)]
        (folder / "HAM10000_metadata.csv").write_text("\n".join(["lesion_id,image_id,dx", *rows]) + "\n")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_downloaded_can_be_run_as_the_study_says(layout: str, tmp_path: Path, public_sets: ModuleType) -> None:
    name = layout.removesuffix("-three-masks")
    fake(layout, tmp_path / "downloaded")
    out = tmp_path / "data" / name
    assert public_sets.lay_out(name, tmp_path / "downloaded", out) == (20, [])
    study = tmp_path / "studies" / f"{name}.toml"
    study.parent.mkdir()
    study.write_text((STUDIES / f"{name}.toml").read_text(encoding="utf-8"), encoding="utf-8")
    checked = cc.check(study)
    assert checked.exit_code == 0, checked.found
    labels = tomllib.loads(study.read_text(encoding="utf-8"))
    assert labels["partition"]["data"] == f"../data/{name}"
    dataset = open_dataset(out)
    assert len(dataset.cases) == 20


def label_of(out: Path, case: str) -> np.ndarray:
    found: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(out / "labelsTr" / f"{case}.png"))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_mean_what_they_show(layout: str, tmp_path: Path, public_sets: ModuleType) -> None:
    name = layout.removesuffix("-three-masks")
    fake(layout, tmp_path / "downloaded")
    public_sets.lay_out(name, tmp_path / "downloaded", tmp_path / "out")
    case = {"kvasir-seg": "cju03", "ham10k": "ISIC_0003", "blastocyst": "Blast_03"}.get(layout, "Blast_PCRM_03_D5")
    label = label_of(tmp_path / "out", case)
    if layout in ("kvasir-seg", "ham10k"):
        assert (label == (square(3) > 0)).mean() > 0.995  # JPEG blurs an edge
        assert set(np.unique(label)) == {0, 1}
    elif layout == "blastocyst":
        expected = np.zeros((ROWS, COLUMNS), int)
        expected[square(3, size=20) > 0] = 1
        expected[square(3, size=10) > 0] = 2
        expected[:3], expected[-3:] = 3, 4
        assert np.array_equal(label, expected)
    else:
        expected = np.zeros((ROWS, COLUMNS), int)
        for value, size in ((1, 24), (2, 16), (3, 8)):
            expected[square(3, size=size) > 0] = value
        assert np.array_equal(label, expected)
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert ("blastocoel" in about["labels"]) == (layout == "blastocyst")
    assert set(np.unique(label)) <= set(about["labels"].values())
    if layout == "ham10k":
        assert about["patient"]["ISIC_0002"] == about["patient"]["ISIC_0003"] == "HAM_0000001"
    else:
        assert len(set(about["patient"].values())) == 20


def test_what_cannot_be_used_is_left_out_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "downloaded"
    fake("kvasir-seg", folder)
    (folder / "masks" / "cju03.jpg").unlink()
    write(folder / "masks" / "cju05.jpg", square(5)[:30])
    (folder / "images" / "cju07.jpg").write_bytes(b"no picture")
    command: list[Any] = [
        sys.executable,
        STUDIES / "public_sets.py",
        "kvasir-seg",
        folder,
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    lines = done.stdout.splitlines()
    assert lines[0] == "17 cases"
    assert lines[1] == "Left out: cju03.jpg: it has no mask"
    assert lines[2] == "Left out: cju05.jpg: it has (40, 48) pixels, a mask (30, 48)"
    assert lines[3].startswith("Left out: cju07.jpg: it cannot be read (")
    assert len(list((tmp_path / "out" / "imagesTr").iterdir())) == 17
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "is not empty. Give another --out." in again.stderr


def test_a_folder_that_is_missing_is_said(tmp_path: Path, public_sets: ModuleType) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "images").mkdir()
    with pytest.raises(SystemExit, match="has no folder masks, but images, pictures"):
        public_sets.lay_out("kvasir-seg", tmp_path, tmp_path / "out")
