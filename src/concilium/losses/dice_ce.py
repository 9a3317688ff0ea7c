"""Soft Dice over the foreground labels plus cross-entropy, over regions plus binary cross-entropy: nnU-Net's losses.

Isensee et al. 2021, doi:10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from concilium.errors import ContractError
from concilium.nnunet_parts import DC_and_BCE_loss, DC_and_CE_loss, MemoryEfficientSoftDiceLoss


def loss(
    logits: Tensor,
    labels: Tensor,
    annotated: Sequence[int] | None = None,
    *,
    batch_dice: bool,
    regions: bool = False,
    ignore: int | None = None,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Tensor:
    """`dice_weight` * Dice loss + `ce_weight` * cross-entropy; of voxels that are not to be ignored.

    Raises:
        ContractError: only some labels are annotated, which this loss cannot take into account.
    """
    if annotated is not None:
        raise ContractError(
            f"dice_ce was given labels {list(annotated)} as the only annotated ones. It needs all. Choose another [loss]."
        )
    return cast(Tensor, _nnunet(batch_dice, regions, ignore, dice_weight, ce_weight)(logits, labels))


@functools.cache
def _nnunet(
    batch_dice: bool, regions: bool, ignore: int | None, dice_weight: float, ce_weight: float
) -> DC_and_CE_loss | DC_and_BCE_loss:
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    weights = {"weight_ce": ce_weight, "weight_dice": dice_weight, "dice_class": MemoryEfficientSoftDiceLoss}
    if regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignore is not None, **weights)
    return DC_and_CE_loss(dice, {}, ignore_label=ignore, **weights)
