"""Conditional distillation against numbers worked out by hand and the paper's formulas, written out voxel by voxel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from concilium.data.patches import Batch
from concilium.errors import ContractError, StudyError
from concilium.local_updates import Local, take
from concilium.local_updates.condistfl import check, disagreement, membership, step
from concilium.messages import Labels

LABELS: Labels = {"background": 0, "liver": 1, "kidney": 2, "tumour": 3}
GROUPS = (("kidney", "tumour"),)
SMOOTH = 1e-5
in_2d_and_3d = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])


def drawn(dims: int, seed: int, n: int = 2) -> Tensor:
    return torch.randn(n, 4, *(5, 4, 3)[:dims], generator=torch.Generator().manual_seed(seed)) * 2


def ids(dims: int, seed: int, n: int = 2, most: int = 4) -> Tensor:
    return torch.randint(0, most, (n, 1, *(5, 4, 3)[:dims]), generator=torch.Generator().manual_seed(seed))


def wanted(*rows: tuple[int, ...]) -> Tensor:
    """What is annotated in each patch: ids, without the background."""
    return torch.tensor([[i in row for i in range(4)] for row in rows])


def by_hand(
    teacher: Tensor, student: Tensor, labels: Tensor, annotated: Sequence[Sequence[int]], groups: Sequence[Sequence[int]],
    *, ignore: int | None = None,
) -> float:  # fmt: skip
    """Minus the mean over groups and patches of 2 sum(p q) / (sum p + sum q), over the voxels outside what is annotated."""
    sums = {}
    for b, own in enumerate(annotated):
        others = [c for c in range(1, 4) if c not in own]
        if not own or not others:
            continue
        q, p = (x[b].flatten(1).softmax(0) for x in (teacher, student))
        truth = labels[b].flatten().tolist()
        for g, members in enumerate(groups):
            left = [c for c in members if c not in own]
            if not left:
                continue
            both, said = sums.get(g, (0.0, 0.0))
            for v, true in enumerate(truth):
                if true == ignore or true in own or int(q[:, v].argmax()) in own:
                    continue
                a, b_ = (float(sum(x[c, v] for c in left)) / (1 - float(sum(x[c, v] for c in own))) for x in (q, p))
                both, said = both + 2 * a * b_, said + a + b_
            sums[g] = both, said
    per_patch = []
    for own in annotated:
        others = [c for c in range(1, 4) if c not in own]
        if own and others:
            dice = [
                (sums[g][0] + SMOOTH) / (sums[g][1] + SMOOTH)
                for g, m in enumerate(groups)
                if any(c not in own for c in m)
            ]
            per_patch.append(sum(dice) / len(dice))
    return -sum(per_patch) / len(per_patch)


def test_one_voxel_by_hand() -> None:
    """The teacher says 2/5 background, 1/5 liver, 2/5 kidney: without the liver, one half each. The student says 3/4 and 1/4."""
    labels, own = torch.zeros(1, 1, 1), wanted((1,))
    taught, members = torch.tensor([True]), membership(LABELS, ())
    teacher = torch.tensor([0.4, 0.2, 0.4, 1e-30]).log()[None, :, None]
    student = torch.tensor([0.6, 0.2, 0.2, 1e-30]).log()[None, :, None]
    found = disagreement(teacher, student, labels, own, taught, members)
    background, kidney = 2 * 0.5 * 0.75 / 1.25, 2 * 0.5 * 0.25 / 0.75
    assert float(found) == pytest.approx(-(background + kidney + 1) / 3, abs=1e-4), "both see no tumour"
    liver = torch.tensor([0.2, 0.5, 0.3, 1e-30]).log()[None, :, None]
    nothing = disagreement(liver, student, labels, own, taught, members)
    assert float(nothing) == -1, (
        "the teacher takes it for liver, which the site knows better: no voxel is left to differ in"
    )


@in_2d_and_3d
@pytest.mark.parametrize("groups", [(), GROUPS], ids=["each", "organ and tumour"])
@pytest.mark.parametrize("own", [((1,), (2,)), ((1, 2), (1,)), ((1,), (1, 2, 3)), ((3,), ())])
@pytest.mark.parametrize("ignore", [None, 4])
def test_it_is_the_papers_formula(
    dims: int, groups: tuple[tuple[str, ...], ...], own: Sequence[tuple[int, ...]], ignore: int | None
) -> None:
    teacher, student = drawn(dims, 0), drawn(dims, 1)
    labels = ids(dims, 2, most=5 if ignore else 4)
    flags = wanted(*own)
    taught = torch.tensor([0 < len(row) < 3 for row in own])
    found = disagreement(teacher, student, labels, flags, taught, membership(LABELS, groups), ignore=ignore)
    sets = [[0], [2, 3], [1]] if groups else [[0], [1], [2], [3]]
    assert float(found) == pytest.approx(by_hand(teacher, student, labels, own, sets, ignore=ignore), abs=1e-5)


def test_a_student_that_says_what_the_teacher_is_sure_of_is_as_good_as_can_be() -> None:
    teacher = drawn(2, 0) * 10000
    labels, own = torch.zeros(2, 1, 5, 4), wanted((1,), (1,))
    taught, members = torch.tensor([True, True]), membership(LABELS, ())
    assert float(disagreement(teacher, teacher, labels, own, taught, members)) == pytest.approx(-1, abs=1e-4)
    assert float(disagreement(teacher, drawn(2, 1) * 100, labels, own, taught, members)) > -0.6


def test_what_is_annotated_or_taken_for_it_or_to_be_ignored_gives_no_gradient() -> None:
    teacher = torch.zeros(1, 4, 1, 4)
    teacher[0, 1, 0, 1] = (
        5.0  # the second voxel is liver to the teacher; the first by the label map; the third is ignored
    )
    teacher[0, 2, 0, 3] = 5.0  # the last is kidney to the teacher
    student = torch.zeros(1, 4, 1, 4, requires_grad=True)
    labels = torch.tensor([1, 0, 4, 0]).view(1, 1, 1, 4)
    disagreement(
        teacher, student, labels, wanted((1,)), torch.tensor([True]), membership(LABELS, ()), ignore=4
    ).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.equal(student.grad[0, :, 0, :3], torch.zeros(4, 3))
    background, liver, kidney, tumour = student.grad[0, :, 0, 3].tolist()
    assert kidney < 0 < background, "the student is told that it is kidney"
    assert liver == 0, "and nothing of what the site annotates itself"
    assert tumour > 0


def test_within_a_group_nothing_is_told_apart() -> None:
    """A teacher that takes the tumour for kidney does not say that it is none."""
    teacher = torch.zeros(1, 4, 1, 1)
    teacher[0, 2] = 50.0
    student = torch.zeros(1, 4, 1, 1)
    student[0, 3] = 50.0
    told = (torch.zeros(1, 1, 1, 1), wanted((1,)), torch.tensor([True]))
    apart, together = (disagreement(teacher, student, *told, membership(LABELS, groups)) for groups in ((), GROUPS))
    assert float(together) == pytest.approx(-1, abs=1e-3)
    assert float(apart) > -0.4


def test_each_label_has_one_group() -> None:
    assert membership(LABELS, ()).int().tolist() == torch.eye(4).int().tolist()
    assert membership(LABELS, GROUPS).int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert membership({**LABELS, "ignore": 4}, GROUPS).shape == (3, 4)


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ({"background": 0, "whole": (1, 2), "core": 2}, (), r"not allowed with regions \(whole, core\).*'distill'"),
        (LABELS, (("kidny", "tumour"),), r"groups = \[\['kidny', 'tumour'\]\] names 'kidny'. Did you mean 'kidney'"),
        (LABELS, (("kidney", "tumour"), ("tumour",)), r"groups = .* is not allowed. Allowed: each label once"),
        (LABELS, (("background",),), r"names 'background'"),
    ],
)
def test_labels_that_cannot_be_distilled_are_refused(
    labels: Labels, groups: tuple[tuple[str, ...], ...], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        check(labels, groups=groups, weight=1.0)


# ------------------------------------------------------------------------------------------------------------- the step


class Finest(nn.Module):
    """Logits of two scales from a small network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.made = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.InstanceNorm2d(6), nn.Softplus(), nn.Conv2d(6, 4, 1)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        y = self.made(image)
        return y, y[..., ::2, ::2]


