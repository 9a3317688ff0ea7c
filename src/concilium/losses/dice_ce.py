"""Soft Dice over the foreground labels plus cross-entropy, over regions plus binary cross-entropy: nnU-Net's losses.

Isensee et al. 2021, doi:10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from concilium.errors import ContractError
from concilium.losses._nnunet import of_all


def loss(  # noqa: PLR0913  (options of the study)
    logits: Tensor,
    labels: Tensor,
    annotated: Tensor | None = None,
    *,
    batch_dice: bool,
    regions: bool = False,
    ignore: int | None = None,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    unannotated: Literal["refuse", "background"] = "refuse",
) -> Tensor:
    """`dice_weight` * Dice loss + `ce_weight` * cross-entropy; of voxels that are not to be ignored.

    Args:
        unannotated: what labels are that nobody looked for. `background` teaches the network that they are not there: a
            baseline to measure others against.

    Raises:
        ContractError: only some labels are annotated, and `unannotated` says to refuse.
    """
    if annotated is not None and unannotated == "refuse":
        raise ContractError(
            f"dice_ce was given {int((~annotated).any(1).sum())} patches of which only some labels are annotated. It needs all, "
            "since to it the others are background. Choose marginal."
        )
    return of_all(
        logits, labels, batch_dice=batch_dice, regions=regions, ignore=ignore, weights=(dice_weight, ce_weight)
    )
