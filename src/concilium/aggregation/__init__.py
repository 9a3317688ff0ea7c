"""Aggregation rules: how the server makes new weights of the sites' updates. One file here: one rule.

    rule(total: Sum, state: Tensors, *, before: Tensors, ...options) -> tuple[Tensors, Tensors]
    rule(updates: Sequence[Update], state: Tensors, *, before: Tensors, ...options) -> tuple[Tensors, Tensors]

`total` is the sum over the sites that answered, each with its weight; `state` is what the rule keeps from round to round (empty
at first); `before` are the weights that the round began with. For the first kind the sum is enough, so that sites' single updates
need not be visible to the server. The second kind must see each, and is refused where only the sum is visible; the updates come
sorted by site, and their tensors are read when they are asked for.

A file may also have `weight(n_cases: int, share: float) -> float`: what an update counts in the sum, for a site of so many
training cases that took this share of the steps that were asked of it. Without it that is their product. And it may declare

    COMPARES = True

It tells from how updates differ which are to count: refused where sites annotate different labels, since the only one that knows
a label would be taken for one that is wrong.

    LEAST = 3

So many sites must be asked in every round; omitted: 1. Where fewer answer, or have a tensor, the rule still gets their updates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from concilium import catalog
from concilium.aggregation._statistics import about_before as about_before
from concilium.aggregation._statistics import about_own as about_own
from concilium.aggregation._statistics import mean_beside, spread
from concilium.errors import ContractError
from concilium.messages import Tensors

CHUNK = 1 << 15
"""Elements added at a time: so many that the working values stay in the processor's cache."""
LARGEST_WEIGHT = 2**29 - 1
"""Times a float32, it is exact in float64."""
UNITS = 1024
"""Weights are whole numbers of a case's such part: a power of two, so that whole numbers of cases give the same bits."""


@dataclass(frozen=True)
class Block:
    """Tensors that the same sites have, by a name that only the server knows, and what each site calls them."""

    like: Tensors
    """Key -> a tensor of its shape and type."""
    names: Mapping[str, Mapping[str, str]]
    """Site -> key -> its own name."""

    @property
    def sites(self) -> frozenset[str]:
        """Who has them."""
        return frozenset(self.names)


def one_block(like: Tensors, sites: Iterable[str]) -> Block:
    """The tensors of sites that all have them, under the same names."""
    same = {name: name for name in like}
    return Block(like, dict.fromkeys(sites, same))


@dataclass(frozen=True)
class Update:
    """What one site made of the weights in a round."""

    weights: Tensors
    """Read from disk when a tensor is asked for, by name."""
    n_cases: int
    n_steps: int
    loss: float
    """Mean over its steps, on its own data: of the weights on their way from those of the server to these."""
    quality: float | None = None
    """What others found it to be worth, where they were asked (`collect`); higher is better."""
    share: float = 1.0
    """The part of the steps that were asked of the site that it took."""
    site: str = ""


def must_see_updates(rule: str) -> bool:
    """Whether a rule needs each site's update, not only their sum."""
    return next(iter(inspect.signature(catalog.load("aggregation", rule)).parameters), "") == "updates"


def compares_updates(rule: str) -> bool:
    """Whether a rule tells from how updates differ which are to count."""
    return bool(_declared(rule, "COMPARES", False))


def least_updates(rule: str) -> int:
    """How many sites a rule needs in every round."""
    return int(_declared(rule, "LEAST", 1))


def _declared(rule: str, name: str, otherwise: Any) -> Any:
    return getattr(inspect.getmodule(catalog.load("aggregation", rule)), name, otherwise)


def weight_of(rule: str) -> Callable[[int, float], int]:
    """What an update counts in the sum, in whole units of a thousandth of a case; at least 1."""
    weigh = _declared(rule, "weight", None)
    count = cast(Callable[[int, float], Any], weigh or (lambda n_cases, share: n_cases * share))
    return lambda n_cases, share: max(1, round(UNITS * count(n_cases, share)))


class Sum:
    """A weighted sum of named tensors that comes out the same, to the bit, in whatever order they are added.

    Each element is kept as an unevaluated pair of float64 (Knuth's two-sum: the rounding error of every addition is kept as
    well). The pair is exact, whatever cancels, while the largest float32 of an element is less than about 2**50 times the
    smallest and at most 2**20 cases are counted over all sites; only then is the order without effect for certain.

    To the mean of running variances of norms comes the variance of the running means (`_statistics.py`).
    """

    def __init__(self) -> None:
        self.weight = 0
        self.count = 0
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._squares: dict[str, tuple[Tensor, Tensor]] = {}
        """Of a running variance, by its name: the sum of the squares of the running means."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._pairs)

    def add(self, tensors: Tensors, weight: int) -> None:
        """Add `weight` times these tensors.

        Raises:
            ContractError: they are not those added before, by name, shape and type.
        """
        if self.count == 0:
            self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
            self._pairs = {name: _zeros(tensor) for name, tensor in tensors.items()}
            self._squares = {name: _zeros(tensor) for name, tensor in tensors.items() if mean_beside(name, tensors)}
        check_like(
            tensors,
            {
                name: torch.empty(pair[0].shape, dtype=self._dtypes[name], device="meta")
                for name, pair in self._pairs.items()
            },
        )
        for name, tensor in tensors.items():
            _add_all(self._pairs[name], tensor, weight)
        for name, pair in self._squares.items():
            _add_all(pair, tensors[cast(str, mean_beside(name, tensors))], weight, squared=True)
        self.weight += weight
        self.count += 1

    @classmethod
    def of(cls, parts: Sequence[Tensors], like: Tensors, *, weight: int, count: int) -> Sum:
        """A sum that was formed elsewhere, of `count` updates whose weights add up to `weight`.

        Args:
            parts: two sets of tensors whose sum, element by element, is the weighted mean.
            like: tensors of the shapes and types that were added.
        """
        made = cls()
        made.weight, made.count = weight, count
        high, low = parts
        made._pairs = {name: (high[name].double() * weight, low[name].double() * weight) for name in like}
        made._dtypes = {name: tensor.dtype for name, tensor in like.items()}
        return made

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
        self._squares |= other._squares
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
            if name in self._squares:
                pairs = self._squares[name], self._pairs[cast(str, mean_beside(name, self._pairs))]
                mean = mean + spread(*((h + low_part) / self.weight for h, low_part in pairs))
            dtype = self._dtypes[name]
            means[name] = (mean if dtype.is_floating_point else mean.round()).to(dtype)
        return means


def _zeros(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(like.shape, dtype=torch.float64), torch.zeros(like.shape, dtype=torch.float64)


def _add_all(pair: tuple[Tensor, Tensor], tensor: Tensor, weight: int, *, squared: bool = False) -> None:
    """Two-sum of a pair and `weight` times a tensor, or its square, some elements at a time."""
    high, low = (t.view(-1) for t in pair)
    flat = tensor.detach().cpu().contiguous().view(-1)
    for start in range(0, flat.numel(), CHUNK):
        values = flat[start : start + CHUNK]
        values = values.double().square() if squared else values
        _add(high[start : start + CHUNK], low[start : start + CHUNK], values, weight)


def _add(high: Tensor, low: Tensor, values: Tensor, weight: int) -> None:
    """Two-sum of `high` and `weight * values`, in place; its rounding error goes to `low`."""
    product = values.double() * weight  # exact: 24 bits times a whole number below 2**29 (but of squares)
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
