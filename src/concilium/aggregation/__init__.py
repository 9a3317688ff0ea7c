"""Aggregation rules: how the server makes new weights of the sites' updates. One file here: one rule.

    rule(total: Sum, state: Tensors, *, ...options) -> tuple[Tensors, Tensors]

`total` is the sum over the sites that answered, each with its weight; `state` is what the rule keeps from round to round (empty
at first). The sum is enough, so that sites' single updates need not be visible to the server.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.errors import ContractError
from concilium.messages import Tensors

CHUNK = 1 << 15
"""Elements added at a time: so many that the working values stay in the processor's cache."""
LARGEST_WEIGHT = 2**29 - 1
"""Times a float32, it is exact in float64."""


class Sum:
    """A weighted sum of named tensors that comes out the same, to the bit, in whatever order they are added.

    Each element is kept as an unevaluated pair of float64 (Knuth's two-sum: the rounding error of every addition is kept as
    well). The pair is exact, whatever cancels, while the largest float32 of an element is less than about 2**60 times the
    smallest and at most 2**20 cases are counted over all sites; only then is the order without effect for certain.
    """

    def __init__(self) -> None:
        self.weight = 0
        self.count = 0
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._pairs)

    def add(self, tensors: Tensors, weight: int) -> None:
        """Add `weight` times these tensors.

        Raises:
            ContractError: they are not those added before, by name, shape and type.
        """
        if self.count == 0:
            for name, tensor in tensors.items():
                self._dtypes[name] = tensor.dtype
                self._pairs[name] = (
                    torch.zeros(tensor.shape, dtype=torch.float64),
                    torch.zeros(tensor.shape, dtype=torch.float64),
                )
        check_like(
            tensors,
            {
                name: torch.empty(pair[0].shape, dtype=self._dtypes[name], device="meta")
                for name, pair in self._pairs.items()
            },
        )
        for name, tensor in tensors.items():
            high, low = (t.view(-1) for t in self._pairs[name])
            flat = tensor.detach().cpu().contiguous().view(-1)
            for start in range(0, flat.numel(), CHUNK):
                _add(high[start : start + CHUNK], low[start : start + CHUNK], flat[start : start + CHUNK], weight)
        self.weight += weight
        self.count += 1

    def join(self, other: Sum) -> None:
        """Take in a sum of further tensors, of the same sites with the same weights.

        Raises:
            ContractError: the names overlap, or the weights differ.
        """
        if (self.weight, self.count) != (other.weight, other.count) or self._pairs.keys() & other._pairs.keys():
            raise ContractError(
                f"Sums of {self.count} and {other.count} updates with weights {self.weight} and {other.weight} cannot be joined. "
                "Expected the same sites, and names that differ. Add the same updates to both."
            )
        self._pairs |= other._pairs
        self._dtypes |= other._dtypes

    def mean(self) -> dict[str, Tensor]:
        """The weighted mean, in the types that were added; whole numbers are rounded to the nearest.

        Raises:
            ContractError: nothing was added, or all weights were zero.
        """
        if self.weight <= 0:
            raise ContractError(
                f"A mean over a total weight of {self.weight} is not defined. Add an update with a positive weight first."
            )
        means: dict[str, Tensor] = {}
        for name, (high, low) in self._pairs.items():
            mean = (high + low) / self.weight
            dtype = self._dtypes[name]
            means[name] = (mean if dtype.is_floating_point else mean.round()).to(dtype)
        return means


def _add(high: Tensor, low: Tensor, values: Tensor, weight: int) -> None:
    """Two-sum of `high` and `weight * values`, in place; its rounding error goes to `low`."""
    product = values.double().mul_(weight)  # exact: 24 bits times a whole number below 2**29
    total = high + product
    part = total - high
    product.sub_(part)
    part.sub_(total).add_(high)
    low.add_(product.add_(part))
    high.copy_(total)


def check_like(tensors: Tensors, like: Tensors) -> None:
    """Check that `tensors` have exactly the names, shapes and types of `like`.

    Raises:
        ContractError: names the first few that differ.
    """
    missing, extra = sorted(like.keys() - tensors.keys()), sorted(tensors.keys() - like.keys())
    if missing or extra:
        raise ContractError(
            f"An update lacks {missing[:3]} and has {extra[:3]} besides. Expected {len(like)} tensors by name. Use one network."
        )
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            raise ContractError(
                f"Tensor {name} of an update is {tensor.dtype} {tuple(tensor.shape)}. "
                f"Expected {like[name].dtype} {tuple(like[name].shape)}. Use one network at all sites."
            )
