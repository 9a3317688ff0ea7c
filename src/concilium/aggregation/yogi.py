"""Yogi at the server: FedYogi (Reddi et al. 2021, arXiv:2003.00295, algorithm 2; Zaheer et al. 2018).

    m ← beta1 · m + (1 − beta1) · Δ,  v ← v − (1 − beta2) · Δ² · sign(v − Δ²)          Δ = mean − before
    weights ← before + learning_rate · m / (√v + tau)                                v starts at tau²

As `adam`, but the second moment forgets a large difference slowly, so that steps do not grow at once where rounds fall silent.
The same settings make it `mean`, and its defaults are those of `adam`. Running statistics of norms and whole numbers are averaged
(`_statistics.py`).
"""

from __future__ import annotations

from concilium.aggregation import Sum
from concilium.aggregation._servers import adaptive
from concilium.messages import Tensors


def rule(
    total: Sum,
    state: Tensors,
    *,
    before: Tensors,
    learning_rate: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> tuple[Tensors, Tensors]:
    """A step of Yogi towards the mean of the updates, weighted by cases.

    Args:
        learning_rate: about how far a weight moves in a round.
        beta1: what is kept of the first moment, the direction.
        beta2: what is kept of the second moment, the size.
        tau: differences well below it are not magnified; the larger, the less adaptive.
    """
    return adaptive(
        total.mean(),
        state,
        before,
        learning_rate=learning_rate,
        beta1=beta1,
        tau=tau,
        second=lambda v, squares: v - (1 - beta2) * squares * (v - squares).sign(),
    )
