"""Gaussian noise on every value of an update.

After `clip`, with a deviation in proportion to its norm, it is the Gaussian mechanism (Dwork & Roth 2014,
doi:10.1561/0400000042, appendix A) for a site as a whole, as McMahan et al. 2018 (arXiv:1710.06963) have it for users, but with
noise that each site adds by itself. It is no guarantee for a patient.
"""

from __future__ import annotations

import torch

from concilium.filters import Leaving
from concilium.messages import Tensors


def filter(update: Tensors, about: Leaving, *, deviation: float = 0.001) -> Tensors:
    """The update with noise.

    Args:
        deviation: of the noise of each value, in units of the weights; 0: none.
    """
    if deviation == 0:
        return update
    return {name: t + deviation * torch.randn_like(t) for name, t in sorted(update.items())}
