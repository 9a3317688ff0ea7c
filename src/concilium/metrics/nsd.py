"""Normalised surface Dice (surface DSC of Nikolov et al. 2018, arXiv:1809.04430)."""

from __future__ import annotations

import math

import numpy as np

from concilium.errors import StudyError
from concilium.metrics import Pair, status
from concilium.metrics._surfaces import Surface

UNIT = "1"
HIGHER_IS_BETTER = True


def metric(pair: Pair, *, tolerance: float = 1.0) -> float | None:
    """Share of both surfaces' area, from 0 to 1, that lies within `tolerance` [`pair.unit`] of the other surface.

    A distance equal to the tolerance is within it. Empty masks: the rule of `concilium.metrics`.

    Raises:
        StudyError: `tolerance` is negative or not finite.
    """
    if not 0 <= tolerance < math.inf:
        raise StudyError(f"nsd: tolerance is {tolerance}. It must be 0 or more [mm, or px]. Leave it out for 1.")
    match status(pair):
        case "both_empty":
            return None
        case "empty_reference" | "empty_prediction":
            return 0.0
    prediction, reference = pair.surfaces.prediction, pair.surfaces.reference
    near = _area_within(prediction, tolerance) + _area_within(reference, tolerance)
    return near / float(np.sum(prediction.areas) + np.sum(reference.areas))


def _area_within(surface: Surface, tolerance: float) -> float:
    return float(np.sum(surface.areas[surface.distances <= tolerance]))
