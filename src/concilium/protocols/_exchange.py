"""The steps of one round of split training: two exchanges each, with every site at its own pace or in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from concilium.engines import Engine
from concilium.errors import ContractError
from concilium.messages import Failure, Front, Gradients, Maps, SiteError, Tail, as_failure
from concilium.protocols._body import Body


class Exchange:
    """One round; `run` ends when every site has taken its steps or failed. Then `last` and `failures` tell of each site.

    Each body serves the sites in its queue in that order, a site as often as it takes steps; bodies do not wait for each other.
    """

    def __init__(
        self, engine: Engine, queues: Sequence[tuple[Body, Sequence[str]]], first: Mapping[str, Front], *, seed: int
    ) -> None:
        self.last: dict[str, tuple[Tensor, ...]] = {}
        """Gradients with which a site finishes its last step."""
        self.failures: dict[str, Failure] = {}
        self._engine = engine
        self._seed = seed
        self._first = dict(first)
        self._step = dict.fromkeys(first, 0)
        self._queues = [(body, deque(queue)) for body, queue in queues]
        self._expected: dict[str, type] = dict.fromkeys(first, Maps)
        self._waiting: dict[str, Maps] = {}
        """Maps of sites whose turn has not come."""
        self._served: dict[str, Body] = {}
        """Site -> the body that waits for its gradients."""

    def run(self, *, deadline_s: float | None) -> None:
        """Take all steps. A site fails that answers an exchange later than `deadline_s`."""
        self._deadline_s = deadline_s
        self._engine.send(self._first, deadline_s=deadline_s)
        for site, reply in self._engine.replies():
            if not isinstance(reply, self._expected[site]):
                self._fail(site, as_failure(reply))
            elif isinstance(reply, Maps):
                self._waiting[site] = reply
            elif isinstance(reply, Gradients):
                self._backward(site, reply)
            while self._serve():
                pass

    def _send(self, site: str, request: Front | Tail, expected: type) -> None:
        self._expected[site] = expected
        self._engine.send({site: request}, deadline_s=self._deadline_s)

    def _serve(self) -> bool:
        """Let a body work that has the maps of the site whose turn it is; whether there was one."""
        for body, queue in self._queues:
            while queue and queue[0] in self.failures:
                queue.popleft()
            if queue and queue[0] in self._waiting and body not in self._served.values():
                self._forward(queue[0], body)
                return True
        return False

    def _forward(self, site: str, body: Body) -> None:
        first, step = self._first[site], self._step[site]
        try:
            maps, order = body.forward(self._waiting.pop(site).maps, (self._seed, site, first.round, step))
        except FloatingPointError:
            body.give_up()
            self._fail(site, SiteError("FloatingPointError", "not_finite", ""))
            return
        except Exception:  # whatever layers raise for maps from outside, of a shape that they do not take, say
            self._fail(site, SiteError("ContractError", "wrong_maps", ""))
            return
        self._served[site] = body
        self._send(site, Tail(first.model, first.round, step, maps, order), Gradients)

    def _backward(self, site: str, reply: Gradients) -> None:
        first, step = self._first[site], self._step[site]
        body = self._served.pop(site)
        try:
            gradients = body.backward(reply.gradients, step=first.first_step + step, total_steps=first.total_steps)
        except ContractError:
            body.give_up()
            self._fail(site, SiteError("ContractError", "wrong_gradients", ""))
            return
        except FloatingPointError:
            body.give_up()
            self._fail(site, SiteError("FloatingPointError", "not_finite", ""))
            return
        for served, queue in self._queues:
            if served is body:
                queue.popleft()
        self._step[site] = step + 1
        if step + 1 == first.steps:
            if not body.is_finite():
                self._fail(site, SiteError("FloatingPointError", "not_finite", ""))
                return
            self.last[site] = gradients
            return
        request = replace(first, step=step + 1, weights={}, gradients=gradients)
        self._send(site, request, Maps)

    def _fail(self, site: str, failure: Failure) -> None:
        self.failures[site] = failure
        if (body := self._served.pop(site, None)) is not None:
            body.give_up()
