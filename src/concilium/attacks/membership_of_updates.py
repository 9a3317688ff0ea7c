"""Who was in the step behind an update: the gradient of a case that was points where the update does.

The cosine of gradients, after Li, Li & Ribeiro, Effective passive membership inference attacks in federated learning against
overparameterized models (ICLR 2023): of many parameters, the gradients of two cases are nearly orthogonal. What all cases have in
common, which the attacker's own tell, is taken out of both first. The attacker is given the very patches of which it asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from concilium.attacks import Auxiliary, Cases, Guess, Known, Transcript
from concilium.errors import ContractError
from concilium.networks import Stages

SEES, GUESSES = "updates", "members"
REVEALS = (
    "a server that sees updates, or their sum, and has an annotated case of which it asks whether it was in that step"
)


def attack(transcript: Transcript, network: Known, auxiliary: Auxiliary, *, seed: int, own: int = 32) -> Guess:
    """How likely each candidate was in one of the steps.

    Args:
        own: cases of the attacker's own that tell what gradients have in common; 0: nothing is taken out.
    """
    if auxiliary.candidates is None or network.loss is None:
        raise ContractError("No candidates, or no loss, were given. Membership of updates needs both. Give them.")
    whole, objective = network.open_whole.train(), network.loss
    names = [n for n, p in whole.named_parameters() if p.requires_grad]
    updates = torch.stack([torch.cat([r.update[n].flatten() for n in names]) for r in transcript])
    common = _gradients(whole, objective, _first(auxiliary.own, own)).mean(0) if own else torch.zeros(updates.shape[1])
    asked = _without(_gradients(whole, objective, auxiliary.candidates), common)
    cosines = _directions(asked) @ _directions(_without(updates, common)).T
    return Guess(members=cosines.amax(1))


def _gradients(whole: Stages, objective: Callable[[Sequence[Tensor], Tensor], Tensor], cases: Cases) -> Tensor:
    """Of each case's loss, a row each."""
    parameters = [p for p in whole.parameters() if p.requires_grad]
    rows = []
    for i in range(len(cases.images)):
        loss = objective(whole(cases.images[i : i + 1]), cases.labels[i : i + 1])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        row = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        rows.append(torch.cat([g.flatten() for g in row]))
    return torch.stack(rows)


def _first(cases: Cases, n: int) -> Cases:
    return Cases(cases.images[:n], cases.labels[:n])


def _without(rows: Tensor, common: Tensor) -> Tensor:
    """What of each row is orthogonal to what all have in common."""
    direction = common / common.norm().clamp_min(1e-20)
    left: Tensor = rows - (rows @ direction).unsqueeze(1) * direction
    return left


def _directions(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-20)
    return unit
