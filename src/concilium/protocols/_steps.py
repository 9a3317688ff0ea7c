"""The steps of one round of vertical training: two exchanges each, in which all parties take part."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from concilium.aggregation import check_like
from concilium.answers.vertical import set_absent
from concilium.collect import Answer
from concilium.data.draws import digest
from concilium.engines import Engine, ask
from concilium.errors import ConciliumError
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
    Where,
    as_failure,
)
from concilium.networks._fusion import Fronts
from concilium.protocols._body import ALL, Body


class Steps:
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
            sent, order = filled(together, there, self.fronts.parties), (-1,) * self.fronts.leaves
        else:
            set_absent(self.body.network, absent)
            key = (self.seed, ALL, self.request.round, step)
            try:
                sent, order = self.body.forward(filled(together, there, self.fronts.parties), key)
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


def filled(maps: Sequence[Tensor], there: Sequence[str], parties: Sequence[str]) -> tuple[Tensor, ...]:
    """The maps of all parties, zeros for those that are missing. Tensors as they travel."""
    each = len(maps) // len(there)
    of = {party: maps[i * each : (i + 1) * each] for i, party in enumerate(there)}
    none = {
        party: tuple(map(torch.zeros_like, of[there[0]])) for party in parties if party not in of
    }  # each its own memory
    return tuple(m for party in parties for m in (of | none)[party])
