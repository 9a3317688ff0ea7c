"""Momentum at the server: FedAvgM (Hsu et al. 2019, arXiv:1909.06335).

    v ← momentum · v + (mean − before)          weights ← before + learning_rate · v

Steadies the direction from round to round where sites differ. Rate 1 and momentum 0 are `mean`. In the long run a round moves
learning_rate / (1 − momentum) times as far as the mean does: with the paper's rate of 1 and momentum of 0.9 ten times as far,
which its classifiers of 32 × 32 pixels stand. Here the defaults make it 1, since a site's own rate and steps are those with which
nnU-Net trains. Running statistics of norms and whole numbers are averaged (`_statistics.py`).
"""

from __future__ import annotations

from torch import Tensor

from concilium.aggregation import Sum
from concilium.aggregation._servers import FIRST, differences
from concilium.messages import Tensors


def rule(
    total: Sum, state: Tensors, *, before: Tensors, learning_rate: float = 0.5, momentum: float = 0.5
) -> tuple[Tensors, Tensors]:
    """A step with momentum towards the mean of the updates, weighted by cases.

    Args:
        learning_rate: of the server.
        momentum: what is kept of the velocity from round to round.
    """
    mean = total.mean()
    weights = dict(mean)
    kept: dict[str, Tensor] = {}
    for name, old, difference in differences(mean, before):
        velocity = difference
        if FIRST + name in state:
            velocity = momentum * state[FIRST + name].double() + difference
        weights[name] = (old + learning_rate * velocity).to(mean[name].dtype)
        kept[FIRST + name] = velocity.float()
    return weights, kept
