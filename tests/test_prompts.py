"""Boxes and points: read, brought to the preprocessed image, and answered by a model of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage import io

import concilium
from concilium.data.dataset import open_dataset
from concilium.data.plan import open_plan
from concilium.data.preprocess import preprocess, restore
from concilium.errors import DataError, StudyError
from concilium.finished import open_finished
from concilium.networks.sam import prompted
from concilium.predict import predict
from concilium.prompts import placed, read_prompts

SITES, N = ("a", "b"), 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a bright blot on black, of which nnU-Net's cropping leaves a part."""
    folder = tmp_path_factory.mktemp("blots")
    rng = np.random.default_rng(0)
    for site in SITES:
        for part in ("imagesTr", "labelsTr"):
            (folder / site / part).mkdir(parents=True)
        for i in range(N):
            image, label = np.zeros((60, 48), np.uint8), np.zeros((60, 48), np.uint8)
            image[10:58, 5:40] = rng.integers(20, 60, (48, 35))
            label[20 + i : 31, 12 : 25 + i] = 1
            image[label > 0] += 150
            io.imsave(folder / site / f"imagesTr/{site}{i}_0000.png", image, check_contrast=False)
            io.imsave(folder / site / f"labelsTr/{site}{i}.png", label, check_contrast=False)
        about = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "blot": 1}, "numTraining": N}
        (folder / site / "dataset.json").write_text(json.dumps(about | {"file_ending": ".png"}))
    return folder


def tables(data: Path, resize: bool, network: str = "sam") -> dict[str, Any]:
    sam = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "image_size": 32, "decoder_features": 16}
    return {
        "study": {"name": "blots", "seed": 1},
        "sites": {name: {"data": str(data / name)} for name in SITES},
        "protocol": {"rounds": 1, "steps": 1},
        "plan": {"configuration": "2d"},
        "validation": {"folds": 2},
        "network": {"name": network, **(sam if network == "sam" else {"base_features": 4})},
        "training": {"optimizer": "adamw", "batch_size": 2, "mirror": False},
        "engine": {"threads": 1, "pictures": False},
    } | ({"preprocessing": {"name": "resize", "size": [32, 40]}} if resize else {})


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    known: dict[Any, Path] = {}

    def made(resize: bool, network: str = "sam") -> Path:
        if (resize, network) not in known:
            out = tmp_path_factory.mktemp("run") / "out"
            assert concilium.run(tables(data, resize, network), out).exit_code == 0
            known[resize, network] = out
        return known[resize, network]

    return made


def written(folder: Path, table: Any) -> Path:
    path = folder / "boxes.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


@pytest.mark.parametrize("resize", [False, True], ids=["cropped", "resized"])
def test_a_box_about_something_is_about_it_after_preprocessing(
    data: Path, finished: Callable[..., Path], tmp_path: Path, resize: bool
) -> None:
    plan = open_plan((finished(resize) / "plans.json").read_text(), "2d")
    dataset = open_dataset(data / "a")
    for case in dataset.cases:
        label = io.imread(case.label)
        rows, columns = (np.flatnonzero((label > 0).any(axis)) for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1], rows[-1]]
        middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, 1]
        told = {"boxes": [list(map(int, box))], "points": [[middle]]}
        at = read_prompts(written(tmp_path, {case.name: told}))[case.name]
        image, properties = preprocess(case, dataset, plan)
        found = placed(at, image.shape, properties, plan)
        assert found.boxes is not None
        assert found.points is not None
        bright = image[0, 0] > (image[0, 0].max() + image[0, 0].min()) / 2
        rows, columns = (np.flatnonzero(bright.any(axis)) for axis in (1, 0))
        expected = torch.tensor([columns[0], rows[0], columns[-1], rows[-1]], dtype=torch.float64)
        assert float((found.boxes[0] - expected).abs().max()) <= 1.0
        assert torch.allclose(found.points[0, 0], (found.boxes[0, :2] + found.boxes[0, 2:]) / 2)
        if resize:
            assert image.shape[-2:] == (32, 40), "both axes are stretched by factors of their own"
    outside = read_prompts(written(tmp_path, {"a0": [[0, 0, 48, 10]]}))["a0"]
    with pytest.raises(DataError, match="Allowed: columns 0 to 47, rows 0 to 59"):
        placed(outside, image.shape, properties, plan)


def test_what_any_prompt_finds_is_in_the_label_map(data: Path, finished: Callable[..., Path], tmp_path: Path) -> None:
    """The label map of two boxes is that of either; other boxes give others; what has none is named and left out."""
    run, images = finished(True), data / "a" / "imagesTr"
    boxes = {"one": [[12, 20, 24, 30]], "other": [[30, 40, 39, 57]]}
    boxes["both"] = boxes["one"] + boxes["other"]
    found = {}
    for name, of in boxes.items():
        file = written(tmp_path, {"a0": of})
        skipped = predict(run, images, tmp_path / name, boxes=file, model="federated")
        assert [case for case, _ in skipped] == ["a1", "a2", "a3"]
        assert all("has no prompt" in why for _, why in skipped)
        found[name] = io.imread(tmp_path / name / "a0.png")
    assert found["both"].shape == (60, 48)
    model = open_finished(run, "federated")
    image, properties = preprocess(open_dataset(data / "a").cases[0], open_dataset(data / "a"), model.plan)
    at = placed(read_prompts(written(tmp_path, {"a0": boxes["one"]}))["a0"], image.shape, properties, model.plan).boxes
    with torch.no_grad():
        answers = prompted(model.networks()[0].eval(), torch.from_numpy(image[:, 0].copy())[None], boxes=at)
    direct = restore(answers.logits[0][:, None], model.plan, model.labels, properties)
    assert np.array_equal(direct[0], found["one"])
    assert predict(run, images, tmp_path / "none", model="federated") == []
    plain = io.imread(tmp_path / "none" / "a0.png")
    maps = [*found.values(), plain]
    assert len({m.tobytes() for m in maps}) > 1, "prompts change nothing"
    assert (found["both"] >= np.maximum(found["one"], found["other"])).all()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("[1, 2]", "it is no table of cases"),
        ({"a0": [[5, 5, 1, 9]]}, "the first two no larger than the last two"),
        ({"a0": [[1, 2, 3]]}, "boxes of a0 are not four numbers each"),
        ({"a0": {"circles": []}}, "a0 has circles, not boxes or points"),
        ({"a0": {"points": [[1, 2, 1]]}}, "points of a0 are not lists of column, row, and 1 or 0"),
        ({"a0": {"boxes": [[1, 2, 3, 4]], "points": [[[1, 2, 1]], [[1, 2, 0]]]}}, "1 boxes and 2 lists of points"),
        ({"a0": [["x"]]}, "boxes of a0 are no table of numbers"),
        ({"a0": []}, "boxes of a0 are empty"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_no_prompt_is_refused(table: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read_prompts(written(tmp_path, table))


def test_who_cannot_be_asked_says_so(data: Path, finished: Callable[..., Path], tmp_path: Path) -> None:
    images = data / "a" / "imagesTr"
    with pytest.raises(DataError, match=r"has prompts for 1 cases that have no image \(z\)"):
        predict(finished(True), images, tmp_path / "out", boxes=written(tmp_path, {"z": [[1, 2, 3, 4]]}))
    with pytest.raises(StudyError, match="--boxes is not possible with this model"):
        predict(finished(True, "unet"), images, tmp_path / "out", boxes=written(tmp_path, {"a0": [[1, 2, 3, 4]]}))
