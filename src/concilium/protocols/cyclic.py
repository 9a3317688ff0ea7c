"""Weights that go from site to site, sealed for the next: cyclical weight transfer, with a server that cannot read them.

Chang et al. 2018 (doi:10.1093/jamia/ocy017): in every round the weights visit all sites, each trains them on its own cases and
passes them on. Nothing is averaged. The optimiser's state stays at each site. Weights travel from one site to the next through
the server, which orders the visits and carries what it has no key for (`sealing.py`); the finished model is at the sites alone.

A site that fails is left out of its round: the one before it seals its weights for the one after. Where that one has gone too,
the one before it does, and what was learnt in between is lost, and recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from concilium.collect import Answer
from concilium.engines import Engine, ask
from concilium.errors import EngineError
from concilium.messages import (
    Card,
    Done,
    Failure,
    Hand,
    Handed,
    Introduce,
    Introduced,
    Keep,
    Pass,
    Passed,
    Reply,
    Request,
    Take,
    Tensors,
    Train,
    Trained,
    as_failure,
    describe,
)
from concilium.protocols import WEIGHTS, Round, copy_traffic, require, traffic_since
from concilium.protocols._turns import order_of
from concilium.sealing import NOTHING
from concilium.wire import part

SEALED = "sealed"
"""A round's tensor: the weights as the last site sealed them for the first of the next round."""
HOLDER, RECEIVER = "holder", "receiver"
"""A round's values: who has the weights, and for whom they are sealed."""


def cyclic(
    engine: Engine,
    start: Round,
    *,
    model: str,
    rounds: int,
    steps: Mapping[str, int],
    min_sites: int,
    deadline_s: float | None,
    seed: int,
    order: tuple[str, ...] = (),
    reveal: bool = False,
    **_: Any,
) -> Iterator[Round]:
    """Yield after each round, with the weights sealed for the next.

    Args:
        order: in which the sites are visited; omitted: drawn anew for each round.
        reveal: give the finished model to the server too, where every site's settings allow it.

    Raises:
        EngineError: fewer than `min_sites` sites answered in a round, or those that have the weights are gone.
    """
    chain = Chain(engine, model, reveal, deadline_s, start)
    for number in range(start.number + 1, rounds + 1):
        before = copy_traffic(engine, steps)
        turns = order_of(steps, number, order=order, seed=seed)
        after = order_of(steps, number + 1, order=order, seed=seed)[:1] if number < rounds else ()
        chain.begin(number, steps)
        for site, following in zip(turns, (*turns[1:], *(after or ("",))), strict=True):
            n = steps[site]
            request = Train(model, number, (number - 1) * n, n, rounds * n, {}, False)
            chain.visit(request, site, following, to_round=number + (site == turns[-1]))
        require(chain.answers, chain.failures, min_sites=min_sites, model=model, number=number)
        weights = chain.opened() if reveal and number == rounds else {}
        tensors = {WEIGHTS + n: t for n, t in weights.items()} | ({SEALED: chain.sealed} if chain.receiver else {})
        values = {HOLDER: chain.holder, RECEIVER: chain.receiver}
        yield Round(number, tensors, values, chain.answers, chain.failures, traffic_since(engine, steps, before))


