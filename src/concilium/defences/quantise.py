"""Quantisation: each image's channel in steps from its smallest to its largest value, with a straight-through gradient.

The gradient is that of the map before it was rounded (Bengio et al. 2013, arXiv:1308.3432). The rounding is deterministic, so
that what it leaves in can be learnt; the bytes that travel are those of `[protocol] transport`, not of these bits.
"""

from __future__ import annotations

from torch import Tensor

from concilium.defences import Defence

ALL = 24
"""Bits that a float32 tells values apart by: with as many or more the map is as it was."""


def defend(*, n_channels: int, n_axes: int, bits: int = 4) -> Defence:
    """The defence of one map.

    Args:
        bits: of each value, which then has one of 2 to their power; 24 or more: the map is as it was.
    """
    steps = 2.0**bits - 1

    def send(m: Tensor) -> Tensor:
        if bits >= ALL:
            return m
        values = m.detach().float().flatten(2)
        least, most = (v.reshape(*m.shape[:2], *[1] * (m.ndim - 2)) for v in (values.amin(2), values.amax(2)))
        step = ((most - least) / steps).clamp_min(1e-30)  # of a channel of one value nothing is left to round
        rounded = least + step * ((m.detach().float() - least) / step).round()
        return rounded.to(m.dtype) + (m - m.detach())  # the last is 0, and has the gradient

    return Defence(send, n_channels)
