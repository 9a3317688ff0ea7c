"""The script that is exported follows nnU-Net's arithmetic to the bit, where the network's logits are the same."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import BOTH, IGNORE, REGIONS, make_run
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from concilium.data._resize import _linear
from concilium.data.dataset import open_dataset, read_case
from concilium.data.preprocess import preprocess, restore
from concilium.data.windows import predict_logits
from concilium.exports import _steps
from concilium.exports._sidecar import sidecar
from concilium.finished import Finished, open_finished

CPU = torch.device("cpu")
SCHEMES = ("ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization")


def configure(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Changes of the plan's configuration, and `transpose` of the plan."""

    def edit(plans: dict[str, Any]) -> None:
        if "transpose" in changes:
            plans["transpose_forward"] = changes["transpose"]
            plans["transpose_backward"] = np.argsort(changes["transpose"]).tolist()
        for configuration in plans["configurations"].values():
            configuration.update({k: v for k, v in changes.items() if k != "transpose"})

    return edit


def compare(finished: Finished, data: Path, *, ulps: int = 0) -> None:
    """Every step of a case against nnU-Net's own, or Concilium's where it resizes.

    `ulps`: of the image's largest value, by which what the network sees may differ.
    """
    about = sidecar(finished, [])
    dataset = open_dataset(data)
    (network,) = finished.networks()
    for case in dataset.cases[:1]:
        image, _, properties = read_case(case, dataset)
        expected, geometry = preprocess(case, dataset, finished.plan)
        x, own = _steps.preprocess(image, properties["spacing"], about)
        assert x.dtype == np.float32
        assert x.shape == expected.shape
        assert np.abs(x - expected).max() <= ulps * np.spacing(np.abs(expected).max())

        mirror = finished.study.training.mirror
        expected_logits = predict_logits(
            network, expected, finished.plan, labels=finished.labels, device=CPU, mirror=mirror, precision="float32"
        )

        def run(part: Any) -> Any:
            with torch.inference_mode():
                return network(torch.from_numpy(part))[0].numpy()

        logits = _steps.slide(expected, run, about)
        assert logits.dtype == np.float16
        assert np.array_equal(logits, expected_logits.numpy())
        labels = _steps.restore(logits, own, about)
        by_name = restore(expected_logits, finished.plan, finished.labels, geometry)
        assert labels.dtype == by_name.dtype
        assert len(np.unique(labels)) > 1
        assert np.array_equal(labels, by_name)


@pytest.mark.parametrize(
    ("spacing", "more"),
    [
        ([2.5, 1.1, 0.8], {"mirror": False}),  # as the images are
        ([2.0, 1.3, 1.0], {"mirror": False}),  # the images are uneven
        ([4.0, 1.0, 1.2], {"mirror": True}),
    ],
    ids=str,
)
def test_steps_are_nnunets_in_3d(spacing: list[float], more: dict[str, Any], volumes: Path, tmp_path: Path) -> None:
    masks = configure(spacing=spacing, use_mask_for_norm=[True, False])
    compare(open_finished(make_run(tmp_path / "run", volumes, patch=[8, 24, 24], edit=masks, **more)), volumes)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("shape", [(5, 9, 8), (7, 4, 11), (6, 7, 9)], ids=str)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((1.0, 1.0, 1.0), (1.2, 0.9, 0.8)),
        ((3.5, 1.0, 1.0), (1.0, 1.0, 1.0)),  # the first axis is coarse
        ((1.0, 1.0, 1.2), (0.9, 4.0, 1.0)),  # the second is to be
        ((0.8, 0.8, 2.5), (0.7, 0.7, 2.5)),
        ((1.0, 0.2, 1.0), (1.0, 1.0, 1.0)),  # two are, and none is resized apart
        ((999.0, 1.0, 1.0), (999.0, 1.3, 1.3)),
    ],
    ids=str,
)
def test_resampling_is_nnunets(old: Any, new: Any, shape: Any, order: int) -> None:
    x = np.random.default_rng(0).normal(0, 5, (2, 6, 7, 9))
    for dtype in (np.float32, np.float16):
        expected = resample_data_or_seg_to_shape(x.astype(dtype), shape, old, new, False, order, 0, None)
        found = _steps.resample(x.astype(dtype), shape, old, new, order)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_normalisations_are_nnunets(scheme: str, volumes: Path, tmp_path: Path) -> None:
    edit = configure(normalization_schemes=[scheme, "ZScoreNormalization"], use_mask_for_norm=[True, True])
    compare(open_finished(make_run(tmp_path / "run", volumes, patch=[8, 24, 24], edit=edit)), volumes)


def test_axes_are_reordered_as_nnunet_does(volumes: Path, tmp_path: Path) -> None:
    edit = configure(transpose=[2, 0, 1], spacing=[0.9, 2.6, 1.0])
    compare(open_finished(make_run(tmp_path / "run", volumes, patch=[24, 8, 24], edit=edit)), volumes)


def test_steps_are_nnunets_in_colour(picture_run: Path, pictures: Path) -> None:
    compare(open_finished(picture_run), pictures)


