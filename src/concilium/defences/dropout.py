"""Dropout of activations that stays on, in evaluation and prediction too: switched off there, it protects nothing.

Srivastava et al. 2014, Journal of Machine Learning Research 15, with the values that are left scaled up by 1 / (1 - share). He et
al. 2021 (IEEE IoT Journal, doi:10.1109/JIOT.2020.3022358) drop activations against inversion when images are segmented.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from concilium.defences import Defence


def defend(*, n_channels: int, n_axes: int, share: float = 0.5, whole: bool = False) -> Defence:
    """The defence of one map.

    Args:
        share: of the values, or channels, that are set to 0 in each image; 0: none.
        whole: drop whole channels of an image, not single values, which their neighbours tell.
    """
    drop = (functional.dropout1d, functional.dropout2d, functional.dropout3d)[n_axes - 1]

    def send(m: Tensor) -> Tensor:
        if share == 0:
            return m
        return drop(m, share, training=True) if whole else functional.dropout(m, share, training=True)

    return Defence(send, n_channels)
