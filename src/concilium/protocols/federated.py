"""Federated averaging and all that differs from it only in the rule, the local update or what is shared.

McMahan et al. 2017 (arXiv:1602.05629): every round each site trains from the shared weights, and the server makes new ones of the
updates. All sites take part in every round; the optimiser's state stays at the site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from concilium.collect import Collected
from concilium.engines import Engine, ask
from concilium.messages import Tensors
from concilium.protocols import STATE, WEIGHTS, Round, copy_traffic, part, require, traffic_since, train_requests


def federated(
    engine: Engine,
    start: Round,
    *,
    model: str,
    collect: Callable[..., Collected],
    rule: Callable[..., tuple[Tensors, Tensors]],
    rounds: int,
    steps: Mapping[str, int],
    min_sites: int,
    deadline_s: float | None,
    **_: Any,
) -> Iterator[Round]:
    """Yield the state after each round: the shared weights and the rule's own tensors.

    Raises:
        EngineError: fewer than `min_sites` sites answered in a round.
    """
    weights: Tensors = part(start.tensors, WEIGHTS)
    state: Tensors = part(start.tensors, STATE)
    for number in range(start.number + 1, rounds + 1):
        before = copy_traffic(engine, steps)
        requests = train_requests(model, number, rounds, steps, weights, send_weights=True)
        got = collect(partial(ask, engine, deadline_s=deadline_s), requests, like=weights)
        require(got.answers, got.failures, min_sites=min_sites, model=model, number=number)
        weights, state = rule(got.total, state)
        tensors = {WEIGHTS + n: t for n, t in weights.items()} | {STATE + n: t for n, t in state.items()}
        traffic = traffic_since(engine, steps, before)
        yield Round(number, tensors, {}, got.answers, got.failures, traffic, n_tensors=len(got.total.names))
