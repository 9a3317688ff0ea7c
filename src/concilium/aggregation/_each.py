"""Updates that a rule sees, read tensor by tensor: memory holds one tensor of each site at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from concilium.aggregation import CHUNK, UNITS, Sum, Update
from concilium.aggregation._statistics import mean_beside


def counted(update: Update, factor: float = 1.0) -> int:
    """What an update counts in a mean weighted by cases (`weight_of`), times a factor from 0 to 1; 0 with the factor 0 only."""
    whole = max(1, round(UNITS * update.n_cases * update.share))
    return max(1, round(whole * factor)) if factor else 0


def weighted_mean(updates: Sequence[Update], weights: Sequence[int]) -> dict[str, Tensor]:
    """The mean as `mean` forms it, to the bit; updates that weigh nothing are not read."""
    members = [(update, weight) for update, weight in zip(updates, weights, strict=True) if weight]
    means: dict[str, Tensor] = {}
    for name in (names := members[0][0].weights):
        total = Sum()
        beside = mean_beside(name, names)
        for update, weight in members:
            total.add({n: update.weights[n] for n in (beside, name) if n}, weight)
        means |= total.mean()
    return {name: means[name] for name in names}


def elementwise(updates: Sequence[Update], function: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """New tensors from a function of a name and values (n sites, m elements) -> (m,) in float64; whole numbers are rounded.

    To each running variance of a norm comes the square by which its running mean is off the function's (`_statistics.py`).
    """
    found: dict[str, Tensor] = {}
    for name in (names := updates[0].weights):
        like = names[name]
        values = pieces(updates, name)
        if (beside := mean_beside(name, names)) is not None:
            of_means = (means - function(beside, means) for means in pieces(updates, beside))
            values = (piece + off.square() for piece, off in zip(values, of_means, strict=True))
        value = torch.cat([function(name, piece) for piece in values]).reshape(like.shape)
        found[name] = (value if like.is_floating_point() else value.round()).to(like.dtype)
    return found


def pieces(updates: Sequence[Update], name: str) -> Iterator[Tensor]:
    """A tensor of every site in float64, (n sites, m elements), some elements at a time; at least one piece, if an empty one."""
    flat = [update.weights[name].reshape(-1) for update in updates]
    for start in range(0, max(1, flat[0].numel()), CHUNK):
        yield torch.stack([tensor[start : start + CHUNK] for tensor in flat]).double()


def middle(values: Tensor, cut: int) -> Tensor:
    """The mean over sites (n, m) without the `cut` smallest and largest values of each element."""
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)
