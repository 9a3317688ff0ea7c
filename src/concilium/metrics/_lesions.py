"""Lesions found, missed and false, by one written rule (docs/metrics.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from concilium.metrics import Pair


@dataclass(frozen=True)
class Lesions:
    """How many lesions of the reference are found and missed, and how many of the prediction are false."""

    found: int
    missed: int
    false: int


def count_lesions(pair: Pair) -> Lesions:
    """Lesions are the connected components of a mask; voxels that touch at a corner are connected (26, in 2D 8 neighbours).

    One of the reference is found if at least 10 % of its voxels are predicted, by however many components, and missed
    otherwise. One of the prediction is false if none of its voxels is in the reference. None is too small to count. The
    share is the first condition of Commowick et al. 2018, doi:10.1038/s41598-018-31911-7; their others are not asked.
    """
    prediction, reference = pair.cropped
    connected = np.ones((3,) * reference.ndim, bool)
    lesions, n_lesions = ndimage.label(reference, structure=connected)
    predicted, n_predicted = ndimage.label(prediction, structure=connected)
    both = prediction & reference
    sizes = np.bincount(lesions[reference], minlength=n_lesions + 1)[1:]
    covered = np.bincount(lesions[both], minlength=n_lesions + 1)[1:]
    found = int(np.count_nonzero(10 * covered >= sizes))
    return Lesions(found, n_lesions - found, n_predicted - np.unique(predicted[both]).size)
