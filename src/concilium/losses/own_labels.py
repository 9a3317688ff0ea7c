"""Dice and cross-entropy over the background and what is annotated alone, as if the network had no other labels.

The loss of SegViz (Kanhere et al. 2024, arXiv:2301.07074): every site trains a head for its own structures, and all else is
background to it. Sensible only where heads stay at their sites (`[sharing] keep = ["heads"]`): a shared head would be told that
the structures of others are background. For one head of all structures use `marginal`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.losses._nnunet import of_all
from concilium.losses._partial import dice_and_ce, looked_for, of_regions, without


def loss(
    logits: Tensor,
    labels: Tensor,
    annotated: Tensor | None = None,
    *,
    batch_dice: bool,
    regions: bool = False,
    ignore: int | None = None,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Tensor:
    """`dice_weight` * Dice loss + `ce_weight` * cross-entropy; the logits of other labels get no gradient."""
    weights = (dice_weight, ce_weight)
    if annotated is None:
        return of_all(logits, labels, batch_dice=batch_dice, regions=regions, ignore=ignore, weights=weights)
    wanted = looked_for(annotated, regions=regions)
    if regions:
        return of_regions(logits, labels, wanted, batch_dice=batch_dice, ignore=ignore is not None, weights=weights)
    absent = ~wanted
    absent[:, 0] = False
    log_p = torch.log_softmax(without(logits, absent), 1)
    return dice_and_ce(log_p, labels, wanted, batch_dice=batch_dice, ignore=ignore, weights=weights)
