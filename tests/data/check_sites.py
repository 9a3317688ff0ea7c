"""Small data sets for the tests of `check`, and their findings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from concilium.data.check import check

SHAPE = (4, 5, 6)
"""Axes z, y, x."""
SPACING = (0.7, 0.8, 2.0)
"""x, y, z [mm]."""


def site(folder: Path, *, n: int = 6, seed: int = 0, prefix: str = "c", **about: Any) -> Path:
    """Six patients with one case each, two boxes of noise, oblique and away from the origin: nothing is wrong."""
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    names = [f"{prefix}{i}" for i in range(n)]
    settings = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": n,
        "file_ending": ".nii.gz",
        "patient": {name: f"patient of {name}" for name in names},
    }
    (folder / "dataset.json").write_text(json.dumps(settings | about))
    for i, name in enumerate(names):
        write(folder, name, seed=100 * seed + i)
    return folder


def write(
    folder: Path, case: str, image: np.ndarray | None = None, label: np.ndarray | None = None, *, seed: int = 0,
    place: dict[str, Any] | None = None, label_place: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """One case; `place` and `label_place`: arguments of `save`."""
    if image is None:
        image = np.random.default_rng(seed).normal(100, 10, SHAPE).astype(np.float32)
    if label is None:
        label = np.zeros(image.shape, np.uint8)
        label[1:3, 1:4, 2:5] = 1
    place = place or {}
    save(folder / f"imagesTr/{case}_0000.nii.gz", image, **place)
    save(folder / f"labelsTr/{case}.nii.gz", label, **(place if label_place is None else label_place))


def save(
    path: Path, array: np.ndarray, *, spacing: Sequence[float] = SPACING, origin: Sequence[float] = (-7.0, 3.5, 11.0),
    direction: Sequence[float] = (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1),
) -> None:  # fmt: skip
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(spacing))
    image.SetOrigin(tuple(origin))
    image.SetDirection(tuple(direction))
    sitk.WriteImage(image, str(path))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change `dataset.json`; None removes a key."""
    path = folder / "dataset.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def found(folder: Path, **more: Any) -> dict[str, list[str | None]]:
    """Code -> cases, of one site."""
    codes: dict[str, list[str | None]] = {}
    for f in check({"a": folder}, **more).findings:
        codes.setdefault(f.code, []).append(f.case)
    return codes
