"""What the server sees of a round's updates: each one, or only their sum. One file here: one way.

    collect(
        ask, requests: Mapping[str, Train | Finish], *,
        blocks: Sequence[Block], weigh: Callable[[int, float], int], asked: Mapping[str, int], see_updates: bool,
        spool: Path | None, ...options,
    ) -> Collected

`ask` sends requests and yields the replies as they arrive; a way may ask several times. An update must hold exactly the tensors
of the `blocks` that its site has, by name, shape and type. It counts `weigh(n_cases, share)`, where `share` is the part of the
steps `asked` that the site took. `see_updates`: the rule must see each update; a way that shows only
sums then raises a `StudyError`. `spool`: a folder of the run for files that wait, which is cleared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from concilium.aggregation import Sum, Update
from concilium.messages import Failure, Reply, Request, Spent

Ask: TypeAlias = Callable[[Mapping[str, Request]], Iterator[tuple[str, Reply | Failure]]]


@dataclass(frozen=True)
class Answer:
    """What a site told about its part of a round, besides the update."""

    n_cases: int
    n_steps: int
    loss: float
    seconds: float
    memory: int = 0
    """As in `Trained`."""
    spent: Spent | None = None
    """As there."""


@dataclass(frozen=True)
class Collected:
    """A round's outcome: for each block the sum over its sites that answered, what they told, and how the others failed."""

    totals: tuple[Sum, ...]
    answers: Mapping[str, Answer]
    failures: Mapping[str, Failure]
    updates: tuple[Sequence[Update], ...] = ()
    """The single updates of each block, sorted by site, where the rule must see them."""
    control: Sum = field(default_factory=Sum)
    """The sum of what local updates sent beside the weights, weighted by cases."""
