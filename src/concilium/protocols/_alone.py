"""Training without exchange: the loop that the two baselines share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from torch import Tensor

from concilium.collect import Answer
from concilium.engines import Engine, ask
from concilium.messages import Failure, Json, Tensors, Trained, as_failure
from concilium.protocols import WEIGHTS, Round, copy_traffic, traffic_since, train_requests
from concilium.wire import part


def train_alone(
    engine: Engine,
    start: Round,
    *,
    model: str,
    rounds: int,
    steps: Mapping[str, int],
    deadline_s: float | None,
    fetch: bool,
    box_s: float | None = None,
) -> Iterator[Round]:
    """Yield after each round. Each site goes on from its own weights; with `fetch` they are sent after the last round.

    A site receives the initial weights until it has trained once; a round keeps them as long as one is waiting for them.
    """
    initial: Tensors = part(start.tensors, WEIGHTS)
    waiting = set(steps) if start.number == 0 else {str(site) for site in cast(Sequence[Json], start.values["waiting"])}
    for number in range(start.number + 1, rounds + 1):
        before = copy_traffic(engine, steps)
        fetches = fetch and number == rounds
        begin = train_requests(
            model, number, rounds, steps, initial, send_weights=fetches, alone=True, box_s=box_s, begins=True
        )
        go_on = train_requests(model, number, rounds, steps, {}, send_weights=fetches, alone=True, box_s=box_s)
        requests = {site: (begin if site in waiting else go_on)[site] for site in steps}
        answers: dict[str, Answer] = {}
        failures: dict[str, Failure] = {}
        fetched: dict[str, Tensor] = {}
        for site, reply in ask(engine, requests, deadline_s=deadline_s):
            if isinstance(reply, Trained):
                answers[site] = Answer(reply.n_cases, reply.n_steps, reply.loss, reply.seconds, reply.memory)
                fetched |= {WEIGHTS + name: tensor for name, tensor in reply.weights.items()}
            else:
                failures[site] = as_failure(reply)
        waiting -= answers.keys()
        kept = fetched or ({WEIGHTS + name: tensor for name, tensor in initial.items()} if waiting else {})
        yield Round(
            number, kept, {"waiting": tuple(sorted(waiting))}, answers, failures, traffic_since(engine, steps, before)
        )
