"""Split federated learning: front and tail of the network at each site, the body at the server; images and labels stay home.

Thapa et al. 2022, SplitFed (arXiv:2004.12088): `v1` keeps a body for each site and averages them as it does fronts and tails;
`v2` has one body, which takes a step after each site's batch, the order of the sites drawn anew for each round. U-shaped as in
Shiranthika et al. 2026 (arXiv:2503.20830). Two exchanges a step: the gradients of a step travel with the request for the next.

Each owner clips its own gradient: a site that of front and tail together, the server that of the body (decisions/0007).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from concilium.aggregation import Sum, one_block
from concilium.collect import Collected
from concilium.data.draws import digest
from concilium.engines import Engine, ask
from concilium.errors import EngineError
from concilium.messages import Finish, Front, Json, Tensors, Training
from concilium.networks import Parts, Stages, cut_apart
from concilium.protocols import BEGUN, STATE, WEIGHTS, Round, begun_at, copy_traffic, require, traffic_since
from concilium.protocols._body import Body
from concilium.protocols._cohort import cohort
from concilium.protocols._exchange import Exchange
from concilium.sharing import EVERYTHING, Sharing, shared_now
from concilium.transport import Transport
from concilium.wire import part

MOMENTS = "body/"
"""Prefix of a round's tensors: the state of the bodies' optimisers, `body/OWNER/...`."""
ALL = "server"
"""Owner of the one body of `v2` (no site may have this name); in `v1` each site owns one."""


def splitfed(
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
    network: Callable[..., Stages],
    training: Training,
    seed: int,
    device: torch.device,
    weigh: Callable[[int, float], int],
    sharing: Sharing = EVERYTHING,
    begin_with: Tensors | None = None,
    variant: Literal["v1", "v2"] = "v1",
    cut: Literal["shallow", "deep"] | tuple[str, ...] = "deep",
    reveal_labels: bool = False,
    transport: Transport = "float32",
    exchange_seconds: float | None = None,
    participation: float = 1.0,
    cohorts: tuple[tuple[str, ...], ...] = (),
    **_: Any,
) -> Iterator[Round]:
    """Yield the state after each round: the whole network's weights, the rule's tensors and the bodies' optimisers.

    Args:
        sharing: which tensors of front and tail travel.
        begin_with: of those that do not, what they begin with; those that are missing each site draws itself.
        variant: `v1`, a body for each site, averaged; `v2`, one body.
        cut: `shallow`, `deep`, or the two stages after which the network is cut.
        reveal_labels: let heads act on maps that the server made, as deep supervision does; it can then compute the labels
            (decisions/0008). Otherwise there is no deep supervision, and no cut right before the heads.
        transport: as what maps and gradients travel: `float32`, to the bit, or `float16`, `bfloat16` or `int8`.
        exchange_seconds: deadline of each exchange; omitted: that of a round, `round_seconds`.
        participation: share of the sites that take part in a round, drawn anew for each; 1: all.
        cohorts: lists of sites that take turns, a list a round; omitted: none.

    Raises:
        StudyError: the network cannot be cut so.
        EngineError: fewer than `min_sites` sites finished a round, or the one body of `v2` is not finite any more.
    """
    after = (cut,) if isinstance(cut, str) else cut
    deadline = min((s for s in (deadline_s, exchange_seconds) if s is not None), default=None)
    deep_supervision = training.deep_supervision and reveal_labels

    def parts() -> Parts:
        return cut_apart(network(deep_supervision=deep_supervision), after, reveal_labels=reveal_labels)

    named = parts()
    in_body, at_site = named.body.state_dict().keys(), named.at_site.state_dict().keys() - sharing.kept
    size = sum(t.numel() for t in named.at_site.state_dict().values())
    begun = begun_at(start)
    bodies = {
        owner: Body(parts(), training, device, transport) for owner in (sorted(steps) if variant == "v1" else [ALL])
    }
    weights: Tensors = part(start.tensors, WEIGHTS)
    state: Tensors = part(start.tensors, STATE)
    moments = {
        owner: (part(start.tensors, f"{MOMENTS}{owner}/"), str(start.values.get(owner, "{}"))) for owner in bodies
    }
    for number in range(start.number + 1, rounds + 1):
        asked = cohort(steps, number, participation=participation, cohorts=cohorts, least=min_sites, seed=seed)
        before = copy_traffic(engine, asked)
        taking_part = _loaded(bodies, asked.keys(), {n: weights[n] for n in in_body}, moments)
        ours = {n: weights[n] for n in weights if n in at_site}
        request = Front(model, number, after, reveal_labels, 0, 0, 0, 0, ours, (), transport=transport)
        begins = frozenset() if sharing.whole else asked.keys() - begun
        first = replace(request, weights={**ours, **(begin_with or {})}, begins=True)
        queues = _queues(taking_part, asked, (seed, "order", number))
        exchange = Exchange(engine, queues, _first(request, first, begins, asked, rounds), seed=seed)
        exchange.run(deadline_s=deadline)
        requests = {site: Finish(model, number, gradients) for site, gradients in exchange.last.items()}
        got = collect(
            partial(ask, engine, deadline_s=deadline), requests, blocks=(one_block(ours, asked),), asked=asked
        )
        failures = {**exchange.failures, **got.failures}
        require(got.answers, failures, min_sites=min(min_sites, len(asked)), model=model, number=number)
        _require_finite(taking_part, model=model, number=number)
        (total,) = got.totals
        if variant == "v1":
            total.join(_sum_of({s: (bodies[s], weigh(n, share)) for s, (n, share) in _took(got, asked).items()}))
        new, state = rule(total, state, before={n: weights[n] for n in total.names}) if total.count else ({}, state)
        weights = {**weights, **new, **({} if variant == "v1" else bodies[ALL].weights())}
        moments |= {owner: body.state() for owner, body in bodies.items() if owner == ALL or owner in got.answers}
        tensors = _together(weights, state, moments)
        values: dict[str, Json] = {owner: numbers for owner, (_, numbers) in moments.items()}
        begun |= got.answers.keys()
        values |= {} if sharing.whole else {BEGUN: tuple(sorted(begun))}
        shared = {} if sharing.whole else shared_now((one_block(ours, asked),), got.answers, dict.fromkeys(asked, size))
        traffic = traffic_since(engine, asked, before)
        yield Round(number, tensors, values, got.answers, failures, traffic, n_tensors=len(total.names), shared=shared)


def check(network: Stages, *, cut: Literal["shallow", "deep"] | tuple[str, ...], reveal_labels: bool, **_: Any) -> None:
    """Cut the network once.

    Raises:
        StudyError: it cannot be cut so.
    """
    cut_apart(network, (cut,) if isinstance(cut, str) else cut, reveal_labels=reveal_labels)


def _loaded(
    bodies: Mapping[str, Body], asked: Set[str], weights: Tensors, moments: Mapping[str, tuple[Tensors, str]]
) -> dict[str, Body]:
    """The bodies of the sites that are asked, or that of all, with these weights and each its optimiser's state."""
    taking_part = {owner: body for owner, body in bodies.items() if owner == ALL or owner in asked}
    for owner, body in taking_part.items():
        body.load(weights, *moments[owner])
    return taking_part