def test_volumes_are_segmented_slice_by_slice_as_nnunet_does(volumes: Path, tmp_path: Path) -> None:
    finished = open_finished(
        make_run(tmp_path / "run", volumes, configuration="2d", patch=[24, 32], edit=None, mirror=True)
    )
    compare(finished, volumes)


@pytest.mark.parametrize("labels", [REGIONS, IGNORE, BOTH], ids=["regions", "ignore", "both"])
def test_label_spaces_are_decided_as_nnunet_does(labels: dict[str, Any], volumes: Path, tmp_path: Path) -> None:
    finished = open_finished(make_run(tmp_path / "run", volumes, patch=[8, 24, 24], labels=labels, mirror=False))
    about = sidecar(finished, [])
    assert "ignore" not in about["labels"]
    assert about["outputs"] == (3 if labels is IGNORE else 2)
    assert about["regions_class_order"] == labels.get("regions_class_order")
    compare(finished, volumes)


def test_a_region_is_where_nnunet_finds_one(volumes: Path) -> None:
    """For every float16 there is, and float32 around 0, where the sigmoid is rounded to 0.5."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    small = np.linspace(-4e-7, 4e-7, 801, dtype=np.float32)
    manager = LabelManager({"background": 0, "whole": [1, 2], "back": 2}, [1, 2])
    for values in (halves[np.isfinite(halves)], small):
        logits = np.stack([values, values[::-1]])
        expected = manager.convert_logits_to_segmentation(torch.from_numpy(logits.copy())).numpy()
        assert np.array_equal(_steps.decide(logits, [1, 2]), expected)


@pytest.mark.parametrize("intensity", ["zscore", "0-1", (20.0, 130.0)], ids=str)
@pytest.mark.parametrize("kind", ["volume", "slices", "picture"])
def test_images_at_one_size_are_those_of_a_study(
    kind: str, intensity: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """To the last bits of float32: PyTorch sums in an order that depends on the processor."""
    data = request.getfixturevalue("pictures" if kind == "picture" else "volumes")
    resize = {"size": (16, 48, 24) if kind == "volume" else (48, 24), "intensity": intensity}
    configuration = "3d_fullres" if kind == "volume" else "2d"
    labels = REGIONS if kind == "volume" else None
    run = make_run(tmp_path / "run", data, configuration=configuration, resize=resize, labels=labels, mirror=True)
    compare(open_finished(run), data, ulps=4)


@pytest.mark.parametrize(
    ("old", "new"), [(256, 128), (128, 256), (301, 128), (7, 100), (9, 3), (2, 5), (5, 1)], ids=str
)
def test_the_weights_of_a_size_are_pytorchs(old: int, new: int) -> None:
    expected = _linear(torch.eye(old)[None, :, :, None], (new, old, 1))[0, :, :, 0]
    assert np.array_equal(_steps.linear_weights(old, new), expected.numpy())


@pytest.mark.parametrize("kind", ["volume", "picture"])
def test_the_order_in_memory_changes_no_bit(kind: str, request: pytest.FixtureRequest) -> None:
    """MONAI's arrays are transposed, and numpy's means are taken in the order of memory."""
    about = sidecar(open_finished(request.getfixturevalue(f"{kind}_run")), [])
    image = np.random.default_rng(0).normal(100, 40, (len(about["channels"]), 1, 211, 307)).astype(np.float32)
    expected, _ = _steps.preprocess(image, (2.5, 1.1, 0.8), about)
    found, _ = _steps.preprocess(np.asfortranarray(image), (2.5, 1.1, 0.8), about)
    assert np.array_equal(found, expected)


def test_an_empty_image_passes(volume_run: Path) -> None:
    finished = open_finished(volume_run)
    about = sidecar(finished, [])
    x, geometry = _steps.preprocess(np.zeros((2, 9, 30, 31), np.float32), (2.5, 1.1, 0.8), about)
    assert geometry["whole"] == (9, 30, 31)
    logits = np.stack([np.full(x.shape[1:], v, np.float16) for v in (0, 2, 1)])
    assert np.array_equal(_steps.restore(logits, geometry, about), np.ones((9, 30, 31), np.uint8))


@pytest.mark.parametrize(("script", "n_lines"), [("_steps.py", 190), ("_plain.py", 90)])
def test_the_scripts_need_four_packages_and_are_short(script: str, n_lines: int) -> None:
    text = Path(_steps.__file__).with_name(script).read_text()
    imported = {
        (a.name if isinstance(n, ast.Import) else str(n.module)).split(".")[0]
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Import | ast.ImportFrom)
        for a in n.names
    }
    standard = {"__future__", "itertools", "json", "math", "pathlib", "sys", "typing"}
    assert imported - standard == {"numpy", "scipy", "onnxruntime", "SimpleITK"}
    assert len(text.splitlines()) <= n_lines


def test_the_plain_script_has_65_lines_of_code() -> None:
    """As docs/export.md says: neither blank lines nor documentation."""
    text = Path(_steps.__file__).with_name("_plain.py").read_text()
    documented = [n.body[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.FunctionDef)]
    n_lines = sum(bool(line.strip()) for line in text.splitlines())
    assert n_lines - sum((n.end_lineno or 0) - n.lineno + 1 for n in documented) <= 65
