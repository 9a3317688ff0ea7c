"""The server receives every update, adds it to the sum and lets go of it: memory does not grow with the number of sites."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from concilium.aggregation import LARGEST_WEIGHT, Sum, check_like
from concilium.collect import Answer, Ask, Collected
from concilium.errors import ContractError
from concilium.messages import Failure, Finish, Reply, SiteError, Tensors, Train, Trained, as_failure


def collect(ask: Ask, requests: Mapping[str, Train | Finish], *, like: Tensors) -> Collected:
    """Sum the updates, weighted by cases, as they arrive.

    An update with a missing, unknown or wrongly shaped tensor, or one that is not finite, is a failure of its site and not added.
    """
    total = Sum()
    answers: dict[str, Answer] = {}
    failures: dict[str, Failure] = {}
    for site, reply in ask(requests):
        problem = _problem(reply, like)
        if problem is not None:
            failures[site] = problem
        elif isinstance(reply, Trained):
            total.add(reply.weights, reply.n_cases)
            answers[site] = Answer(reply.n_cases, reply.n_steps, reply.loss, reply.seconds)
        del reply  # before the next one is unpacked
    return Collected(total, answers, failures)


def _problem(reply: Reply | Failure, like: Tensors) -> Failure | None:
    if not isinstance(reply, Trained):
        return as_failure(reply)
    try:
        check_like(reply.weights, like)
    except ContractError:
        return SiteError("ContractError", "wrong_tensors", "")
    if not 1 <= reply.n_cases <= LARGEST_WEIGHT:
        return SiteError("ContractError", "no_cases" if reply.n_cases < 1 else "too_many_cases", "")
    if not math.isfinite(reply.loss) or not math.isfinite(reply.seconds):
        return SiteError("FloatingPointError", "not_finite", "")
    # a sum is not finite exactly if an element is not, or if it overflows: one pass, no temporary of the tensor's size
    if not all(bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all()) for t in reply.weights.values()):
        return SiteError("FloatingPointError", "not_finite", "")
    return None
