"""Steps that end in time: a slow site answers with what it could do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

ROOM = 0.1
"""Share of the time that is left for the answer; more where it took longer to begin."""
LAST = 5
"""The next step is taken to last as long as the longest of so many before it."""


def while_it_fits(items: Iterator[T], seconds: float | None, *, began: float) -> Iterator[T]:
    """The items, the first in any case, as long as what is done with another will be over `seconds` after `began`.

    Args:
        seconds: `None`: all items.
        began: on the monotonic clock.
    """
    if seconds is None:
        yield from items
        return
    before = time.monotonic()
    until = began + seconds - max(ROOM * seconds, before - began)
    took: deque[float] = deque(maxlen=LAST)
    for item in items:
        yield item
        now = time.monotonic()
        took.append(now - before)
        before = now
        if now + max(took) > until:
            return