def _together(weights: Tensors, state: Tensors, moments: Mapping[str, tuple[Tensors, str]]) -> Tensors:
    """The tensors of a round under their prefixes."""
    named = {WEIGHTS + n: t for n, t in weights.items()} | {STATE + n: t for n, t in state.items()}
    return named | {f"{MOMENTS}{o}/{n}": t for o, (ts, _) in moments.items() for n, t in ts.items()}


def _require_finite(bodies: Mapping[str, Body], *, model: str, number: int) -> None:
    if ALL in bodies and not bodies[ALL].is_finite():
        raise EngineError(
            f"{model}, round {number}: the body is not finite any more. Expected finite weights. Go on from the round before "
            "with --resume, or start again with a lower learning rate."
        )


def _queues(
    bodies: Mapping[str, Body], steps: Mapping[str, int], key: tuple[int | str, ...]
) -> list[tuple[Body, list[str]]]:
    """Each body with the sites that it serves, in order, one entry a step."""
    if ALL not in bodies:
        return [(bodies[site], [site] * n) for site, n in steps.items()]
    order = sorted(steps)
    random.Random(digest(*key)).shuffle(order)
    return [(bodies[ALL], [site for step in range(max(steps.values())) for site in order if step < steps[site]])]


def at_sites(
    network: Callable[..., Stages], *, cut: Literal["shallow", "deep"] | tuple[str, ...], reveal_labels: bool, **_: Any
) -> frozenset[str]:
    """The tensors of front and tail."""
    built = network() if reveal_labels else network(deep_supervision=False)
    parts = cut_apart(built, (cut,) if isinstance(cut, str) else cut, reveal_labels=reveal_labels)
    return frozenset(parts.at_site.state_dict())


def _first(request: Front, first: Front, begins: Set[str], steps: Mapping[str, int], rounds: int) -> dict[str, Front]:
    """Each site's first request of a round; sites with equally many steps share one, which is packed once."""
    shared = {
        (n, new): replace(r, steps=n, first_step=(r.round - 1) * n, total_steps=rounds * n)
        for n in set(steps.values())
        for new, r in ((False, request), (True, first))
    }
    return {site: shared[n, site in begins] for site, n in steps.items()}


def _took(got: Collected, asked: Mapping[str, int]) -> dict[str, tuple[int, float]]:
    """Of each site that took a step: its cases, and the share of its steps that it took."""
    return {site: (a.n_cases, a.n_steps / asked[site]) for site, a in got.answers.items() if a.n_steps}


def _sum_of(bodies: Mapping[str, tuple[Body, int]]) -> Sum:
    """The bodies' weights, each times what its site counts."""
    total = Sum()
    for body, weight in bodies.values():
        total.add(body.weights(), weight)
    return total
