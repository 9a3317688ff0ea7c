"""Soft Dice plus cross-entropy of patches of which only some labels are annotated: what the losses for partial labels share.

A patch counts by itself: its loss is the mean over what is annotated in it, and the batch's loss the mean over its patches in
which anything is. So a mixed batch has the mean of the losses of batches of one kind. Where everything is annotated all of this
is nnU-Net's loss (`dice_ce`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.losses._nnunet import Weights

SMOOTH = 1e-5
"""As in nnU-Net."""


def looked_for(annotated: Tensor, *, regions: bool) -> Tensor:
    """The labels or regions that were looked for, bool (B, L): without the background, which nobody looks for."""
    wanted = annotated.clone()
    if not regions:
        wanted[:, 0] = False
    return wanted


def dice_and_ce(
    log_probabilities: Tensor,
    labels: Tensor,
    wanted: Tensor,
    *,
    batch_dice: bool,
    ignore: int | None,
    weights: Weights,
) -> Tensor:
    """The loss where labels exclude each other.

    Args:
        log_probabilities: (B, L, *patch); of the background and the labels wanted in a patch they add up to 1 there.
        labels: (B, 1, *patch), ids.
        wanted: bool (B, L), without the background.
    """
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
    ids = torch.where(counts, labels, 0).long()
    some = wanted.any(1)
    picked = -log_probabilities.gather(1, ids)
    voxels = torch.where(counts, picked, torch.zeros_like(picked)).flatten(1).sum(1)
    # over the voxels of all patches that count, as nnU-Net: patches have one size, but may be ignored in part
    n = (counts.flatten(1).sum(1) * some).sum().clamp_min(1)
    ce = torch.where(some, voxels, torch.zeros_like(voxels)).sum() / n
    truth = torch.zeros_like(log_probabilities).scatter_(1, ids, 1.0)
    shown = torch.where(spread(wanted, log_probabilities), log_probabilities.exp(), torch.zeros_like(truth))
    dice = soft_dice(shown, truth, counts, wanted, batch_dice=batch_dice)
    return weights[1] * ce + weights[0] * dice


def soft_dice(probabilities: Tensor, truth: Tensor, counts: Tensor, wanted: Tensor, *, batch_dice: bool) -> Tensor:
    """Minus the soft Dice, of each patch over what is wanted there, over the patches in which anything is.

    With `batch_dice` the overlap of a label is counted over all patches of the batch that want it.
    """
    axes = tuple(range(2, truth.ndim))
    both, said, true = ((x * counts).sum(axes) * wanted for x in (probabilities * truth, probabilities, truth))
    if batch_dice:
        both, said, true = (x.sum(0, keepdim=True).expand_as(x) for x in (both, said, true))
    dice = (2 * both + SMOOTH) / (said + true + SMOOTH).clamp_min(1e-8)
    return -over_patches(dice, wanted)


def over_patches(values: Tensor, wanted: Tensor) -> Tensor:
    """The mean of values (B, L) over what is wanted in each patch, then over the patches that want anything; else 0."""
    some = wanted.any(1)
    zero = torch.zeros_like(values)
    per_patch = torch.where(wanted, values, zero).sum(1) / wanted.sum(1).clamp_min(1)
    return torch.where(some, per_patch, zero[:, 0]).sum() / some.sum().clamp_min(1)


def of_regions(
    logits: Tensor,
    labels: Tensor,
    wanted: Tensor,
    *,
    batch_dice: bool,
    ignore: bool,
    weights: Weights,
) -> Tensor:
    """The loss where regions may overlap, each by a sigmoid of its own: what is not annotated in a patch does not count there.

    Args:
        labels: bool (B, L, *patch), and with `ignore` a last channel.
    """
    n = logits.shape[1]
    counts = ~labels[:, -1:].bool() if ignore else torch.ones_like(labels[:, :1], dtype=torch.bool)
    truth = labels[:, :n].to(logits.dtype)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    axes = tuple(range(2, logits.ndim))
    voxels = (each * counts).sum(axes)
    some = wanted.any(1)
    per_patch = torch.where(wanted, voxels, torch.zeros_like(voxels)).sum(1) / wanted.sum(1).clamp_min(1)
    ce = per_patch.sum() / (counts.sum((1, *axes)) * some).sum().clamp_min(1)
    if ignore:  # nnU-Net then adds the regions up, where it otherwise takes their mean
        ce = ce * n
    dice = soft_dice(torch.sigmoid(logits), truth, counts, wanted, batch_dice=batch_dice)
    return weights[1] * ce + weights[0] * dice


def spread(flags: Tensor, like: Tensor) -> Tensor:
    """Flags (B, L) over the voxels of `like`."""
    return flags[(..., *(None,) * (like.ndim - 2))].expand_as(like)


def without(logits: Tensor, flags: Tensor) -> Tensor:
    """Logits, minus infinity in the channels of each patch that are flagged, bool (B, L)."""
    return logits.masked_fill(spread(flags, logits), -torch.inf)
