"""Dropout of activations that stays on, in evaluation and prediction too: switched off there, it protects nothing.

Srivastava et al. 2014, Journal of Machine Learning Research 15, with the values that are left scaled up by 1 / (1 - share). He et
al. 2021 (IEEE IoT Journal, doi:10.1109/JIOT.2020.3022358) drop activations against inversion when images are segmented.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from concilium.defences import Defence


def defend(
    *, n_channels: int, n_axes: int, share: float = 0.5, whole: bool = False, at_prediction: bool = True
) -> Defence:
    """The defence of one map.

    Args:
        share: of the values, or channels, that are set to 0 in each image; 0: none.
        whole: drop whole channels of an image, not single values, which their neighbours tell.
        at_prediction: false: nothing is dropped where a finished model is at work, and the maps that leave then are not defended.
    """
    drop = (functional.dropout1d, functional.dropout2d, functional.dropout3d)[n_axes - 1]

    def send(m: Tensor) -> Tensor:
        if share == 0:
            return m
        return drop(m, share, training=True) if whole else functional.dropout(m, share, training=True)

    return Defence(send if at_prediction else _InTraining(send), n_channels)


def lapse(*, at_prediction: bool = True, share: float = 0.5, **_: object) -> str:
    """What the defence leaves open with these options, in words; nothing where it does what it says."""
    if at_prediction or share == 0:
        return ""
    return (
        "dropout with at_prediction = false drops nothing in validation and prediction: maps that leave there are as they are "
        "without it, and an attack finds in them what it finds without a defence. Leave at_prediction out."
    )


class _InTraining(nn.Module):
    """Something that is done to a map in training alone."""

    def __init__(self, send: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.send = send

    def forward(self, m: Tensor) -> Tensor:
        return self.send(m) if self.training else m
