"""Laplace noise on clipped activations: each value is clipped to -bound ... bound, then noise is added to it.

Titcombe et al. 2021 (arXiv:2104.05743), against inversion of split networks, with scales of 0.1 to 1 and no bound; without one
the front could learn larger values until the noise no longer matters. What the noise hides is for an attack to tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.defences import Defence


def defend(*, n_channels: int, n_axes: int, scale: float = 0.5, bound: float = 3.0) -> Defence:
    """The defence of one map.

    Args:
        scale: of the Laplace distribution, in units of the activations (its standard deviation is 1.41 times that); 0: none.
        bound: largest absolute value of an activation before the noise.
    """

    def send(m: Tensor) -> Tensor:
        clipped = m.clamp(-bound, bound)
        if scale == 0:
            return clipped
        drawn = torch.empty(
            2, *m.shape, device=m.device
        ).exponential_()  # float32: bfloat16 has too few digits for tails
        return clipped + (scale * (drawn[0] - drawn[1])).to(m.dtype)  # the difference of two exponentials is Laplace

    return Defence(send, n_channels)
