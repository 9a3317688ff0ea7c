"""Coordinate-wise median of the updates (Yin et al. 2018, arXiv:1803.01498, definition 1 and algorithm 1).

Each weight becomes the median over sites, with an even number of sites the mean of the two in the middle. Fewer than half of
the sites, whatever they send, cannot move a weight beyond what the others sent. It ignores numbers of cases: a site with 3 of
them counts as one with 300. Where honest sites differ much, the median of their weights is a network that no site has.
"""

from __future__ import annotations

from collections.abc import Sequence

from concilium.aggregation import Update
from concilium.aggregation._each import elementwise, middle
from concilium.messages import Tensors

COMPARES = True


def rule(updates: Sequence[Update], state: Tensors, *, before: Tensors) -> tuple[Tensors, Tensors]:
    """The median of each weight over sites."""
    cut = (len(updates) - 1) // 2
    return elementwise(updates, lambda _, values: middle(values, cut)), state
