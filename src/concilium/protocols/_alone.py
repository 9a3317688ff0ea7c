"""Training without exchange: the loop that the two baselines share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from concilium.collect import Answer
from concilium.engines import Engine, ask
from concilium.messages import Failure, SiteError, Tensors, Trained
from concilium.protocols import WEIGHTS, Round, copy_traffic, part, traffic_since, train_requests


def train_alone(
    engine: Engine,
    start: Round,
    *,
    model: str,
    rounds: int,
    steps: Mapping[str, int],
    deadline_s: float | None,
    fetch: bool,
) -> Iterator[Round]:
    """Yield after each round. Each site goes on from its own weights; with `fetch` they are sent after the last round."""
    initial: Tensors = part(start.tensors, WEIGHTS)
    for number in range(start.number + 1, rounds + 1):
        before = copy_traffic(engine, steps)
        weights: Tensors = initial if number == 1 else {}
        requests = train_requests(model, number, rounds, steps, weights, send_weights=fetch and number == rounds)
        answers: dict[str, Answer] = {}
        failures: dict[str, Failure] = {}
        tensors: dict[str, Tensors] = {}
        for site, reply in ask(engine, requests, deadline_s=deadline_s):
            if isinstance(reply, Trained):
                answers[site] = Answer(reply.n_cases, reply.n_steps, reply.loss, reply.seconds)
                tensors[site] = reply.weights
            else:
                failures[site] = reply if isinstance(reply, Failure) else SiteError("ContractError", "wrong_reply", "")
        fetched = {WEIGHTS + n: t for update in tensors.values() for n, t in update.items()}
        yield Round(number, fetched, {}, answers, failures, traffic_since(engine, steps, before))
