"""Pictures of what an attack found: original, reconstruction and mean image side by side. They stay where they are made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from concilium.leakage.scores import Array, range_of

MOST = 6
"""Patches in a picture, a row each."""
SMALLEST = 96
"""A side of a patch is shown at this many pixels at least."""


def shower(folder: Path) -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """Writes a picture NAME.png into the folder: a row for each of the first patches, and of each channel three columns."""

    def show(name: str, truth: Tensor, found: Tensor, naive: Tensor) -> None:
        within = range_of(truth.numpy())
        rows = []
        for images in zip(truth[:MOST], found[:MOST], naive[:MOST], strict=True):
            low, high = (end.reshape(-1, *[1] * (truth.ndim - 2)) for end in (within.low, within.high))
            grey = [np.clip((x.numpy() - low) / (high - low), 0, 1) for x in images]
            rows.append(np.concatenate([_flat(x[c]) for c in range(truth.shape[1]) for x in grey], axis=1))
        picture = Image.fromarray(np.rint(255 * np.concatenate(rows)).astype(np.uint8))
        times = max(1, -(-SMALLEST * MOST // picture.height))
        folder.mkdir(parents=True, exist_ok=True)
        file = re.sub(r"[^A-Za-z0-9.]+", "-", name) + ".png"
        picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST).save(folder / file)

    return show


def _flat(image: Array) -> Array:
    """A picture as it is; of a volume the middle slice across its shortest axis."""
    if image.ndim == 2:
        return image
    axis = int(np.argmin(image.shape))
    middle: Array = np.take(image, image.shape[axis] // 2, axis)
    return middle
