"""Conditional distillation: the shared network as the round began labels what a site does not annotate.

Wang et al. 2023, ConDistFL (arXiv:2308.04070), as its authors' code has it. In a patch of which labels A are annotated, what
both networks say is conditioned on a voxel being none of A: the softmax of logits / T over the others, each p_c / (1 - sum of
p over A). Labels of one organ may be added up (`groups`). The term is minus the soft Dice of what both say of each group, the
background among them, at full resolution; overlap is counted over the patches of the batch. Voxels that are annotated as A, or
that the teacher takes for A, are left out: there the site's own labels decide. What is annotated is learnt by the study's
loss, in the paper by `marginal`. The term's weight grows from round to round, since the first teachers know little.

A patch by itself, as in losses for partial labels: where everything is annotated, or nothing, there is no term; so where all
are it is `plain`, to the bit. Regions overlap, so none is what is left without the others: they are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.catalog import allowed
from concilium.data.labels import foreground, has_regions, ignored, n_heads
from concilium.data.patches import Batch
from concilium.errors import ContractError, StudyError
from concilium.local_updates import Local, descend, logits_of, take
from concilium.losses._partial import looked_for, soft_dice, without
from concilium.messages import Labels

TOGETHER = COMPUTES_MORE = True


def step(
    local: Local,
    batch: Batch,
    *,
    weight: float = 1.0,
    first_weight: float = 0.01,
    temperature: float = 2.0,
    groups: tuple[tuple[str, ...], ...] = (),
) -> Tensor:
    """Take one step; the loss before it, without the term.

    Args:
        weight: of the term in the last round.
        first_weight: of the term in the first; in between it grows evenly. With both 0 it is `plain`.
        temperature: by which logits are divided: above 1 small probabilities count for more.
        groups: labels that are taught together, as an organ and its tumour; every other label is a group of its own.

    Raises:
        ContractError: there is no teacher.
    """
    factor = first_weight + (weight - first_weight) * local.progress
    if factor == 0 or batch.annotated is None or batch.is_unknown:
        return take(local, batch)
    wanted = looked_for(batch.annotated, regions=has_regions(local.labels))
    taught = wanted.any(1) & ~wanted[:, 1:].all(1)
    if not bool(taught.any()):
        return take(local, batch)
    if local.teacher is None:
        raise ContractError(
            f"condistfl was lent {local.teacher} as a teacher. Expected the network as the round began. Report this."
        )
    members = membership(local.labels, groups).to(wanted.device)
    teacher = local.teacher(batch.image)[0]
    logits = logits_of(local, batch)
    loss = local.objective(logits, batch)
    term = disagreement(
        teacher / temperature,
        logits[0] / temperature,
        batch.labels[0],
        wanted,
        taught,
        members,
        ignore=ignored(local.labels),
    )
    descend(local, loss + factor * term)
    return loss.detach()


def check(labels: Labels, *, groups: tuple[tuple[str, ...], ...], **_: object) -> None:
    """Look whether there is a network of these labels to distil.

    Raises:
        StudyError: they are regions, or `groups` names others.
    """
    membership(labels, groups)


def membership(labels: Labels, groups: tuple[tuple[str, ...], ...]) -> Tensor:
    """Which labels each group has, bool (G, L): the background, those named, and every label that is not named by itself.

    Raises:
        StudyError: the labels are regions, or a group names what is no label, or two the same.
    """
    names = list(foreground(labels))
    if has_regions(labels):
        raise StudyError(
            f"[local_update] name = 'condistfl' is not allowed with regions ({', '.join(names)}): they overlap. Allowed: labels "
            "that exclude each other. For regions choose 'distill'."
        )
    named = [name for group in groups for name in group]
    if unknown := [name for name in named if name not in names]:
        raise StudyError(f"[local_update] groups = {_shown(groups)} names {unknown[0]!r}. {allowed(unknown[0], names)}")
    if len(set(named)) < len(named):
        raise StudyError(
            f"[local_update] groups = {_shown(groups)} is not allowed. Allowed: each label once. Take one out."
        )
    every = [*groups, *((name,) for name in names if name not in named)]
    members = torch.zeros(1 + len(every), n_heads(labels), dtype=torch.bool)
    members[0, 0] = True
    for row, group in zip(members[1:], every, strict=True):
        row[[1 + names.index(name) for name in group]] = True
    return members


def _shown(groups: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    return [list(group) for group in groups]


def disagreement(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor,
    wanted: Tensor,
    taught: Tensor,
    members: Tensor,
    *,
    ignore: int | None = None,
) -> Tensor:
    """Minus the soft Dice of what both networks say of what is not annotated, from -1.

    Args:
        teacher, student: logits (B, L, *patch), divided by the temperature.
        labels: (B, 1, *patch), ids.
        wanted: bool (B, L), what is annotated in each patch, without the background.
        taught: bool (B,), the patches that count.
        members: bool (G, L), the labels of each group.
    """
    teacher, student = teacher.float(), student.float()
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
    ids = torch.where(counts, labels, 0).long()
    own = [_is(wanted, which) for which in (ids, teacher.argmax(1, keepdim=True))]
    counts = counts & ~own[0] & ~own[1]
    said, truth = (
        torch.einsum("bl...,gl->bg...", without(x, wanted).softmax(1), members.float()) for x in (student, teacher)
    )
    open_ = (~wanted[:, None] & members).any(2) & taught[:, None]
    return soft_dice(said, truth, counts, open_, batch_dice=True)


def _is(wanted: Tensor, ids: Tensor) -> Tensor:
    """Where ids (B, 1, *patch) are those of labels that are annotated in their patch."""
    return wanted.gather(1, ids.flatten(1)).view_as(ids)
