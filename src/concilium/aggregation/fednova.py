"""Normalised averaging: FedNova (Wang et al. 2020, arXiv:2007.07481, section 4).

    weights ← before + (Σ p_k τ_k) · Σ p_k (update_k − before) / τ_k          p_k: share of cases, τ_k: steps taken

Where sites take different numbers of steps, `mean` favours those that took more, and what it converges to is not what the
study minimises. Here each site gives the direction of one step, and all go as many steps as they took on average. With equal
steps it is `mean`; with steps in proportion to cases the paths of all sites count the same. A site whose round was cut short
counts with all its cases: that it took fewer steps is in τ_k.

The length of a site's path is taken to be its number of steps: so it is for plain SGD, and about so for optimisers that keep
their momentum from round to round, as sites here do, and for Adam, whose steps are all of about one length. Running
statistics of norms and whole numbers are averaged by cases (`_statistics.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from concilium.aggregation import Update
from concilium.aggregation._each import elementwise
from concilium.aggregation._statistics import is_measured
from concilium.messages import Tensors


def rule(updates: Sequence[Update], state: Tensors, *, before: Tensors) -> tuple[Tensors, Tensors]:
    """As many average steps as the sites took on average."""
    cases = torch.tensor([u.n_cases for u in updates], dtype=torch.float64)
    steps = torch.tensor([u.n_steps for u in updates], dtype=torch.float64)
    shares = cases / cases.sum()
    parts = (shares @ steps) * shares / steps
    # the last coefficient is that of the weights before: the parts need not add up to 1
    learnt, measured = torch.cat([parts, 1 - parts.sum(0, keepdim=True)]), torch.cat([shares, shares.new_zeros(1)])
    averaged = {name for name, tensor in before.items() if is_measured(name, tensor)}
    every = [*updates, Update(before, 1, 1, 0.0)]
    return elementwise(every, lambda name, values: (measured if name in averaged else learnt) @ values), state
