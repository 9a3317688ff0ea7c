"""Robust Hausdorff distance (Huttenlocher et al. 1993, doi:10.1109/34.232073), by area as in arXiv:1809.04430."""

from __future__ import annotations

import numpy as np

from concilium.errors import StudyError
from concilium.metrics import Pair, status
from concilium.metrics._surfaces import Surface

UNIT = "distance"
HIGHER_IS_BETTER = False


def metric(pair: Pair, *, percent: float = 95.0) -> float | None:
    """Distance [`pair.unit`] within which `percent` of either surface's area lies from the other surface.

    The larger of the two directions; at 100 the Hausdorff distance itself.
    Empty masks: the rule of `concilium.metrics`.

    Raises:
        StudyError: `percent` is not above 0 and at most 100.
    """
    if not 0 < percent <= 100:
        raise StudyError(f"hd95: percent is {percent}. It must be above 0 and at most 100. Leave it out for 95.")
    if status(pair) != "ok":
        return None
    return max(_percentile(pair.surfaces.prediction, percent), _percentile(pair.surfaces.reference, percent))


def _percentile(surface: Surface, percent: float) -> float:
    """The least distance at which the nearest elements make up `percent` of the area."""
    shares = np.cumsum(surface.areas) / np.sum(surface.areas)
    # The last share may be rounded to just below 1.
    last = min(int(np.searchsorted(shares, percent / 100)), shares.size - 1)
    return float(surface.distances[last])