@dataclass
class Chain:
    """Where the weights are. Between two rounds `holder` has them, and `sealed` holds them for `receiver`."""

    engine: Engine
    model: str
    reveal: bool
    deadline_s: float | None
    start: Round
    answers: dict[str, Answer] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    cards: dict[str, Card] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        holder = str(self.start.values.get(HOLDER, ""))
        self.holders = [holder] if holder else []
        """Who has weights of this chain, the newest last; the first had them when the round began."""
        self.receiver = str(self.start.values.get(RECEIVER, ""))
        self.sealed = self.start.tensors.get(SEALED, NOTHING)

    @property
    def holder(self) -> str:
        """Who has the weights; nobody before the first visit."""
        return self.holders[-1] if self.holders else ""

    def begin(self, number: int, sites: Iterable[str]) -> None:
        """Begin a round: ask all for their cards, which a site that lost its key has changed."""
        self.number, self.answers = number, {}
        del self.holders[:-1]
        cards, self.failures = introduced(self.engine, self.model, number, sites, self.deadline_s)
        self.cards |= cards  # what a site that is gone now sealed before can still be opened

    def visit(self, train: Train, site: str, following: str, *, to_round: int) -> None:
        """Have a site train, and seal the weights for its following one."""
        if site in self.failures:
            self._skip(site)
            return
        if self.holder and self.holder != site and self.receiver != site:
            self._hand_to(site)
        sender = self.cards.get(self.holder) if self.holder != site else None
        weights = {} if self.holder else part(self.start.tensors, WEIGHTS)
        to = _copy(self.cards.get(following)) if following != site else None
        sealed = self.sealed if sender is not None else NOTHING
        reply = one(
            self.engine,
            site,
            Pass(replace(train, weights=weights), sender, sealed, to, to_round, self.reveal),
            self.deadline_s,
        )
        if not isinstance(reply, Passed) or not _is_sound(reply.trained, train):
            self.failures[site] = as_failure(reply)
            self._skip(site)
            return
        t = reply.trained
        self.answers[site] = Answer(t.n_cases, t.n_steps, t.loss, t.seconds, t.memory)
        self.holders.append(site)
        self.sealed, self.receiver = (reply.sealed, following) if to is not None else (NOTHING, "")

    def _skip(self, site: str) -> None:
        """A site is left out: what was sealed for its turn is of no use to anybody."""
        if self.receiver == site:
            self.sealed, self.receiver = NOTHING, ""

    def _hand_to(self, site: str) -> None:
        """Have the weights sealed for a site by the last one that can."""
        self.sealed = self._handed(self.cards[site]).sealed
        self.receiver = site

    def opened(self) -> Tensors:
        """The weights, where the server is to have them."""
        return self._handed(None).weights

    def _handed(self, to: Card | None) -> Handed:
        """The weights of the last site that can give them. One that cannot is left out of the round after all.

        Raises:
            EngineError: none can.
        """
        lost = []
        while self.holders:
            holder = self.holders[-1]
            reply = one(self.engine, holder, Hand(self.model, self.number, to, False, self.reveal), self.deadline_s)
            if isinstance(reply, Handed):
                return reply
            self.failures[self.holders.pop()] = as_failure(reply)
            self.answers.pop(holder, None)
            lost.append(f"{holder}: {describe(as_failure(reply))}")
        raise EngineError(
            f"{self.model}, round {self.number}: nobody is left who has the weights ({'; '.join(lost)}). Expected one site that "
            "has them. Mend the sites, then go on with --resume."
        )


def introduced(
    engine: Engine, model: str, number: int, sites: Iterable[str], deadline_s: float | None
) -> tuple[dict[str, Card], dict[str, Failure]]:
    """The sites' cards, and which of them failed to show theirs."""
    replies = dict(ask(engine, dict.fromkeys(sites, Introduce(model, number)), deadline_s=deadline_s))
    cards = {s: r.card for s, r in replies.items() if isinstance(r, Introduced) and r.card.site == s}
    return cards, {s: as_failure(r) for s, r in replies.items() if s not in cards}


def hand_out(
    engine: Engine, model: str, done: Round, *, reveal: bool, deadline_s: float | None = None
) -> dict[str, Failure]:
    """Have every site, and that of the held-out set, store the weights after a round as the finished model; the failures.

    Where the site that has them fails, all do.
    """
    everyone = [name for name, site in engine.sites.items() if site.role in ("site", "test")]
    holder = str(done.values[HOLDER])
    cards, failures = introduced(engine, model, done.number, everyone, deadline_s)
    if holder in failures:
        return dict.fromkeys(everyone, failures[holder])
    kept = one(engine, holder, Keep(model, {}), deadline_s)
    if not isinstance(kept, Done):
        return dict.fromkeys(everyone, as_failure(kept))
    for site in cards:
        if site == holder:
            continue
        handed = one(engine, holder, Hand(model, done.number, cards[site], True, reveal), deadline_s)
        if not isinstance(handed, Handed):
            return failures | dict.fromkeys([holder, site], as_failure(handed))
        given = one(engine, site, Take(model, done.number, cards[holder], handed.sealed, reveal), deadline_s)
        if not isinstance(given, Done):
            failures[site] = as_failure(given)
    return failures


def one(engine: Engine, site: str, request: Request, deadline_s: float | None) -> Reply | Failure:
    """What one site answers."""
    ((_, reply),) = ask(engine, {site: request}, deadline_s=deadline_s)
    return reply


def _copy(card: Card | None) -> Card | None:
    """A card of its own: no two tensors of a message may share memory."""
    return card and Card(card.site, card.key.clone(), card.certificate.clone(), card.signature.clone())


def _is_sound(told: Trained, asked: Train) -> bool:
    """Whether a site tells of its training what can be."""
    numbers = math.isfinite(told.loss) and math.isfinite(told.seconds)
    return numbers and told.n_cases >= 1 and (told.loss == 0 if told.n_steps == 0 else 1 <= told.n_steps <= asked.steps)
