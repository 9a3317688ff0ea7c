"""Every site trains alone: the baseline that a federation must beat. Only the initial weights travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from concilium.engines import Engine
from concilium.protocols import Round
from concilium.protocols._alone import train_alone


def local(
    engine: Engine,
    start: Round,
    *,
    model: str,
    rounds: int,
    steps: Mapping[str, int],
    deadline_s: float | None,
    box_s: float | None = None,
    **_: Any,
) -> Iterator[Round]:
    """Yield after each round; the models stay at their sites. A site that fails falls behind the others, and is recorded."""
    return train_alone(
        engine, start, model=model, rounds=rounds, steps=steps, deadline_s=deadline_s, fetch=False, box_s=box_s
    )
