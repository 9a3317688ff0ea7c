"""Distillation: the divergence against numbers worked out by hand and `torch.distributions`; nothing to learn from oneself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from concilium.data.patches import Batch
from concilium.local_updates import Local, take
from concilium.local_updates.distill import divergence, step
from concilium.messages import Labels

SHAPE = (2, 3, 4, 5)


def logits(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 2


def test_the_divergence_of_one_voxel_by_hand() -> None:
    """Teacher 3/4 and 1/4, student one half each: 3/4 log 3/2 + 1/4 log 1/2."""
    teacher = torch.tensor([[[math.log(3.0)], [0.0]]])
    found = divergence(teacher, torch.zeros(1, 2, 1), [torch.zeros(1, 1, 1)])
    assert float(found) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    regions = divergence(torch.tensor([[[math.log(3.0)]]]), torch.zeros(1, 1, 1), [torch.zeros(1, 1, 1)], regions=True)
    assert float(regions) == pytest.approx(float(found)), "a region is a choice between two"


def test_it_is_the_mean_over_voxels_and_regions_that_count() -> None:
    teacher, student = logits(0), logits(1)
    labels = torch.randint(0, 4, (2, 1, 4, 5), generator=torch.Generator().manual_seed(2))
    of_labels = kl_divergence(Categorical(logits=teacher.movedim(1, -1)), Categorical(logits=student.movedim(1, -1)))
    of_regions = kl_divergence(Bernoulli(logits=teacher), Bernoulli(logits=student))
    outside = labels == 3
    with_mask = torch.cat((torch.zeros(SHAPE, dtype=torch.bool), outside), 1)
    for found, expected in (
        (divergence(teacher, student, [labels]), of_labels.mean()),
        (divergence(teacher, student, [labels], ignore=3), of_labels[~outside[:, 0]].mean()),
        (divergence(teacher, student, [labels], regions=True), of_regions.mean()),
        (divergence(teacher, student, [with_mask], regions=True, ignore=3), of_regions.mean(1)[~outside[:, 0]].mean()),
    ):
        torch.testing.assert_close(found, expected)
    nowhere = divergence(teacher, student, [torch.full_like(labels, 3)], ignore=3)
    assert float(nowhere) == 0


def test_voxels_to_be_ignored_give_no_gradient() -> None:
    student = logits(1).requires_grad_()
    labels = torch.zeros(2, 1, 4, 5)
    labels[0, 0, 1, 2] = 3
    divergence(logits(0) * 1e4, student, [labels], ignore=3).backward()
    assert student.grad is not None
    assert torch.equal(student.grad[0, :, 1, 2], torch.zeros(3))
    assert bool(torch.isfinite(student.grad).all())
    assert bool((student.grad[1] != 0).any())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 3, 1)
    ).train()


def lent(labels: Labels, scale: float = 1.0) -> Local:
    made, old = network(), network()
    received = {n: t.clone() for n, t in made.state_dict().items()}
    old.load_state_dict(received)
    old.eval().requires_grad_(requires_grad=False)

    def loss(found: Sequence[Tensor], batch: Batch) -> Tensor:
        return (found[0] - 2 * batch.image).square().mean() * scale

    return Local(
        Finest(made), torch.optim.SGD(made.parameters(), 0.1), loss, nullcontext, received, 1e9,
        teacher=lambda image: (old(image),), labels=labels,
    )  # fmt: skip


class Finest(nn.Module):
    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.made = made

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.made(image),)


LABELS: dict[str, Labels] = {
    "labels": {"background": 0, "a": 1, "b": 2},
    "ignore": {"background": 0, "a": 1, "b": 2, "ignore": 3},
    "regions": {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "inner": 3},
    "both": {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "inner": 3, "ignore": 4},
}


def batch(space: str, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 1, 6, 6, generator=generator)
    channels = {"regions": 3, "both": 4}.get(space)
    if channels:
        return Batch(image, (torch.rand(2, channels, 6, 6, generator=generator) > 0.5,))
    return Batch(image, (torch.randint(0, 4, (2, 1, 6, 6), generator=generator).short(),))


@pytest.mark.parametrize("space", LABELS)
def test_in_the_first_step_there_is_nothing_to_learn_from_the_teacher(space: str) -> None:
    """Teacher and student are equal; a step later they are not."""
    local, plain = lent(LABELS[space]), lent(LABELS[space])
    for number in range(2):
        a, b = step(local, batch(space, number), weight=5.0, temperature=2.0), take(plain, batch(space, number))
        near = all(
            torch.allclose(t, plain.network.state_dict()[n], rtol=0, atol=1e-6)
            for n, t in local.network.state_dict().items()
        )
        assert near == (number == 0)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # told before the step, without the term


@pytest.mark.parametrize("space", ["labels", "both"])
def test_the_gradient_is_that_of_loss_and_term(space: str) -> None:
    """Weight and squared temperature stand before the divergence of the tempered probabilities."""
    local = lent(LABELS[space])
    step(local, batch(space), weight=0.0)
    teacher: Any = local.teacher
    drawn = batch(space, 1)
    found = local.network(drawn.image)
    term = divergence(
        teacher(drawn.image)[0] / 3,
        found[0] / 3,
        drawn.labels,
        regions=space == "both",
        ignore=4 if space == "both" else None,
    )
    expected = torch.autograd.grad(local.objective(found, drawn) + 0.7 * 9 * term, list(local.network.parameters()))
    step(local, drawn, weight=0.7, temperature=3.0)
    for parameter, gradient in zip(local.network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def test_where_there_is_nothing_else_the_student_stays_with_the_teacher() -> None:
    """Moved away, and without a loss of its own, it comes back."""
    local = lent(LABELS["labels"], scale=0.0)
    with torch.no_grad():
        for parameter in local.network.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    teacher: Any = local.teacher
    drawn = batch("labels")

    def apart() -> float:
        return float(divergence(teacher(drawn.image)[0], local.network(drawn.image)[0], drawn.labels).detach())

    before = apart()
    for _ in range(200):
        step(local, drawn)
    assert apart() < 0.05 * before
