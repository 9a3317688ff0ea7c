"""Federated averaging and all that differs from it only in the rule, the local update or what is shared.

McMahan et al. 2017 (arXiv:1602.05629): every round each site trains from the shared weights, and the server makes new ones of the
updates. All sites take part in every round, or some of them (`_cohort.py`); the optimiser's state stays at the site. Where sites'
networks differ, each tensor is averaged over the sites that have it (`sharing.match`), by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from concilium.aggregation import Sum, check_like, one_block
from concilium.collect import Collected
from concilium.engines import Engine, ask
from concilium.messages import Tensors, Train
from concilium.protocols import (
    BEGUN,
    CONTROL,
    STATE,
    WEIGHTS,
    Round,
    begun_at,
    copy_traffic,
    require,
    traffic_since,
    train_requests,
)
from concilium.protocols._cohort import cohort, restricted
from concilium.sharing import EVERYTHING, Sharing, shared_now
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
    seed: int,
    sharing: Sharing = EVERYTHING,
    begin_with: Tensors | None = None,
    participation: float = 1.0,
    cohorts: tuple[tuple[str, ...], ...] = (),
    box_s: float | None = None,
    **_: Any,
) -> Iterator[Round]:
    """Yield the state after each round: shared weights, the rule's own tensors, the total of what came beside the weights.

    Args:
        sharing: which tensors travel.
        begin_with: of tensors that stay at the sites, what these begin with; those that are missing each site draws itself.
        participation: share of the sites that take part in a round, drawn anew for each; 1: all.
        cohorts: lists of sites that take turns, a list a round; omitted: none.

    Raises:
        EngineError: fewer than `min_sites` sites answered in a round.
    """
    weights: Tensors = part(start.tensors, WEIGHTS)
    state: Tensors = part(start.tensors, STATE)
    control: Tensors = part(start.tensors, CONTROL)
    begun = begun_at(start)
    blocks = sharing.blocks or (one_block(weights, steps),)
    for number in range(start.number + 1, rounds + 1):
        asked = cohort(steps, number, participation=participation, cohorts=cohorts, least=min_sites, seed=seed)
        before = copy_traffic(engine, asked)
        begins = frozenset() if sharing.whole else asked.keys() - begun
        requests: dict[str, Train] = {}
        for sites in sharing.alike(asked):
            own = sharing.for_site(weights, min(sites))
            for some, more in ((sites - begins, {}), (sites & begins, begin_with or {})):
                taken = {site: asked[site] for site in asked if site in some}
                requests |= train_requests(
                    model,
                    number,
                    rounds,
                    taken,
                    {**own, **more},
                    send_weights=True,
                    control=control,
                    begins=some <= begins,
                    box_s=box_s,
                )
        got = collect(
            partial(ask, engine, deadline_s=deadline_s), requests, blocks=restricted(blocks, asked), asked=asked
        )
        require(got.answers, got.failures, min_sites=min(min_sites, len(asked)), model=model, number=number)
        weights, state = applied(rule, got, weights, state)
        control = added(control, got.control, sum(cases[site] for site in steps))
        begun |= got.answers.keys()
        tensors = {WEIGHTS + n: t for n, t in weights.items()} | {STATE + n: t for n, t in state.items()}
        tensors |= {CONTROL + n: t for n, t in control.items()}
        values = {} if sharing.whole else {BEGUN: tuple(sorted(begun))}
        yield Round(
            number,
            tensors,
            values,
            got.answers,
            got.failures,
            traffic_since(engine, asked, before),
            n_tensors=sum(len(total.names) for total in got.totals),
            shared=shared_now(blocks, got.answers.keys(), sharing.sizes),
        )


def applied(
    rule: Callable[..., tuple[Tensors, Tensors]], got: Collected, weights: Tensors, state: Tensors
) -> tuple[Tensors, Tensors]:
    """New weights and the rule's tensors; a block of which no site answered stays as it was."""
    if len(got.totals) == 1:
        if not got.totals[0].count:
            return weights, state
        return rule(got.updates[0] if got.updates else got.totals[0], state, before=weights)
    new, kept = dict(weights), dict(state)
    for i, total in enumerate(got.totals):
        if total.count:
            own = f"{i}/"
            made, told = rule(
                got.updates[i] if got.updates else total, part(state, own), before={n: weights[n] for n in total.names}
            )
            new |= made
            kept |= {own + n: t for n, t in told.items()}
    return new, kept


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
