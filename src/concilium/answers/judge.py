"""Answer to `Judge`: how well another site's update fits this site's validation cases.

The score is the soft Dice of the network's probabilities (Milletari et al. 2016, arXiv:1606.04797), meaned over the labels
that a case has, then over cases. Not the loss: it has no bounds, and depends on the study's options. Not the Dice of a label
map either: where half of the masks were wrong, the network is less sure of all of them, and what it finds likeliest is hardly
worse. Soft Dice is from 0 to 1, sees that, and is there for any labels, regions too.

It is taken on the cases as they were preprocessed for training, without mirroring: updates are compared, and all are judged
alike. That spares reading, resampling there and back, and in 3D seven of eight predictions.
"""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from concilium.aggregation import check_like
from concilium.answers import Cancelled, Check, Job, Settings
from concilium.data.labels import Labels, foreground, has_regions, ignored
from concilium.data.preprocess import prepare
from concilium.data.windows import predict_logits
from concilium.disclosure import MIN_CASES
from concilium.messages import Judge, Judged


def judge(settings: Settings, job: Job, request: Judge, *, device: torch.device, cancelled: Check) -> Judged:
    """The mean soft Dice of these weights over the first validation cases.

    Raises:
        ContractError: the weights are not this network's.
        Cancelled: the request was cancelled.
    """
    network = job.network()
    check_like(request.weights, network.state_dict())
    network.load_state_dict(dict(request.weights))
    network.to(device).eval()
    scores, patients = [], set()
    for entry in job.entries["validation"][: request.cases]:
        if cancelled():
            raise Cancelled
        case = prepare(entry.case, entry.dataset, job.plan, settings.cache / entry.member)
        logits = predict_logits(
            network,
            case.image,
            job.plan,
            labels=job.labels,
            device=device,
            mirror=False,
            precision=job.training.precision,
        )
        score = soft_dice(logits, torch.tensor(case.label[0]), job.labels)
        if score is not None:
            scores.append(score)
            patients.add((entry.member, entry.patient))
    told = len(patients) >= (1 if settings.policy.case_scores else MIN_CASES)
    return Judged(fmean(scores), len(scores)) if told else Judged(0.0, 0)


def soft_dice(logits: Tensor, label: Tensor, labels: Labels) -> float | None:
    """Of logits (L, X, Y, Z) and a label map (X, Y, Z), the mean over the labels or regions that this has; `None` without any."""
    logits = logits.float()
    chances = logits.sigmoid() if has_regions(labels) else logits.softmax(dim=0)[1:]
    ignore = ignored(labels)
    counted = torch.ones_like(label, dtype=torch.bool) if ignore is None else label != ignore
    found = []
    for chance, ids in zip(chances, foreground(labels).values(), strict=True):
        reference = (torch.isin(label, torch.tensor(ids, dtype=label.dtype)) & counted).float()
        if reference.any():
            chance = chance * counted
            found.append(min(1.0, float(2 * (chance * reference).sum() / (chance.sum() + reference.sum()))))
    return fmean(found) if found else None
