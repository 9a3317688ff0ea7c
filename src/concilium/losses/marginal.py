"""Dice and cross-entropy where only some labels are annotated: those that are not are merged into the background.

Shi et al. 2021, Marginal loss and exclusion loss for partially supervised multi-organ segmentation (Medical Image Analysis 70,
101979; arXiv:2007.03868): a voxel without an annotated label is background or any label that nobody looked for, so its
probability is the sum of theirs. An exclusion term, off by default, keeps labels that nobody looked for out of what is annotated.

Of that sum the gradient raises background and unknown labels alike, in proportion to what the network thinks already. Where one
network sees all cases, those in which a label is annotated put that right. Between sites it is averaged with their steps, and an
optimiser that scales gradients (Adam) makes it as long as theirs. So `hold`, on by default, takes the logits of labels that
nobody looked for as they are wherever nothing is annotated: the value is the same, and such a site says nothing of them there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.losses._nnunet import of_all
from concilium.losses._partial import dice_and_ce, looked_for, of_regions, over_patches, soft_dice, spread, without


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
    exclusion: float = 0.0,
    hold: bool = True,
) -> Tensor:
    """`dice_weight` * Dice loss + `ce_weight` * cross-entropy + `exclusion` * overlap of unannotated labels with annotated ones.

    Regions are learnt each by itself: those that are not annotated do not count, and there is nothing to merge, exclude or hold.

    Args:
        exclusion: weight of the overlap; 0: none.
        hold: no gradient for the logits of labels that nobody looked for, in voxels without an annotated label.
    """
    weights = (dice_weight, ce_weight)
    if annotated is None:
        return of_all(logits, labels, batch_dice=batch_dice, regions=regions, ignore=ignore, weights=weights)
    wanted = looked_for(annotated, regions=regions)
    if regions:
        return of_regions(logits, labels, wanted, batch_dice=batch_dice, ignore=ignore is not None, weights=weights)
    log_p = torch.log_softmax(_held(logits, labels, wanted, ignore) if hold else logits, 1)
    background = torch.logsumexp(without(log_p, wanted), 1, keepdim=True)
    merged = torch.cat((background, log_p[:, 1:]), 1)
    total = dice_and_ce(merged, labels, wanted, batch_dice=batch_dice, ignore=ignore, weights=weights)
    return total + exclusion * _overlap(log_p, labels, wanted, ignore) if exclusion else total


def _unknown(wanted: Tensor) -> Tensor:
    """The labels that nobody looked for, bool (B, L): without the background."""
    others = ~wanted
    others[:, 0] = False
    return others


def _held(logits: Tensor, labels: Tensor, wanted: Tensor, ignore: int | None) -> Tensor:
    """The logits, those of labels that nobody looked for without a gradient where the site annotates nothing."""
    unlabelled = labels == 0 if ignore is None else (labels == 0) | (labels == ignore)
    free = _unknown(wanted)
    return torch.where(spread(free, logits) & unlabelled, logits.detach(), logits)


def _overlap(log_p: Tensor, labels: Tensor, wanted: Tensor, ignore: int | None) -> Tensor:
    """Soft Dice between labels that nobody looked for, together, and the annotated foreground, which they must not share."""
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
    others = _unknown(wanted)
    unknown = without(log_p, ~others).exp().sum(1, keepdim=True)
    foreground = (torch.where(counts, labels, 0) > 0).to(unknown.dtype)
    both = (wanted.any(1) & others.any(1))[
        :, None
    ]  # where all is annotated, or nothing, there is nothing to keep apart
    return over_patches(-_per_patch(unknown, foreground, counts), both)


def _per_patch(probabilities: Tensor, truth: Tensor, counts: Tensor) -> Tensor:
    """Minus the soft Dice of each patch, (B, 1)."""
    every = torch.ones(1, 1, dtype=torch.bool, device=truth.device)
    rows = zip(probabilities, truth, counts, strict=True)
    return torch.stack([soft_dice(p[None], t[None], c[None], every, batch_dice=False) for p, t, c in rows])[:, None]
