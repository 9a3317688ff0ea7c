"""Split federated learning: front and tail of the network at each site, the body at the server; images and labels stay home.

Thapa et al. 2022, SplitFed (arXiv:2004.12088): `v1` keeps a body for each site and averages them as it does fronts and tails;
`v2` has one body, which takes a step after each site's batch, the order of the sites drawn anew for each round. `v3` averages the
bodies alone, as Gawali et al. 2021 do (arXiv:2012.12591): front and tail never leave their site (`[sharing] keep = ["ends"]`). In
`sequential`, the split learning of Gupta & Raskar 2018 (arXiv:1810.06060), there is one body too, and sites take turns: a site
takes all its steps of a round, then its front and tail go to the next, through the server. U-shaped as in Shiranthika et al. 2026
(arXiv:2503.20830). Two exchanges a step: the gradients of a step travel with the request for the next.

Each owner clips its own gradient: a site that of front and tail together, the server that of the body (decisions/0007).
"""

from __future__ import annotations

import random
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch

from concilium.aggregation import Sum, Update, one_block
from concilium.collect import Answer, Collected
from concilium.data.draws import digest
from concilium.engines import Engine, ask
from concilium.errors import StudyError
from concilium.messages import Failure, Finish, Front, Json, Tensors, Training
from concilium.networks import Parts, Stages, cut_apart
from concilium.protocols import BEGUN, STATE, WEIGHTS, Round, begun_at, copy_traffic, require, traffic_since
from concilium.protocols._body import ALL, MOMENTS, Body, require_finite, together
from concilium.protocols._cohort import cohort
from concilium.protocols._exchange import Exchange
from concilium.sharing import EVERYTHING, Sharing, shared_now
from concilium.transport import Transport
from concilium.wire import part

ONE_BODY = ("v2", "sequential")


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
    variant: Literal["v1", "v2", "v3", "sequential"] = "v1",
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
        variant: `v1`, a body for each site, averaged; `v2`, one body; `v3`, as `v1`, but front and tail stay at their site;
            `sequential`, one body, and sites take turns with one front and tail.
        cut: `shallow`, `deep`, or the two stages after which the network is cut.
        reveal_labels: let heads act on maps that the server made, as deep supervision does; it can then compute the labels
            (decisions/0008). Otherwise there is no deep supervision, and no cut right before the heads.
        transport: as what maps and gradients travel: `float32`, to the bit, or `float16`, `bfloat16` or `int8`.
        exchange_seconds: deadline of each exchange; omitted: that of a round, `round_seconds`.
        participation: share of the sites that take part in a round, drawn anew for each; 1: all.
        cohorts: lists of sites that take turns, a list a round; omitted: none.

    Raises:
        StudyError: the network cannot be cut so.
        EngineError: fewer than `min_sites` sites finished a round, or the one body of all is not finite any more.
    """
    after = (cut,) if isinstance(cut, str) else cut
    deadline = min((s for s in (deadline_s, exchange_seconds) if s is not None), default=None)

    def parts() -> Parts:
        whole = network(deep_supervision=training.deep_supervision and reveal_labels)
        return cut_apart(whole, after, reveal_labels=reveal_labels)

    named = parts()
    in_body, at_site = named.body.state_dict().keys(), named.at_site.state_dict().keys() - sharing.kept
    _require_ends(variant, at_site)
    begun = begun_at(start)
    owners = [ALL] if variant in ONE_BODY else sorted(steps)
    bodies = {owner: Body(parts(), training, device, transport) for owner in owners}
    weights, state = (cast(Tensors, part(start.tensors, of)) for of in (WEIGHTS, STATE))
    moments = {o: (part(start.tensors, f"{MOMENTS}{o}/"), str(start.values.get(o, "{}"))) for o in owners}
    asking = partial(ask, engine, deadline_s=deadline)
    for number in range(start.number + 1, rounds + 1):
        asked = cohort(steps, number, participation=participation, cohorts=cohorts, least=min_sites, seed=seed)
        before = copy_traffic(engine, asked)
        taking_part = _loaded(bodies, asked.keys(), {n: weights[n] for n in in_body}, moments)
        begins = frozenset() if sharing.whole else asked.keys() - begun
        answers: dict[str, Answer] = {}
        failures: dict[str, Failure] = {}
        averaged: Tensors = {}
        for turn in _turns(variant, asked, (seed, "order", number)):
            ours = {n: weights[n] for n in weights if n in at_site}
            request = Front(model, number, after, reveal_labels, 0, 0, 0, 0, ours, (), transport=transport)
            first = _first(request, begin_with or {}, begins, turn, rounds)
            queues = _queues(taking_part, turn, (seed, "order", number))
            exchange = Exchange(engine, queues, first, seed=seed)
            exchange.run(deadline_s=deadline)
            requests = {site: Finish(model, number, gradients) for site, gradients in exchange.last.items()}
            got = collect(asking, requests, blocks=(one_block(ours, turn),), asked=turn)
            failures |= {**exchange.failures, **got.failures}
            answers |= got.answers
            (total,) = got.totals
            if ALL not in bodies:
                total.join(_sum_of({s: (bodies[s], weigh(n, share)) for s, (n, share) in _took(got, turn).items()}))
            if total.count:
                given = _whole(got.updates[0], bodies) if got.updates else total
                averaged, state = rule(given, state, before={n: weights[n] for n in total.names})
                weights = {**weights, **averaged}
        require(answers, failures, min_sites=min(min_sites, len(asked)), model=model, number=number)
        require_finite(taking_part.get(ALL), model=model, number=number)
        weights = {**weights, **(bodies[ALL].weights() if ALL in bodies else {})}
        moments |= {owner: body.state() for owner, body in bodies.items() if owner == ALL or owner in answers}
        begun |= answers.keys()
        values, shared = _values(moments, begun, sharing), _shared(sharing, named, asked, answers.keys())
        tensors, traffic = together(weights, state, moments), traffic_since(engine, asked, before)
        yield Round(number, tensors, values, answers, failures, traffic, len(averaged), shared, _computed(taking_part))


def check(network: Stages, *, cut: Literal["shallow", "deep"] | tuple[str, ...], reveal_labels: bool, **_: Any) -> None:
    """Cut the network once.

    Raises:
        StudyError: it cannot be cut so.
    """
    cut_apart(network, (cut,) if isinstance(cut, str) else cut, reveal_labels=reveal_labels)


def _computed(bodies: Mapping[str, Body]) -> float:
    """Seconds of computing at the server."""
    return sum(body.seconds for body in bodies.values())


def _turns(variant: str, steps: Mapping[str, int], key: tuple[int | str, ...]) -> list[dict[str, int]]:
    """Which sites take their steps side by side, one list after the other."""
    return [{site: steps[site]} for site in _order(steps, key)] if variant == "sequential" else [dict(steps)]


def _order(sites: Iterable[str], key: tuple[int | str, ...]) -> list[str]:
    order = sorted(sites)
    random.Random(digest(*key)).shuffle(order)
    return order


def _require_ends(variant: str, at_site: Set[str]) -> None:
    """Check that in `v3` nothing of front and tail is shared, as a study with it says (`study/_sharing.py`)."""
    if variant == "v3" and at_site:
        raise StudyError(
            f"[protocol] variant = 'v3' is not possible where {len(at_site)} tensors of front and tail are shared. Expected "
            "none: [sharing] keep = ['ends']. Say so, or choose 'v1'."
        )


def _shared(
    sharing: Sharing, parts: Parts, asked: Mapping[str, int], answered: Set[str]
) -> dict[str, tuple[float, tuple[str, ...]]]:
    """Where something stays at sites: the share of front and tail that was averaged, and with whom."""
    held = parts.at_site.state_dict()
    size = sum(t.numel() for t in held.values())
    block = one_block({n: t for n, t in held.items() if n not in sharing.kept}, asked)
    return {} if sharing.whole else shared_now((block,), answered, dict.fromkeys(asked, size))


def _values(moments: Mapping[str, tuple[Tensors, str]], begun: Set[str], sharing: Sharing) -> dict[str, Json]:
    """The numbers of a round: the rest of the optimisers' state, and who has begun where something stays at sites."""
    told: dict[str, Json] = {} if sharing.whole else {BEGUN: tuple(sorted(begun))}
    return {owner: numbers for owner, (_, numbers) in moments.items()} | told


