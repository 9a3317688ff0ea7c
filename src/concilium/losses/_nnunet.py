"""nnU-Net's own losses, where every label is annotated."""

from __future__ import annotations

import functools
from typing import TypeAlias, cast

from torch import Tensor

from concilium.nnunet_parts import DC_and_BCE_loss, DC_and_CE_loss, MemoryEfficientSoftDiceLoss

Weights: TypeAlias = tuple[float, float]
"""Of Dice and of cross-entropy."""


def of_all(
    logits: Tensor, labels: Tensor, *, batch_dice: bool, regions: bool, ignore: int | None, weights: Weights
) -> Tensor:
    """Dice over the foreground labels plus cross-entropy, or over regions plus binary cross-entropy."""
    return cast(Tensor, _nnunet(batch_dice, regions, ignore, *weights)(logits, labels))


@functools.cache
def _nnunet(
    batch_dice: bool, regions: bool, ignore: int | None, dice_weight: float, ce_weight: float
) -> DC_and_CE_loss | DC_and_BCE_loss:
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    weights = {"weight_ce": ce_weight, "weight_dice": dice_weight, "dice_class": MemoryEfficientSoftDiceLoss}
    if regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignore is not None, **weights)
    return DC_and_CE_loss(dice, {}, ignore_label=ignore, **weights)
