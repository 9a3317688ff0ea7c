"""What the server sees of a round's updates: each one, or only their sum. One file here: one way.

    collect(ask, requests: Mapping[str, Train | Finish], *, like: Tensors, ...options) -> Collected

`ask` sends requests and yields the replies as they arrive; a way may ask several times. `like` are tensors with the names,
shapes and types that an update must have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from concilium.aggregation import Sum
from concilium.messages import Failure, Reply, Request

Ask: TypeAlias = Callable[[Mapping[str, Request]], Iterator[tuple[str, Reply | Failure]]]


@dataclass(frozen=True)
class Answer:
    """What a site told about its part of a round, besides the update."""

    n_cases: int
    n_steps: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Collected:
    """A round's outcome: the sum over the sites that answered, what they told, and how the others failed."""

    total: Sum
    answers: Mapping[str, Answer]
    failures: Mapping[str, Failure]
