"""Random masks of the size of an organ in a thumbnail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

Masks = tuple[NDArray[np.bool_], NDArray[np.bool_], tuple[float, ...]]


@pytest.fixture
def blobs() -> Callable[..., Masks]:
    """A function that gives two overlapping random masks and a random anisotropic spacing [mm]."""

    def draw(seed: int, dimensions: int) -> Masks:
        random = np.random.default_rng([seed, dimensions])
        shape = random.integers(12, 24, dimensions) * (2 if dimensions == 2 else 1)
        common = ndimage.gaussian_filter(random.standard_normal(shape), 2.0)
        masks = []
        for _ in range(2):
            field = common + 0.4 * ndimage.gaussian_filter(random.standard_normal(shape), 1.5)
            masks.append(field > np.quantile(field, random.uniform(0.6, 0.95)))
        return masks[0], masks[1], tuple(random.uniform(0.3, 4.0, dimensions).tolist())

    return draw
