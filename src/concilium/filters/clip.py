"""Clip: an update longer than a norm is scaled down to it, over all tensors together.

As McMahan et al. 2018 clip the updates of users (arXiv:1710.06963, section 2.2); here a user is a site. By itself it bounds how
far one site can move the mean, and hides nothing.
"""

from __future__ import annotations

import torch

from concilium.filters import Leaving
from concilium.messages import Tensors


def filter(update: Tensors, about: Leaving, *, norm: float = 1.0) -> Tensors:
    """The update, no longer than that.

    Args:
        norm: largest Euclidean norm of the change of all tensors that are sent.
    """
    length = float(sum(float(t.double().square().sum()) for t in update.values())) ** 0.5
    if length <= norm:
        return update
    return {name: t * torch.tensor(norm / length, dtype=t.dtype) for name, t in update.items()}
