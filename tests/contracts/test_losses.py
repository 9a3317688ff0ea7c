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

OWN_LABELS = {"own_labels"}
"""Losses to which all that is not annotated does not exist."""

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


def mask(*rows: tuple[int, ...]) -> Tensor:
    """What is annotated in each patch: ids, the background among them."""
    return torch.tensor([[i in row for i in range(LABELS)] for row in rows])


@every_loss
@per_batch_and_per_patch
def test_labels_that_are_not_annotated_do_not_count_or_are_refused(name: str, batch_dice: bool) -> None:
    """With label 1 annotated, a voxel of 0 may truly be 2: which of the two is predicted there must not matter."""
    logits, labels = drawn(2)
    labels[labels == 2] = 0
    loss = partial(loss_of(name, batch_dice), annotated=mask((0, 1), (0, 1)))
    if name in NEED_ALL_LABELS:
        with pytest.raises(ContractError, match="only some labels"):
            loss(logits, labels)
    elif name in OWN_LABELS:
        other = logits.clone()
        other[:, 2] = 100.0
        torch.testing.assert_close(loss(other, labels), loss(logits, labels))
    else:
        torch.testing.assert_close(loss(logits[:, [2, 1, 0]], labels), loss(logits, labels))


partly = pytest.mark.parametrize("name", [n for n in catalog.names("losses") if n not in NEED_ALL_LABELS])


@partly
@in_2d_and_3d
@per_batch_and_per_patch
def test_where_all_is_annotated_it_is_nnunets_loss(name: str, dims: int, batch_dice: bool) -> None:
    logits, labels = drawn(dims)
    expected = loss_of("dice_ce", batch_dice)(logits, labels)
    loss = loss_of(name, batch_dice)
    assert torch.equal(loss(logits, labels), expected)
    torch.testing.assert_close(loss(logits, labels, mask((0, 1, 2), (0, 1, 2))), expected)


@partly
@per_batch_and_per_patch
def test_a_mixed_batch_has_the_mean_loss_of_batches_of_one_kind(name: str, batch_dice: bool) -> None:
    """Not that of what is annotated in its first patch only."""
    logits, labels = drawn(3)
    first, second = labels.clone(), labels.clone()
    first[labels == 2], second[labels == 1] = 0, 0
    loss = loss_of(name, batch_dice)
    alone = [loss(logits, y, mask(row, row)) for y, row in ((first, (0, 1)), (second, (0, 2)))]
    rows = mask((0, 1), (0, 1), (0, 2), (0, 2))
    together = loss(torch.cat([logits, logits]), torch.cat([first, second]), rows)
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
    shuffled = [2, 0, 3, 1]
    again = loss(torch.cat([logits, logits])[shuffled], torch.cat([first, second])[shuffled], rows[shuffled])
    torch.testing.assert_close(again, together)


@partly
@per_batch_and_per_patch
def test_a_patch_in_which_nothing_is_annotated_changes_nothing(name: str, batch_dice: bool) -> None:
    logits, labels = drawn(2)
    labels[1] = 0
    loss = loss_of(name, batch_dice)
    logits.requires_grad_()
    value = loss(logits, labels, mask((0, 1, 2), ()))
    torch.testing.assert_close(value, loss(logits[:1], labels[:1], mask((0, 1, 2))))
    value.backward()
    assert logits.grad is not None
    assert logits.grad[0].ne(0).any()
    assert logits.grad[1].eq(0).all()
    nothing = loss(logits, labels * 0, mask((), ()))
    assert float(nothing.detach()) == 0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert gradient.eq(0).all()


@partly
@per_batch_and_per_patch
def test_regions_that_are_not_annotated_do_not_count(name: str, batch_dice: bool) -> None:
    logits, labels = drawn(2)
    regions = torch.cat([labels > 0, labels == 2, labels == 1], 1)
    loss = partial(loss_of(name, batch_dice), regions=True)
    torch.testing.assert_close(
        loss(logits, regions, torch.ones(2, 3, dtype=torch.bool)),
        partial(loss_of("dice_ce", batch_dice), regions=True)(logits, regions),
    )
    some = torch.tensor([[True, False, True]] * 2)
    flipped = regions.clone()
    flipped[:, 1] = ~flipped[:, 1]
    torch.testing.assert_close(loss(logits, flipped, some), loss(logits, regions, some))
    reduced = partial(loss_of("dice_ce", batch_dice), regions=True)(logits[:, [0, 2]], regions[:, [0, 2]])
    torch.testing.assert_close(loss(logits, regions, some), reduced)


