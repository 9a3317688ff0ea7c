"""Which tensors of a network are measured, not learnt: an optimiser at the server has no business with them.

The variance over the data of all sites is the mean of the sites' variances and the variance of their means. Without the second
part a norm whose inputs lie elsewhere at each site would divide by far too little.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from concilium.messages import Tensors

SUFFIXES = ("running_mean", "running_var", "num_batches_tracked")
"""What PyTorch's norms call their running statistics. A network from outside that has others under other names cannot be told
from one that learns them."""


def is_measured(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a running statistic of a norm, by its name, or a whole number."""
    return not tensor.is_floating_point() or name.rpartition(".")[2] in SUFFIXES


def mean_beside(name: str, names: Container[str]) -> str | None:
    """The running mean that belongs to a running variance, where it is among these names; `None` of any other tensor."""
    stem, _, last = name.rpartition(".")
    mean = f"{stem}.{SUFFIXES[0]}" if stem else SUFFIXES[0]
    return mean if last == SUFFIXES[1] and mean in names else None


def spread(squares: Tensor, mean: Tensor) -> Tensor:
    """The variance of means, from the mean of their squares and their mean (float64); 0 where it is no more than rounding."""
    found = squares - mean.square()
    return torch.where(found > 4 * torch.finfo(torch.float64).eps * squares, found, 0.0)


def about_before(after: Tensors, before: Tensors) -> Tensors:
    """The same with running variances (float64) about the means before, in place of their own: those of sites can be averaged."""
    found = dict(after)
    for name in after:
        if (beside := mean_beside(name, after)) is not None and {beside, name} <= before.keys():
            found[name] = (
                after[name].cpu().double() + (after[beside].cpu().double() - before[beside].cpu().double()).square()
            )
    return found


def about_own(changes: Tensors) -> dict[str, Tensor]:
    """From the mean of changes that were told so, the change of the variances about the new means."""
    found = dict(changes)
    for name in changes:
        if (beside := mean_beside(name, changes)) is not None:
            found[name] = changes[name] - changes[beside].square()
    return found
