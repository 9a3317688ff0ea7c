"""Dice similarity coefficient (Dice 1945, doi:10.2307/1932409; Sørensen 1948)."""

from __future__ import annotations

import numpy as np

from concilium.metrics import Pair

UNIT = "1"
HIGHER_IS_BETTER = True


def metric(pair: Pair) -> float | None:
    """Dice coefficient 2 |P ∩ R| / (|P| + |R|), from 0 to 1.

    Empty masks: the rule of `concilium.metrics`.
    """
    prediction, reference = pair.cropped
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if total == 0:
        return None
    return 2 * int(np.count_nonzero(prediction & reference)) / total
