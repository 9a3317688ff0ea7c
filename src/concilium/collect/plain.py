"""The server receives every update, adds it to the sum and lets go of it: memory does not grow with the number of sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from concilium.aggregation import Block
from concilium.collect import Ask, Collected
from concilium.collect._receive import receive
from concilium.messages import Finish, Train


def collect(
    ask: Ask,
    requests: Mapping[str, Train | Finish],
    *,
    blocks: Sequence[Block],
    weigh: Callable[[int, float], int],
    asked: Mapping[str, int],
    see_updates: bool = False,
    spool: Path | None = None,
) -> Collected:
    """Sum the updates as they arrive; where the rule must see each, they wait on disk."""
    return receive(ask, requests, blocks=blocks, weigh=weigh, asked=asked, see_updates=see_updates, spool=spool)
