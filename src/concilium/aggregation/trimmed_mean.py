"""Coordinate-wise trimmed mean of the updates (Yin et al. 2018, arXiv:1803.01498, definition 2 and algorithm 1).

Each weight becomes the mean over sites without its smallest and its largest values. `share` of the sites is left out at each end,
rounded down, but one at least where three or more sites answered (with 0 none: the unweighted mean). So many sites, whatever they
send, cannot move a weight beyond what the others sent. It ignores numbers of cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from concilium.aggregation import Update
from concilium.aggregation._each import elementwise, middle
from concilium.messages import Tensors

COMPARES = True


def rule(updates: Sequence[Update], state: Tensors, *, before: Tensors, share: float = 0.2) -> tuple[Tensors, Tensors]:
    """The trimmed mean of each weight over sites.

    Args:
        share: part of the sites whose values are left out at each end.
    """
    cut = left_out(len(updates), share)
    return elementwise(updates, lambda _, values: middle(values, cut)), state


def left_out(n_sites: int, share: float) -> int:
    """How many values at each end are left out; one or two remain at least."""
    wanted = math.floor(share * n_sites + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return min(max(wanted, 1 if share else 0), (n_sites - 1) // 2)
