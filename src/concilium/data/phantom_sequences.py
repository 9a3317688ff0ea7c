"""A synthetic data set whose structures need two images to be told from what looks like them: for `vertical`, and for the tests.

Three sequences of one body. A lesion is bright in the first and in the second; one kind of false lesion is bright in the first
only, another in the second only. So each by itself shows two kinds of spots that look alike. The third shows the body's outline.
Every sequence lies in a folder of its own, as at an institute of its own; a held-out set has all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from concilium.data.draws import digest

Array: TypeAlias = NDArray[np.float64]

SEQUENCES = ("first", "second", "third")
LABELS = {"background": 0, "lesion": 1}
SPACING = (1.0, 1.0, 2.0)
"""(x, y, z) [mm]."""
N_SPOTS = 2
"""Of each kind."""


def write_sequences(folder: Path, *, seed: int = 0, n_cases: int = 20, n_test: int = 8, size: int = 32) -> None:
    """One raw folder for each sequence and one called `test` with all; label maps lie with the first and the test set.

    Args:
        folder: where the folders are written; made if missing.
        seed: another seed, other patients.
        n_cases: patients at the institutes.
        n_test: patients of the held-out set.
        size: voxels of an image along x and y; along z a quarter.
    """
    names = [f"case_{i:03d}" for i in range(n_cases)]
    drawn = {name: _drawn((seed, name), size) for name in names}
    for place, sequence in enumerate(SEQUENCES):
        _write(folder / sequence, drawn, (place,), labelled=place == 0)
    held_out = {f"test_{i:03d}": _drawn((seed, f"test_{i:03d}"), size) for i in range(n_test)}
    _write(folder / "test", held_out, range(len(SEQUENCES)), labelled=True)


def _drawn(key: tuple[int, str], size: int) -> tuple[Array, NDArray[np.uint8]]:
    """Sequences (3, z, y, x) and label map (z, y, x) of a patient."""
    rng = np.random.default_rng(digest("sequences", *key))
    shape = (max(8, size // 4), size, size)
    grid: Any = np.meshgrid(*((np.arange(n) - (n - 1) / 2) / (n / 2) for n in shape), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in grid))
    body = radius < 0.92
    bright = np.zeros((2, *shape))
    label = np.zeros(shape, np.uint8)
    for kind in ("both", "first", "second"):
        for _ in range(N_SPOTS):
            centre = rng.uniform(-0.6, 0.6, 3)
            radii = rng.uniform(0.16, 0.28, 3) * np.array([1.6, 1.0, 1.0])
            spot = sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radii, strict=True)) < 1
            for i, sequence in enumerate(SEQUENCES[:2]):
                if kind in ("both", sequence):
                    bright[i][spot] = 1.0
    label[(bright[0] > 0) & (bright[1] > 0) & body] = LABELS["lesion"]
    images = np.stack([*(0.3 * body + 0.5 * b * body for b in bright), 0.6 * body])
    return images + rng.normal(0, 0.05, images.shape), label


def _write(
    folder: Path, drawn: dict[str, tuple[Array, NDArray[np.uint8]]], places: Sequence[int], *, labelled: bool
) -> None:
    for name in ("imagesTr", *(("labelsTr",) if labelled else ())):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, (images, label) in drawn.items():
        for channel, place in enumerate(places):
            _save(np.rint(1000 * images[place]).astype(np.int16), folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        if labelled:
            _save(label, folder / "labelsTr" / f"{name}.nii.gz")
    about = {
        "channel_names": {str(i): SEQUENCES[place] for i, place in enumerate(places)},
        "labels": LABELS,
        "numTraining": len(drawn),
        "file_ending": ".nii.gz",
        "patient": {name: name for name in drawn},
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _save(array: NDArray[Any], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(path), useCompression=True)
