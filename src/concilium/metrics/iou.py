"""Intersection over union (Jaccard 1912, doi:10.1111/j.1469-8137.1912.tb05611.x)."""

from __future__ import annotations

import numpy as np

from concilium.metrics import Pair

UNIT = "1"
HIGHER_IS_BETTER = True


def metric(pair: Pair) -> float | None:
    """Intersection over union |P ∩ R| / |P ∪ R|, from 0 to 1.

    Empty masks: the rule of `concilium.metrics`.
    """
    prediction, reference = pair.cropped
    union = int(np.count_nonzero(prediction | reference))
    if union == 0:
        return None
    return int(np.count_nonzero(prediction & reference)) / union
