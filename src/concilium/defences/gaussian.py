"""Gaussian noise on clipped activations: each value is clipped to -bound ... bound, then noise is added to it.

Without the bound the front could learn larger values until the noise no longer matters. What the noise hides is for an attack to
tell. As a mechanism of differential privacy (Dwork & Roth 2014, doi:10.1561/0400000042, appendix A) it is worth nothing at
settings that leave anything to learn: a patch has millions of values, each of which may move by twice the bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.defences import Defence


def defend(*, n_channels: int, n_axes: int, scale: float = 0.5, bound: float = 3.0) -> Defence:
    """The defence of one map.

    Args:
        scale: standard deviation of the noise, in units of the activations; 0: none.
        bound: largest absolute value of an activation before the noise.
    """

    def send(m: Tensor) -> Tensor:
        clipped = m.clamp(-bound, bound)
        return clipped if scale == 0 else clipped + scale * torch.randn_like(clipped)

    return Defence(send, n_channels)
