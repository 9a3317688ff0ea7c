"""Mean in which every site counts the same, however many cases it has (FednnU-Net: Skorupko et al. 2025, arXiv:2503.02549).

With weights by cases a large hospital decides. Without them a small one counts as much, and its noise does too. A site that
took only part of its steps counts in part.
"""

from __future__ import annotations

from concilium.aggregation import Sum
from concilium.messages import Tensors


def weight(n_cases: int, share: float) -> float:
    """What an update counts in the sum."""
    return share


def rule(total: Sum, state: Tensors, *, before: Tensors) -> tuple[Tensors, Tensors]:
    """The mean of the updates."""
    return total.mean(), state
