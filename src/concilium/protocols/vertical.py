"""Vertical split learning: sites hold different channels of the same patients, one holds the labels, and they train one network.

Roth et al. 2022, Split-U-Net (arXiv:2208.10553). Each party has a front for its own channels; their maps meet in the stage `fuse`
(`networks/_fusion.py`). What follows is the server's up to the cut's second stage and then the label holder's, or all of it the
label holder's. Two exchanges a step, as in `splitfed`: maps from all parties; the tail at the labels; and the gradient of each
map to its owner alone, with the request for the next step. Nothing is averaged: there is one copy of each part. Each owner clips
its own gradient (decisions/0007).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from concilium.aggregation import check_like
from concilium.answers.vertical import set_absent
from concilium.collect import Answer
from concilium.data.draws import digest
from concilium.engines import Engine, ask
from concilium.errors import ConciliumError, EngineError, StudyError
from concilium.messages import (
    Done,
    Failure,
    Finish,
    Front,
    Gradients,
    Maps,
    Placed,
    SiteError,
    Tail,
    Tensors,
    Trained,
    Training,
    Where,
    as_failure,
    describe,
)
from concilium.networks import Parts, Stages
from concilium.networks._fusion import FRONTS, Fronts, fronts_of, own_part, tail_of
from concilium.protocols import WEIGHTS, Round, copy_traffic, traffic_since
from concilium.protocols._body import ALL, MOMENTS, Body, require_finite, together
from concilium.transport import Transport
from concilium.wire import part


def vertical(
    engine: Engine,
    start: Round,
    *,
    model: str,
    rounds: int,
    steps: Mapping[str, int],
    deadline_s: float | None,
    network: Callable[..., Stages],
    training: Training,
    seed: int,
    device: torch.device,
    labels: str,
    cut: Literal["shallow", "deep"] | tuple[str, ...] = "deep",
    fuse: Literal["concat", "mean", "max"] = "concat",
    body: Literal["server", "labels"] = "server",
    parties: tuple[str, ...] = (),
    drop: float = 0.0,
    patches: Literal["uniform", "labels"] = "uniform",
    transport: Transport = "float32",
    exchange_seconds: float | None = None,
    new_patients: bool = False,
    **_: Any,
) -> Iterator[Round]:
    """Yield the state after each round: the whole network's weights, and the optimiser of the server's part.

    Args:
        labels: the site whose label maps are trained on.
        cut: `shallow`, `deep`, or the two stages after which the network is cut: fronts end with the first.
        fuse: how the parties' maps are made one: `concat`, side by side and mixed by a 1×1 convolution; `mean`; or `max`.
        body: whether the server has what follows the fronts, up to the second stage of the cut, or the label holder has it all.
        parties: whose channels are used; omitted: those of all sites.
        drop: chance that a party is left out of a step (one at least stays), so that the network learns to do without.
        patches: `uniform`: anywhere. `labels`: on foreground as often as `[training] foreground` says, which tells all where
            labels lie.
        transport: as what maps and gradients travel, as in `splitfed`.
        exchange_seconds: deadline of each exchange; omitted: that of a round, `round_seconds`.
        new_patients: in the end, segment the cases that all sites have in `imagesTs`; label maps stay where the labels are.

    Raises:
        StudyError: the network is none of several parties.
        EngineError: a party failed in a round, or the server's part is not finite any more.
    """
    deadline = min((s for s in (deadline_s, exchange_seconds) if s is not None), default=None)
    whole = network(deep_supervision=training.deep_supervision and body == "labels")
    after = FRONTS if body == "labels" else tail_of(whole)
    middle = None if body == "labels" else Body(_parts(whole, after), training, device, transport)
    fronts = _fronts(whole)
    owned = {site: own_part(whole, site, tail_after=after, labelled=site == labels).held.state_dict() for site in steps}
    weights: Tensors = part(start.tensors, WEIGHTS)
    moments, numbers = part(start.tensors, f"{MOMENTS}{ALL}/"), str(start.values.get(ALL, "{}"))
    (n_steps,) = set(steps.values())
    for number in range(start.number + 1, rounds + 1):
        before = copy_traffic(engine, steps)
        if middle is not None:
            middle.load({n: weights[n] for n in middle.network.state_dict()}, moments, numbers)
        request = Front(
            model, number, (after,), False, 0, n_steps, (number - 1) * n_steps, rounds * n_steps, {}, (),
            begins=number == 1, transport=transport, party=True,
        )  # fmt: skip
        exchange = _Steps(
            engine, middle, fronts, labels, request, deadline, seed=seed, drop=drop, follows=patches == "labels"
        )
        mine = {site: {n: weights[n] for n in names} for site, names in owned.items()}
        answers, failures, made = exchange.run(mine)
        if failures:
            failed = "; ".join(f"{site}: {describe(failure)}" for site, failure in failures.items())
            raise EngineError(
                f"{model}, round {number}: {len(failures)} of {len(steps)} parties failed ({failed}). All must answer, since "
                "each has a part of the network that nobody else has. Mend the sites, then go on with --resume."
            )
        weights = {**weights, **made}
        require_finite(middle, model=model, number=number)
        if middle is not None:
            weights |= middle.weights()
            moments, numbers = middle.state()
        tensors, traffic = together(weights, {}, {ALL: (moments, numbers)}), traffic_since(engine, steps, before)
        yield Round(number, tensors, {ALL: numbers}, answers, failures, traffic, n_tensors=len(made))


class _Steps:
    """The steps of one round."""

    def __init__(
        self,
        engine: Engine,
        body: Body | None,
        fronts: Fronts,
        labels: str,
        request: Front,
        deadline: float | None,
        *,
        seed: int,
        drop: float,
        follows: bool,
    ) -> None:
        self.ask = partial(ask, engine, deadline_s=deadline)
        self.body, self.fronts, self.labels, self.request = body, fronts, labels, request
        self.seed, self.drop, self.follows = seed, drop, follows
        self.failures: dict[str, Failure] = {}

    def run(self, weights: Mapping[str, Tensors]) -> tuple[dict[str, Answer], dict[str, Failure], Tensors]:
        """Take all steps with these weights of each site; what each told, how sites failed, and what the weights became."""
        due: dict[str, tuple[Tensor, ...]] = dict.fromkeys(weights, ())
        started: set[str] = set()
        places = self._places()
        for step in range(self.request.steps):
            if self.failures:
                break
            absent = self._absent(step)
            asked = {}
            for site in weights:
                if site in absent and site != self.labels and site in started:
                    continue
                begun = site in started
                asked[site] = replace(
                    self.request,
                    step=step,
                    weights={} if begun else weights[site],
                    gradients=due[site],
                    absent=site in absent,
                    places=() if begun or site == self.labels else places,
                )
            due |= dict.fromkeys(asked, ())
            started |= asked.keys()
            maps = self._all(asked, Maps, Done)
            if not self.failures and isinstance(maps[self.labels], Maps):  # else nothing is annotated, and nobody steps
                due |= self._step(step, maps, absent)
        finish = {site: Finish(self.request.model, self.request.round, due[site]) for site in weights}
        return self._finished({} if self.failures else self._all(finish, Trained), weights)

    def _places(self) -> tuple[Tensor, ...]:
        """Where the patches of the round lie, where they follow the labels."""
        asked = {self.labels: Where(self.request.model, self.request.round, self.request.steps)}
        told = self._all(asked, Placed) if self.follows else {}
        return told[self.labels].places if told else ()

    def _absent(self, step: int) -> tuple[str, ...]:
        """The parties that are left out of a step; one at least is not."""
        draw = random.Random(digest(self.seed, "drop", self.request.round, step))
        out = [party for party in self.fronts.parties if draw.random() < self.drop]
        if len(out) == len(self.fronts.parties):
            out.remove(draw.choice(out))
        return tuple(out)

    def _all(self, requests: Mapping[str, Any], *expected: type) -> dict[str, Any]:
        """The replies of all; those of other types are failures."""
        found = {}
        for site, reply in self.ask(requests):
            if isinstance(reply, expected):
                found[site] = reply
            else:
                self.failures[site] = as_failure(reply)
        return found

    def _step(self, step: int, came: Mapping[str, Maps], absent: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        """From the maps of the parties to the gradients of each."""
        there = [party for party in self.fronts.parties if party not in absent]
        number = len(came[there[0]].maps)
        if wrong := [party for party in there if len(came[party].maps) != number]:
            return self._broken(wrong, "ContractError", "wrong_maps")
        together = tuple(m for party in there for m in came[party].maps)
        if self.body is None:
            sent, order = _filled(together, there, self.fronts.parties), (-1,) * self.fronts.leaves
        else:
            set_absent(self.body.network, absent)
            key = (self.seed, ALL, self.request.round, step)
            try:
                sent, order = self.body.forward(_filled(together, there, self.fronts.parties), key)
            except FloatingPointError:
                return self._broken(there, "FloatingPointError", "not_finite")
            except Exception:  # whatever layers raise for maps from outside
                return self._broken(there, "ContractError", "wrong_maps")
        tail = Tail(
            self.request.model, self.request.round, step, sent, order, tuple(absent) if self.body is None else ()
        )
        replies = self._all({self.labels: tail}, Gradients)
        if self.failures:
            return {}
        back = replies[self.labels].gradients
        if self.body is not None:
            first = self.request
            try:
                back = self.body.backward(back, step=first.first_step + step, total_steps=first.total_steps)
            except (ConciliumError, FloatingPointError) as e:
                return self._broken([self.labels], type(e).__name__, "wrong_gradients")
        share = len(back) // len(self.fronts.parties)
        return {
            party: back[i * share : (i + 1) * share] for i, party in enumerate(self.fronts.parties) if party in there
        }

    def _broken(self, sites: Sequence[str], exception: str, code: str) -> dict[str, tuple[Tensor, ...]]:
        if self.body is not None:
            self.body.give_up()
        self.failures |= dict.fromkeys(sites, SiteError(exception, code, ""))
        return {}

    def _finished(
        self, replies: Mapping[str, Trained], weights: Mapping[str, Tensors]
    ) -> tuple[dict[str, Answer], dict[str, Failure], Tensors]:
        made: Tensors = {}
        for site, reply in replies.items():
            try:
                check_like(reply.weights, weights[site])
            except ConciliumError:
                self.failures[site] = SiteError("ContractError", "wrong_weights", "")
                continue
            made = {**made, **reply.weights}
        if self.failures:
            return {}, self.failures, {}
        loss = replies[self.labels].loss
        answers = {s: Answer(r.n_cases, r.n_steps, loss, r.seconds, r.memory) for s, r in replies.items()}
        return answers, {}, made


def _filled(maps: Sequence[Tensor], there: Sequence[str], parties: Sequence[str]) -> tuple[Tensor, ...]:
    """The maps of all parties, zeros for those that are missing. Tensors as they travel."""
    each = len(maps) // len(there)
    of = {party: maps[i * each : (i + 1) * each] for i, party in enumerate(there)}
    none = tuple(torch.zeros_like(m) for m in of[there[0]])
    return tuple(m for party in parties for m in of.get(party, none))


def _parts(whole: Stages, after: str) -> Parts:
    return Parts(*whole.split(FRONTS, after))


def _fronts(whole: Stages) -> Fronts:
    """The stage of the fronts.

    Raises:
        StudyError: the network has none.
    """
    stage = fronts_of(whole)
    if stage is None:
        raise StudyError(
            f"The network has stages {', '.join(whole.names[:3])}, ... and no fronts. Expected one for each party. Name in each "
            "site's table what it holds: holds = [...]."
        )
    return stage


def check(network: Stages, **_: Any) -> None:
    """Look for the fronts.

    Raises:
        StudyError: the network is none of several parties.
    """
    _fronts(network)
