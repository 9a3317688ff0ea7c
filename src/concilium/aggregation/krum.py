"""Krum and multi-Krum: the updates that lie closest to others (Blanchard et al. 2017, section 4; arXiv:1703.02757).

The score of an update is the sum of its squared distances to the n − faulty − 2 others that lie closest. The new weights are
the update with the smallest score, or with `keep` above 1 the unweighted mean of so many (multi-Krum); of equal scores the
first site's, in the order of names. An update that is kept as a whole is a network that some site has. It ignores numbers of
cases, and with `keep` = 1 what all other sites have learnt in the round.

`faulty` is how many sites may send anything; omitted, the most for which the paper's bound holds, n ≥ 2 · faulty + 3. Where
fewer sites answered in a round, at least one neighbour counts, and the bound does not hold; two are equally far from each other,
so of two, as where two have a tensor in common ([plan] fingerprint = "site"), the new weights are their unweighted mean.
Distances are over all float tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from concilium.aggregation import Update
from concilium.aggregation._each import pieces, weighted_mean
from concilium.messages import Tensors

COMPARES = True
LEAST = 3


def rule(
    updates: Sequence[Update], state: Tensors, *, before: Tensors, faulty: int | None = None, keep: int = 1
) -> tuple[Tensors, Tensors]:
    """The mean of the updates that lie closest to others.

    Args:
        faulty: how many sites may send anything; omitted: the most that so many sites allow.
        keep: how many updates the mean is formed of.
    """
    if len(updates) < LEAST:
        return weighted_mean(updates, [1] * len(updates)), state
    scores = scores_of(squared_distances(updates), faulty)
    best = sorted(range(len(updates)), key=lambda i: (scores[i], i))[:keep]
    return weighted_mean(updates, [int(i in best) for i in range(len(updates))]), state


def squared_distances(updates: Sequence[Update]) -> Tensor:
    """(n, n) in float64."""
    squares = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name, tensor in updates[0].weights.items():
        if tensor.is_floating_point():
            for values in pieces(updates, name):
                for i, own in enumerate(values):
                    squares[i] += (values - own).square().sum(dim=1)
    return squares


def scores_of(squares: Tensor, faulty: int | None) -> list[float]:
    """The sum of the squared distances of each to the closest others."""
    n = len(squares)
    n_closest = max(1, n - 2 - (max(0, (n - 3) // 2) if faulty is None else faulty))
    others = squares.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    return [float(row[:n_closest].sum()) for row in others]
