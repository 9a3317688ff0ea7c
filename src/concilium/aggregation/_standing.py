"""What a rule remembers of each site from round to round, and what part of its weight a site is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from concilium.aggregation import Update
from concilium.aggregation._each import counted, weighted_mean
from concilium.messages import Tensors

PART = "part/"
"""Prefix in the state: the part of the weight of its cases that a site was given, the last time that it answered."""


def remember(
    state: Tensors, what: str, updates: Sequence[Update], values: Sequence[float], *, memory: float, start: float
) -> tuple[dict[str, Tensor], list[float]]:
    """The running mean of a value of each site, as tensors `WHAT/SITE` of the state and as numbers.

    It begins at `start`, the value of a site beyond suspicion, and takes in a share of 1 − `memory` of each round's.
    """
    means = [
        memory * recall(state, what, [update], start=start)[0] + (1 - memory) * value
        for update, value in zip(updates, values, strict=True)
    ]
    return {f"{what}/{update.site}": torch.tensor(mean) for update, mean in zip(updates, means, strict=True)}, means


def recall(state: Tensors, what: str, updates: Sequence[Update], *, start: float) -> list[float]:
    """What is remembered of each site."""
    keys = [f"{what}/{update.site}" for update in updates]
    return [float(state[key]) if key in state else start for key in keys]


def mean_of_parts(updates: Sequence[Update], parts: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mean weighted by cases times a part from 0 to 1, and the parts as tensors of the state; all whole where all are 0."""
    given = parts if any(parts) else [1.0] * len(updates)
    weights = weighted_mean(updates, [counted(u, part) for u, part in zip(updates, given, strict=True)])
    return weights, {PART + update.site: torch.tensor(part) for update, part in zip(updates, given, strict=True)}
