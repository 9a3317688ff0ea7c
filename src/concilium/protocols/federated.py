"""Federated averaging and all that differs from it only in the rule, the local update or what is shared.

McMahan et al. 2017 (arXiv:1602.05629): every round each site trains from the shared weights, and the server makes new ones of the
updates. All sites take part in every round; the optimiser's state stays at the site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from concilium.aggregation import Sum, check_like, one_block
from concilium.collect import Collected
from concilium.engines import Engine, ask
from concilium.messages import Tensors
from concilium.protocols import CONTROL, STATE, WEIGHTS, Round, copy_traffic, require, traffic_since, train_requests
from concilium.wire import part


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
    cases: Mapping[str, int],
    box_s: float | None = None,
    **_: Any,
) -> Iterator[Round]:
    """Yield the state after each round: shared weights, the rule's own tensors, the total of what came beside the weights.

    Raises:
        EngineError: fewer than `min_sites` sites answered in a round.
    """
    weights: Tensors = part(start.tensors, WEIGHTS)
    state: Tensors = part(start.tensors, STATE)
    control: Tensors = part(start.tensors, CONTROL)
    blocks = (one_block(weights, steps),)
    for number in range(start.number + 1, rounds + 1):
        before = copy_traffic(engine, steps)
        requests = train_requests(
            model, number, rounds, steps, weights, send_weights=True, control=control, box_s=box_s
        )
        got = collect(partial(ask, engine, deadline_s=deadline_s), requests, blocks=blocks, asked=steps)
        require(got.answers, got.failures, min_sites=min_sites, model=model, number=number)
        weights, state = rule(got.updates[0] if got.updates else got.totals[0], state, before=weights)
        control = added(control, got.control, sum(cases[site] for site in steps))
        tensors = {WEIGHTS + n: t for n, t in weights.items()} | {STATE + n: t for n, t in state.items()}
        tensors |= {CONTROL + n: t for n, t in control.items()}
        traffic = traffic_since(engine, steps, before)
        yield Round(number, tensors, {}, got.answers, got.failures, traffic, n_tensors=len(got.totals[0].names))


def added(control: Tensors, sent: Sum, n_cases: int) -> Tensors:
    """The server's total with what the sites sent, each weighted by its share of all `n_cases` training cases.

    Raises:
        ContractError: the sites sent other tensors than before.
    """
    if not sent.count:
        return control
    if control:
        check_like(sent.mean(), control)
    share = sent.weight / n_cases
    return {name: t * share + (control[name] if control else 0) for name, t in sent.mean().items()}
