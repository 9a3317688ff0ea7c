"""What every loss keeps to (see `concilium.losses`). Its signature: tests/test_catalog.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from concilium import catalog
from concilium.errors import ContractError

LABELS = 3
NEED_ALL_LABELS = {"dice_ce"}
"""Losses that refuse cases of which only some labels are annotated."""

every_loss = pytest.mark.parametrize("name", catalog.names("losses"))
in_2d_and_3d = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])
per_batch_and_per_patch = pytest.mark.parametrize("batch_dice", [True, False], ids=["batch", "patch"])


def loss_of(name: str, batch_dice: bool) -> Callable[..., Tensor]:
    options, problems = catalog.fill("losses", name, {}, "[loss]")
    assert not problems
    return partial(catalog.load("losses", name), batch_dice=batch_dice, **options)


def drawn(dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (2, 3, *patch) and labels (2, 1, *patch)."""
    generator = torch.Generator().manual_seed(seed)
    size = (6, 5, 4)[:dims]
    logits = torch.randn(2, LABELS, *size, generator=generator)
    return logits, torch.randint(0, LABELS, (2, 1, *size), generator=generator).float()


def logits_of(labels: Tensor, sure: float) -> Tensor:
    """Logits of a network that is right, and this sure of it."""
    one_hot = torch.nn.functional.one_hot(labels[:, 0].long(), LABELS).movedim(-1, 1).float()
    return sure * one_hot


def test_nnunets_loss_is_found() -> None:
    assert "dice_ce" in catalog.names("losses")


@every_loss
@in_2d_and_3d
@per_batch_and_per_patch
def test_a_loss_is_one_finite_number_with_a_gradient(name: str, dims: int, batch_dice: bool) -> None:
    logits, labels = drawn(dims)
    logits.requires_grad_()
    loss = loss_of(name, batch_dice)(logits, labels)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.ne(0).any()


@every_loss
@per_batch_and_per_patch
def test_the_better_the_segmentation_the_lower(name: str, batch_dice: bool) -> None:
    _, labels = drawn(2)
    loss = loss_of(name, batch_dice)
    values = [float(loss(logits_of(labels, sure), labels)) for sure in (-20, -2, 0, 2, 5, 20)]
    assert all(a > b for a, b in itertools.pairwise(values))


@every_loss
@per_batch_and_per_patch
def test_following_the_gradient_lowers_it(name: str, batch_dice: bool) -> None:
    logits, labels = drawn(3)
    logits.requires_grad_()
    loss = loss_of(name, batch_dice)
    before = loss(logits, labels)
    before.backward()
    assert logits.grad is not None
    assert loss(logits - 1e-2 * logits.grad / logits.grad.norm(), labels) < before


@every_loss
@per_batch_and_per_patch
@pytest.mark.parametrize("label", [0, 2], ids=["background only", "one label only"])
def test_empty_masks_are_finite(name: str, batch_dice: bool, label: int) -> None:
    labels = torch.full((2, 1, 4, 4), float(label))
    for logits in (torch.zeros(2, LABELS, 4, 4), logits_of(labels, 50.0), logits_of(labels, -50.0)):
        logits.requires_grad_()
        loss = loss_of(name, batch_dice)(logits, labels)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


@every_loss
@per_batch_and_per_patch
def test_the_order_in_the_batch_and_the_axes_of_the_patch_do_not_matter(name: str, batch_dice: bool) -> None:
    logits, labels = drawn(3)
    loss = loss_of(name, batch_dice)
    value = loss(logits, labels)
    torch.testing.assert_close(loss(logits.flip(0), labels.flip(0)), value)
    torch.testing.assert_close(loss(logits.transpose(2, 4), labels.transpose(2, 4)), value)


@every_loss
def test_what_it_is_given_stays_as_it_is(name: str) -> None:
    logits, labels = drawn(2)
    before = logits.clone(), labels.clone()
    loss_of(name, True)(logits, labels)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


@every_loss
def test_labels_that_are_not_annotated_do_not_count_or_are_refused(name: str) -> None:
    """With labels 0 and 1 annotated, a voxel of 0 may truly be 2: which of the two is predicted there must not matter."""
    logits, labels = drawn(2)
    labels[labels == 2] = 0
    loss = partial(loss_of(name, True), annotated=[0, 1])
    if name in NEED_ALL_LABELS:
        with pytest.raises(ContractError, match=r"\[0, 1\]"):
            loss(logits, labels)
    else:
        torch.testing.assert_close(loss(logits[:, [2, 1, 0]], labels), loss(logits, labels))


# ----------------------------------------------------------------------------------------------- dice_ce, term by term


def dice_and_ce(logits: Tensor, labels: Tensor, batch_dice: bool) -> tuple[float, float]:
    """Soft Dice loss and cross-entropy in float64, from their formulas."""
    x, y = logits.double().numpy(), labels[:, 0].long().numpy()
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    t = np.stack([y == i for i in range(LABELS)], 1).astype(float)
    space = tuple(range(2, x.ndim))
    overlap, size = (p * t).sum(space), (p + t).sum(space)  # (B, L)
    if batch_dice:
        overlap, size = overlap.sum(0, keepdims=True), size.sum(0, keepdims=True)
    dice = (2 * overlap + 1e-5) / (size + 1e-5)
    return -float(dice[:, 1:].mean()), -float(np.log((p * t).sum(1)).mean())


@in_2d_and_3d
@per_batch_and_per_patch
def test_dice_ce_is_its_formula(dims: int, batch_dice: bool) -> None:
    logits, labels = drawn(dims)
    dice, ce = dice_and_ce(logits, labels, batch_dice)
    function = catalog.load("losses", "dice_ce")
    for a, b in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        got = float(function(logits, labels, batch_dice=batch_dice, dice_weight=a, ce_weight=b))
        assert got == pytest.approx(a * dice + b * ce, abs=1e-6)


def test_dice_ce_worked_out_by_hand() -> None:
    """Uniform over 3 labels, 2 of 4 voxels are label 1: CE = ln 3; Dice is 2 (2/3) / (4/3 + 2) = 0.4 for label 1, 0 for 2."""
    labels = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    got = loss_of("dice_ce", False)(torch.zeros(1, 3, 2, 2), labels)
    assert float(got) == pytest.approx(np.log(3) - (0.4 + 0.0) / 2, abs=1e-5)


def test_batch_dice_counts_over_the_batch() -> None:
    logits, labels = drawn(2)
    assert loss_of("dice_ce", True)(logits, labels) != loss_of("dice_ce", False)(logits, labels)
    assert loss_of("dice_ce", True)(logits[:1], labels[:1]) == loss_of("dice_ce", False)(logits[:1], labels[:1])
