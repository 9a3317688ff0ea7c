"""Updates made by hand or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from concilium.aggregation import Sum, Update, weight_of
from concilium.messages import Tensors

STATISTICS = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def network(seed: int, *, scale: float = 1.0) -> dict[str, Tensor]:
    """Weights, a batch norm with its statistics, and a tensor without elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": scale * torch.randn(4, 2, 3, 3, generator=generator),
        "conv.bias": scale * torch.randn(4, generator=generator),
        "norm.running_mean": torch.randn(4, generator=generator),
        "norm.running_var": torch.rand(4, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7 + seed),
        "none": torch.empty(0, 3),
    }


def near(before: Tensors, seed: int, *, step: float = 0.01) -> dict[str, Tensor]:
    """Weights after a round: those before, a common step, and one of the site's own; its own statistics."""
    ours, own = network(1000, scale=step), network(seed, scale=step)
    moved = {name: before[name] + ours[name] + own[name] for name in ("conv.weight", "conv.bias")}
    return own | moved


def by_hand(*rows: Sequence[float], **columns: Sequence[Any]) -> list[Update]:
    """One update for each row of numbers; `n_cases=(1, 2)` and the like give what else it has, site by site."""
    known: dict[str, Sequence[Any]] = {
        "n_cases": [1] * len(rows),
        "n_steps": [1] * len(rows),
        "loss": [0.5] * len(rows),
    }
    known |= {"site": [f"s{i}" for i in range(len(rows))]} | columns
    return [
        Update({"x": torch.tensor(row)}, **{key: values[i] for key, values in known.items()})
        for i, row in enumerate(rows)
    ]


def updates_of(networks: Sequence[Tensors], **columns: Sequence[Any]) -> list[Update]:
    """The same of whole networks."""
    made = by_hand(*[[0.0]] * len(networks), **columns)
    return [Update(**(vars(u) | {"weights": weights})) for u, weights in zip(made, networks, strict=True)]


def about(networks: Sequence[Tensors], mean: Tensor) -> list[dict[str, Tensor]]:
    """The same, each running variance about this running mean, as the variance of all data is made of them."""
    var, own = STATISTICS[1], STATISTICS[0]
    return [{**n, var: (n[var].double() + (n[own].double() - mean.double()).square()).float()} for n in networks]


def total_of(updates: Sequence[Update], rule: str = "mean") -> Sum:
    total, weigh = Sum(), weight_of(rule)
    for u in updates:
        total.add(u.weights, weigh(u.n_cases, u.share))
    return total


def mean_of(updates: Sequence[Update]) -> Tensors:
    """What the rule `mean` makes of them."""
    return total_of(updates).mean()


def close(a: Tensors, b: Tensors, *, ulps: int = 2) -> None:
    """Equal to float32 rounding."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=ulps * 2**-23, atol=ulps * 2**-26)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