@partly
@per_batch_and_per_patch
@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
def test_ignored_voxels_do_not_count_in_partly_annotated_patches(name: str, batch_dice: bool, regions: bool) -> None:
    logits, labels = drawn(2)
    ignored = labels.clone()
    ignored[..., :2] = 3
    target = torch.cat([labels > 0, labels == 2, labels == 1, ignored == 3], 1) if regions else ignored
    every = torch.ones(2, LABELS, dtype=torch.bool)
    loss = partial(loss_of(name, batch_dice), regions=regions, ignore=3)
    expected = partial(loss_of("dice_ce", batch_dice), regions=regions, ignore=3)(logits, target)
    torch.testing.assert_close(loss(logits, target, every), expected)
    other = logits.clone()
    other[..., :2] += torch.randn(2, LABELS, 6, 2)
    torch.testing.assert_close(loss(other, target, every), loss(logits, target, every))


def test_unknown_labels_are_background_to_the_naive_baseline() -> None:
    logits, labels = drawn(2)
    naive = partial(catalog.load("losses", "dice_ce"), batch_dice=False, unannotated="background")
    assert torch.equal(naive(logits, labels, mask((0, 1), (0, 1))), naive(logits, labels))


def test_marginal_worked_out_by_hand() -> None:
    """Uniform over 3 labels, label 1 annotated in 2 of 4 voxels: CE is ln 3 there and ln 3/2 elsewhere; Dice 0.4."""
    labels = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    got = loss_of("marginal", False)(torch.zeros(1, 3, 2, 2), labels, mask((0, 1)))
    assert float(got) == pytest.approx((np.log(3) + np.log(1.5)) / 2 - 0.4, abs=1e-5)


@per_batch_and_per_patch
def test_marginal_teaches_nothing_of_an_unknown_label_where_nothing_is_annotated(batch_dice: bool) -> None:
    """`hold` changes no value, and no gradient but that of unknown labels' logits in voxels without an annotated label."""
    drawn_logits, labels = drawn(2)
    labels = torch.where(labels == 2, 0, labels)  # label 2 is unknown
    gradients = []
    for hold in (True, False):
        logits = drawn_logits.clone().requires_grad_()
        loss = partial(catalog.load("losses", "marginal"), batch_dice=batch_dice, hold=hold)
        value = loss(logits, labels, mask((0, 1), (0, 1)))
        value.backward()
        assert logits.grad is not None
        gradients.append((float(value.detach()), logits.grad))
    (value, held), (other, free) = gradients
    assert value == other
    where = labels[:, 0] == 0
    assert bool(where.any() and (~where).any())
    assert held[:, 2][where].eq(0).all()
    assert free[:, 2][where].ne(0).all()
    torch.testing.assert_close(held[:, :2], free[:, :2])
    torch.testing.assert_close(held[:, 2][~where], free[:, 2][~where])


def test_exclusion_keeps_unknown_labels_out_of_annotated_ones() -> None:
    """Uniform over 3 labels: the unknown one has 1/3 everywhere, half of it where label 1 is: Dice 2 (2/3) / (4/3 + 2) = 0.4."""
    labels = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    logits = torch.zeros(1, 3, 2, 2)
    function = partial(catalog.load("losses", "marginal"), batch_dice=False)
    plain, more = (float(function(logits, labels, mask((0, 1)), exclusion=x)) for x in (0.0, 0.5))
    assert more - plain == pytest.approx(0.5 * 0.4, abs=1e-5)
    every = mask((0, 1, 2))
    torch.testing.assert_close(function(logits, labels, every, exclusion=0.5), function(logits, labels, every))


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