def loss(found: Sequence[Tensor], batch: Batch) -> Tensor:
    return (found[0] - 2 * batch.image).square().mean() + found[1].square().mean()


def lent(*, progress: float = 1.0, teacher: float = 1.0) -> Local:
    """`teacher`: by what the weights of the teacher are multiplied."""
    made, old = Finest().train(), Finest().eval()
    old.requires_grad_(requires_grad=False)
    with torch.no_grad():
        for p in old.parameters():
            p.mul_(teacher)
    received = {n: t.clone() for n, t in made.state_dict().items()}
    optimizer = torch.optim.SGD(made.parameters(), 0.1, momentum=0.9)
    return Local(
        made, optimizer, loss, nullcontext, received, 1e9, teacher=old, labels=LABELS, progress=progress
    )  # fmt: skip


def batch(*rows: tuple[int, ...], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(len(rows), 1, 6, 6, generator=generator)
    labels = torch.randint(0, 4, image.shape, generator=generator).short()
    annotated = wanted(*rows)
    annotated[:, 0] = annotated.any(1)
    return Batch(image, (labels, labels[..., ::2, ::2]), annotated)


def apart(one: Local, other: Local) -> float:
    a, b = one.network.state_dict(), other.network.state_dict()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("rows", [((1, 2, 3), (1, 2, 3)), ((), ()), ((1, 2, 3), ())])
def test_where_all_or_nothing_is_annotated_it_is_plain_to_the_bit(rows: tuple[tuple[int, ...], ...]) -> None:
    one, other = lent(teacher=-2.0), lent()
    for number in range(3):
        drawn = batch(*rows, seed=number)
        assert torch.equal(step(one, drawn, weight=7.0), take(other, drawn))
    assert apart(one, other) == 0


def test_the_weight_grows_evenly_from_the_first_round_to_the_last() -> None:
    """Of a step of SGD, what the term adds to the gradient is proportional to it."""
    drawn = batch((1,), (2, 3))
    plain = lent(teacher=-2.0)
    take(plain, drawn)
    moved = {}
    for progress, weight, first in ((0.0, 4.0, 1.0), (0.5, 4.0, 1.0), (1.0, 4.0, 1.0), (0.25, 1.0, 1.0)):
        local = lent(progress=progress, teacher=-2.0)
        told = step(local, drawn, weight=weight, first_weight=first, temperature=1.0)
        torch.testing.assert_close(told, take(lent(), drawn))  # before the step, without the term
        moved[progress] = apart(local, plain)
    assert moved[1.0] > 1e-4
    assert [moved[p] / moved[1.0] for p in (0.0, 0.5, 0.25)] == pytest.approx([0.25, 0.625, 0.25], rel=1e-2)
    none = lent(progress=0.0, teacher=-2.0)
    step(none, drawn, weight=4.0, first_weight=0.0)
    assert apart(none, plain) == 0


def test_a_patch_that_is_annotated_whole_does_not_count_in_a_mixed_batch() -> None:
    drawn = batch((1,), (1, 2, 3))
    local = lent(teacher=-2.0)
    seen: list[Tensor] = []

    def watched(found: Sequence[Tensor], drawn: Batch) -> Tensor:
        found[0].register_hook(seen.append)
        return 0 * found[0].sum()

    step(replace(local, objective=watched), drawn, weight=1.0)
    assert bool((seen[0][0] != 0).any())
    assert torch.equal(seen[0][1], torch.zeros_like(seen[0][1]))


def test_a_teacher_is_needed() -> None:
    with pytest.raises(ContractError, match="condistfl was lent None as a teacher"):
        step(replace(lent(), teacher=None), batch((1,), (2,)))


def test_it_learns_what_the_teacher_knows_and_the_site_does_not() -> None:
    """A loss that asks about nothing, and a teacher that is sure: after a while the student says the same of the others."""
    local = lent(teacher=5.0)
    with torch.no_grad():
        for p in local.network.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    local = replace(local, objective=lambda found, drawn: 0 * found[0].sum())
    drawn = batch((1,), (1,))
    image = drawn.image
    assert local.teacher is not None
    others = [0, 2, 3]
    teacher = local.teacher(image)[0][:, others].argmax(1)
    left = drawn.labels[0][:, 0] != 1

    def agreement() -> float:
        with torch.no_grad():
            return float((local.network(image)[0][:, others].argmax(1) == teacher)[left].float().mean())

    before = agreement()
    for _ in range(200):
        step(local, drawn, weight=1.0, temperature=1.0)
    assert agreement() > max(before, 0.8)
    assert math.isfinite(before)
