"""Mean weighted by the number of training cases: federated averaging (McMahan et al. 2017, arXiv:1602.05629, algorithm 1)."""

from __future__ import annotations

from concilium.aggregation import Sum
from concilium.messages import Tensors


def rule(total: Sum, state: Tensors, *, before: Tensors) -> tuple[Tensors, Tensors]:
    """The weighted mean of the updates."""
    return total.mean(), state
