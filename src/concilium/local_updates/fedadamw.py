"""FedAdamW: Adam or AdamW with one second moment for all sites, and a pull along the way that all went together.

A site's Adam divides each step by the size of that site's own gradients. A direction of which a site knows next to nothing, such
as a label that it does not annotate, then gets steps as long as any other, and in the mean these outvote the steps of those
that know: the sites no longer descend what they have in common (Wang et al. 2021, arXiv:2106.02305). Liu et al. 2025
(arXiv:2510.27486) begin every round with the mean of the sites' second moments, and add to each step

    rate · align · (x_r − x_{r-1}) / (sum of the rates of a round)          x_r: the shared weights as round r began

which is the mean way of all sites in the round before. Here each site sends its whole second moment, not means of blocks of
it: as many values as the network trains. It sends by how much the moment has changed, corrected for its start from zero;
the server adds these up by shares of all training cases. First moments stay at their sites, and last from round to round.

A site that missed rounds takes the way since it last took part for that of one round. `align = 0` shares the moment alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.data.patches import Batch
from concilium.local_updates import Local, take, trained
from concilium.messages import Tensors

TOGETHER = True
OPTIMIZERS = ("adam", "adamw")
WAY, BEFORE, RATES, LAST = "way/", "before/", "rates", "last"
"""What the memory holds: in a round, the way per unit of rate and the sum of the rates so far; between, x_r and the last sum."""
LONG_AGO = 1e6
"""Steps after which Adam's correction for its start from zero is 1 to float32's last bit."""


def step(local: Local, batch: Batch, *, align: float = 0.5) -> Tensor:
    """Take one step; the loss before it.

    Args:
        align: how much of the way of all sites in the round before is added to each step.
    """
    memory = local.memory
    if RATES not in memory:
        _begin(local)
    if batch.is_unknown:
        return torch.zeros(())
    loss = take(local, batch)
    rate = float(local.optimizer.param_groups[0]["lr"])
    memory[RATES] += rate
    if align:
        with torch.no_grad():
            for name, p in trained(local.network):
                if WAY + name in memory:
                    p.add_(memory[WAY + name], alpha=rate * align)
    return loss


def _begin(local: Local) -> None:
    """Get ready for the steps of a round."""
    memory = local.memory
    last = float(memory.pop(LAST, 0.0))
    memory[RATES] = torch.zeros((), dtype=torch.float64)
    for name, p in trained(local.network):
        shared = name in local.control
        if shared:
            own = local.optimizer.state[p]
            own.setdefault("exp_avg", torch.zeros_like(p, requires_grad=False))
            own["exp_avg_sq"] = local.control[name].to(p.device).clamp_min(0)
            own["step"] = torch.tensor(LONG_AGO, dtype=torch.float32)
        before = memory.pop(BEFORE + name, None)
        if shared and last and before is not None:
            memory[WAY + name] = ((local.received[name] - before) / last).to(p.device)
        memory[BEFORE + name] = local.received[name].detach().cpu().clone()


def finish(local: Local, *, steps: int, align: float = 0.5) -> Tensors:
    """By how much the site's second moment differs from the shared one; nothing where the optimiser has none."""
    memory = local.memory
    memory[LAST] = memory.pop(RATES)
    for name in [name for name in memory if name.startswith(WAY)]:
        del memory[name]
    moments = {name: _moment(local, p) for name, p in trained(local.network)}
    return {name: m - local.control.get(name, torch.zeros(())) for name, m in moments.items() if m is not None}


def _moment(local: Local, p: torch.nn.Parameter) -> Tensor | None:
    """The optimiser's second moment of a parameter, corrected for its start from zero; `None`: it has none."""
    group = local.optimizer.param_groups[0]  # there is one
    if "betas" not in group:
        return None
    state = local.optimizer.state[p]
    if not state:  # no step has reached it
        return torch.zeros_like(p, requires_grad=False).cpu()
    moment: Tensor = state["exp_avg_sq"].detach().cpu() / (1 - group["betas"][1] ** float(state["step"]))
    return moment
