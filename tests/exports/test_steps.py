"""The script that is exported follows nnU-Net's arithmetic to the bit, where the network's logits are the same."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import make_run
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

from concilium.data.dataset import open_dataset, read_case
from concilium.data.patches import predict_logits
from concilium.data.preprocess import preprocess, restore
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


def compare(finished: Finished, data: Path) -> None:
    """Every step of every case against nnU-Net's own."""
    about = sidecar(finished, [])
    dataset = open_dataset(data)
    (network,) = finished.networks()
    for case in dataset.cases[:1]:
        image, _, properties = read_case(case, dataset)
        expected, geometry = preprocess(case, dataset, finished.plan)
        x, own = _steps.preprocess(image, properties["spacing"], about)
        assert x.dtype == np.float32
        assert np.array_equal(x, expected)

        mirror = finished.study.training.mirror
        expected_logits = predict_logits(
            network, expected, finished.plan, labels=finished.labels, device=CPU, mirror=mirror, precision="float32"
        )

        def run(part: Any) -> Any:
            with torch.inference_mode():
                return network(torch.from_numpy(part))[0].numpy()

        logits = _steps.slide(x, run, about)
        assert logits.dtype == np.float16
        assert np.array_equal(logits, expected_logits.numpy())
        labels = _steps.restore(logits, own, about)
        assert np.array_equal(labels, restore(expected_logits, finished.plan, finished.labels, geometry))


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


def test_an_empty_image_passes(volume_run: Path) -> None:
    finished = open_finished(volume_run)
    about = sidecar(finished, [])
    x, geometry = _steps.preprocess(np.zeros((2, 9, 30, 31), np.float32), (2.5, 1.1, 0.8), about)
    assert geometry["whole"] == (9, 30, 31)
    logits = np.stack([np.full(x.shape[1:], v, np.float16) for v in (0, 2, 1)])
    assert np.array_equal(_steps.restore(logits, geometry, about), np.ones((9, 30, 31), np.uint8))


def test_the_script_needs_four_packages_and_is_short() -> None:
    tree = ast.parse(inspect.getsource(_steps))
    imported = {
        (a.name if isinstance(n, ast.Import) else str(n.module)).split(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, ast.Import | ast.ImportFrom)
        for a in n.names
    }
    standard = {"__future__", "itertools", "json", "math", "pathlib", "sys", "typing"}
    assert imported - standard == {"numpy", "scipy", "onnxruntime", "SimpleITK"}
    assert len(inspect.getsource(_steps).splitlines()) <= 150