def _loaded(
    bodies: Mapping[str, Body], asked: Set[str], weights: Tensors, moments: Mapping[str, tuple[Tensors, str]]
) -> dict[str, Body]:
    """The bodies of the sites that are asked, or that of all, with these weights and each its optimiser's state."""
    taking_part = {owner: body for owner, body in bodies.items() if owner == ALL or owner in asked}
    for owner, body in taking_part.items():
        body.load(weights, *moments[owner])
    return taking_part


def _queues(
    bodies: Mapping[str, Body], steps: Mapping[str, int], key: tuple[int | str, ...]
) -> list[tuple[Body, list[str]]]:
    """Each body with the sites that it serves, in order, one entry a step."""
    if ALL not in bodies:
        return [(bodies[site], [site] * n) for site, n in steps.items()]
    order = _order(steps, key)
    return [(bodies[ALL], [site for step in range(max(steps.values())) for site in order if step < steps[site]])]


def at_sites(
    network: Callable[..., Stages], *, cut: Literal["shallow", "deep"] | tuple[str, ...], reveal_labels: bool, **_: Any
) -> frozenset[str]:
    """The tensors of front and tail."""
    built = network() if reveal_labels else network(deep_supervision=False)
    parts = cut_apart(built, (cut,) if isinstance(cut, str) else cut, reveal_labels=reveal_labels)
    return frozenset(parts.at_site.state_dict())


def _first(
    request: Front, begin_with: Tensors, begins: Set[str], steps: Mapping[str, int], rounds: int
) -> dict[str, Front]:
    """Each site's first request of a round; sites with equally many steps share one, which is packed once."""
    first = replace(request, weights={**request.weights, **begin_with}, begins=True)
    shared = {
        (n, new): replace(r, steps=n, first_step=(r.round - 1) * n, total_steps=rounds * n)
        for n in set(steps.values())
        for new, r in ((False, request), (True, first))
    }
    return {site: shared[n, site in begins] for site, n in steps.items()}


def _took(got: Collected, asked: Mapping[str, int]) -> dict[str, tuple[int, float]]:
    """Of each site that took a step: its cases, and the share of its steps that it took."""
    return {site: (a.n_cases, a.n_steps / asked[site]) for site, a in got.answers.items() if a.n_steps}


def _whole(updates: Sequence[Update], bodies: Mapping[str, Body]) -> list[Update]:
    """The updates with what each site's own body has become, where each has one."""
    return [
        replace(u, weights=ChainMap(bodies[u.site].weights(), cast(Any, u.weights))) if u.site in bodies else u
        for u in updates
    ]


def _sum_of(bodies: Mapping[str, tuple[Body, int]]) -> Sum:
    """The bodies' weights, each times what its site counts."""
    total = Sum()
    for body, weight in bodies.values():
        total.add(body.weights(), weight)
    return total
