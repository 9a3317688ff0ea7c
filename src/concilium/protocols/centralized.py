"""One model trained on the cases of all sites together: what a federation is measured against. Exists only in a simulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from concilium.engines import Engine
from concilium.errors import PrivacyError
from concilium.protocols import Round, require
from concilium.protocols._alone import train_alone


def centralized(
    engine: Engine,
    start: Round,
    *,
    model: str,
    rounds: int,
    steps: Mapping[str, int],
    deadline_s: float | None,
    **_: Any,
) -> Iterator[Round]:
    """Yield after each round; the last one holds the weights.

    Raises:
        PrivacyError: one of the sites in `steps` is not the simulation's pool of all cases.
        EngineError: the pool failed.
    """
    if any(engine.sites[site].role != "pooled" for site in steps):
        raise PrivacyError(
            f"{model} would train on the pooled cases of {', '.join(engine.sites)}. Real sites never pool them. "
            "Run this study in a simulation, or take 'centralized' out of [protocol] compare."
        )
    for done in train_alone(engine, start, model=model, rounds=rounds, steps=steps, deadline_s=deadline_s, fetch=True):
        require(done.answers, done.failures, min_sites=1, model=model, number=done.number)
        yield done
