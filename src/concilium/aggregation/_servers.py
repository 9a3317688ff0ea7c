"""Optimisers at the server (Reddi et al. 2021, arXiv:2003.00295, algorithm 2): the mean less what was there is their gradient.

Everything is computed in float64 and rounded once; the state is float32. Running statistics of norms and whole numbers are
averaged as `mean` does (`_statistics.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from concilium.aggregation._statistics import is_measured
from concilium.messages import Tensors

FIRST, SECOND = "first/", "second/"
"""Prefixes of the state: the moments of the differences."""


def differences(mean: Tensors, before: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every tensor that is learnt: its name, what it was, and how far the mean lies from that; in float64."""
    for name, tensor in mean.items():
        if not is_measured(name, tensor):
            old = before[name].double()
            yield name, old, tensor.double() - old


def adaptive(
    mean: Tensors,
    state: Tensors,
    before: Tensors,
    *,
    learning_rate: float,
    beta1: float,
    tau: float,
    second: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensors, Tensors]:
    """A step of Adam or Yogi, which differ in the `second` moment: a function of what it was and of the squares.

    As in the paper the second moment starts at tau², and neither is corrected for its start.
    """
    weights = dict(mean)
    kept: dict[str, Tensor] = {}
    for name, old, difference in differences(mean, before):
        m, v = (
            state[prefix + name].double() if prefix + name in state else torch.full_like(old, start)
            for prefix, start in ((FIRST, 0.0), (SECOND, tau**2))
        )
        m = beta1 * m + (1 - beta1) * difference
        v = second(v, difference.square())
        weights[name] = (old + learning_rate * m / (v.sqrt() + tau)).to(mean[name].dtype)
        kept |= {FIRST + name: m.float(), SECOND + name: v.float()}
    return weights, kept
