"""SCAFFOLD: each step is corrected by how a site's gradient differs from that of all, so that many steps do not drift.

Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1 with option II. A step goes down g - c_i + c: g is the gradient on
the batch, c_i the site's control variate, which stays there, c that of the server. After K steps c_i changes to
c_i - c + (x - y) / (K rate), for weights that went from x to y, and the site sends by how much it changed. The server
adds these up, by shares of all training cases: so c is at all times the mean of all c_i, also where only some sites took
part. All start at zero: the first round is plain.

With SGD (x - y) / (K rate) is the mean of the directions that were taken; where the rate falls from step to step, their
mean weighted by the rates. It is this mean that is kept here: with SGD the same to rounding, but for a decay of weights,
which is no gradient. With momentum or Adam a difference of weights is no gradient any more: under a momentum of 0.9 it is
ten times as long, and control variates made of it grow without bound. The mean stays on the scale of a gradient, and the
correction is added before the optimiser sees it. The paper's theory is for SGD, and does not say that this is still
right: momentum keeps some of the last round's correction, and Adam divides it by a moment of gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.data.patches import Batch
from concilium.local_updates import Local, take, trained
from concilium.messages import Tensors
from concilium.optimization import all_finite

TOGETHER = True
OWN, CORRECTION, TAKEN, RATES = "own/", "correction/", "taken/", "rates"
"""What the memory holds: c_i; and within a round c - c_i, the sum of the directions times their rates, the sum of the rates."""


def step(local: Local, batch: Batch) -> Tensor:
    """Take one corrected step; the loss before it."""
    memory = local.memory
    if RATES not in memory:
        _begin(local)
    if batch.is_unknown:
        return torch.zeros(())
    loss = take(
        local, batch, ((p, memory[CORRECTION + n]) for n, p in trained(local.network) if CORRECTION + n in memory)
    )
    gradients = {n: p.grad for n, p in trained(local.network) if p.grad is not None}
    if local.scaler is not None and not all_finite(gradients.values()):
        return loss  # the optimiser left this step out
    rate = float(local.optimizer.param_groups[0]["lr"])
    for name, gradient in gradients.items():
        memory[TAKEN + name].add_(gradient, alpha=rate)
    memory[RATES] += rate
    return loss


def _begin(local: Local) -> None:
    """Get ready for the steps of a round."""
    memory = local.memory
    memory[RATES] = torch.zeros((), dtype=torch.float64)
    for name, p in trained(local.network):
        memory[TAKEN + name] = torch.zeros_like(p, requires_grad=False)
        if name in local.control:  # what is not shared has no drift to correct
            own = memory.get(OWN + name, torch.zeros(()))
            memory[CORRECTION + name] = (local.control[name] - own).to(p.device)


def finish(local: Local, *, steps: int) -> Tensors:
    """By how much the site's control variate has changed."""
    memory = local.memory
    rates = float(memory.pop(RATES))
    change: dict[str, Tensor] = {}
    for name, _ in trained(local.network):
        memory.pop(CORRECTION + name, None)
        taken = memory.pop(TAKEN + name).cpu()
        if rates == 0:  # every step was left out
            change[name] = torch.zeros_like(taken)
            continue
        change[name] = taken / rates - local.control.get(name, torch.zeros(()))
        # the sum that the server makes too: where all sites are equal, c_i and c stay so to the bit
        memory[OWN + name] = memory.get(OWN + name, torch.zeros(())) + change[name]
    return change
