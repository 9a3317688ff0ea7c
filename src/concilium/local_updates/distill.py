"""Distillation from the shared network as the round began, so that a site does not forget what the others know.

Yao et al. 2021 (FedGKD, arXiv:2107.00051), with the last shared network alone as the teacher, in the form of Hinton et
al. 2015 (arXiv:1503.02531, section 2): the loss plus weight T^2 KL(teacher || student), where both are the softmax of
logits / T; the mean over voxels at full resolution. Regions are each for themselves: the divergence of two sigmoids; the
mean over voxels and regions. Voxels to be ignored take no part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from concilium.data.labels import has_regions, ignored
from concilium.data.patches import Batch
from concilium.errors import ContractError
from concilium.local_updates import Local, descend, logits_of

TOGETHER = COMPUTES_MORE = True


def step(local: Local, batch: Batch, *, weight: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Take one step; the loss before it, without the term.

    Args:
        weight: of the term; 0 is `plain`.
        temperature: by which logits are divided: above 1 the teacher's small probabilities count for more.

    Raises:
        ContractError: there is no teacher.
    """
    if batch.is_unknown:
        return torch.zeros(())
    logits = logits_of(local, batch)
    loss = local.objective(logits, batch)
    if weight == 0:
        descend(local, loss)
        return loss.detach()
    if local.teacher is None:
        raise ContractError(
            f"distill was lent {local.teacher} as a teacher. Expected the network as the round began. Report this."
        )
    term = divergence(
        local.teacher(batch.image)[0] / temperature,
        logits[0] / temperature,
        batch.labels,
        regions=has_regions(local.labels),
        ignore=ignored(local.labels),
    )
    descend(local, loss + weight * temperature**2 * term)
    return loss.detach()


def divergence(
    teacher: Tensor, student: Tensor, labels: Sequence[Tensor], *, regions: bool = False, ignore: int | None = None
) -> Tensor:
    """KL(teacher || student) of what these logits (B, L, *patch) say, as a mean over the voxels that are not to be ignored."""
    teacher, student = teacher.float(), student.float()
    counted = _counted(labels[0], regions, ignore)
    if regions:
        yes, no = logsigmoid(teacher), logsigmoid(-teacher)
        apart = yes.exp() * (yes - logsigmoid(student)) + no.exp() * (no - logsigmoid(-student))
        per_voxel = apart.mean(1)
    else:
        known = teacher.log_softmax(1)
        per_voxel = (known.exp() * (known - student.log_softmax(1))).sum(1)
    if counted is None:
        return per_voxel.mean()
    return torch.where(counted, per_voxel, 0.0).sum() / counted.sum().clamp(min=1)


def _counted(labels: Tensor, regions: bool, ignore: int | None) -> Tensor | None:
    """Which voxels (B, *patch) take part; `None`: all."""
    if ignore is None:
        return None
    return ~labels[:, -1].bool() if regions else labels[:, 0] != ignore
