"""Updates received in the open: each is checked, added to the sum, and let go of or kept on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from concilium.aggregation import LARGEST_WEIGHT, UNITS, Block, Sum, Update, check_like
from concilium.collect import Answer, Ask, Collected
from concilium.collect._spool import Spool
from concilium.errors import ContractError
from concilium.messages import Failure, Finish, Reply, SiteError, Tensors, Train, Trained, as_failure


def receive(
    ask: Ask,
    requests: Mapping[str, Train | Finish],
    *,
    blocks: Sequence[Block],
    weigh: Callable[[int, float], int],
    asked: Mapping[str, int],
    see_updates: bool,
    spool: Path | None,
) -> Collected:
    """Sum the updates as they arrive; where the rule must see each, they wait on disk.

    An update with a missing, unknown or wrongly shaped tensor, or one that is not finite, is a failure of its site and not added.
    """
    totals, control = tuple(Sum() for _ in blocks), Sum()
    answers: dict[str, Answer] = {}
    failures: dict[str, Failure] = {}
    waiting = Spool(spool) if see_updates else None
    kept: dict[str, list[Update]] = {}
    for site, reply in ask(requests):
        problem = _problem(reply, site, blocks, asked, control)
        if problem is not None:
            failures[site] = problem
        elif isinstance(reply, Trained):
            share = reply.n_steps / asked[site]
            for block, total in zip(blocks, totals, strict=True):
                if site in block.names and reply.n_steps:  # after no step there is no update
                    total.add(_of_block(reply, block, site), weigh(reply.n_cases, share))
                    if waiting is not None:
                        kept.setdefault(site, []).append(_on_disk(reply, block, site, share, waiting))
            if reply.control:
                control.add(reply.control, reply.n_cases)
            answers[site] = Answer(reply.n_cases, reply.n_steps, reply.loss, reply.seconds, reply.memory, reply.spent)
        del reply  # before the next one is unpacked
    return Collected(totals, answers, failures, _by_block(blocks, kept) if see_updates else (), control)


def _of_block(reply: Trained, block: Block, site: str) -> Tensors:
    return {key: reply.weights[name] for key, name in block.names[site].items()}


def _on_disk(reply: Trained, block: Block, site: str, share: float, spool: Spool) -> Update:
    weights = spool.put(_of_block(reply, block, site))
    return Update(weights, reply.n_cases, reply.n_steps, reply.loss, share=share, site=site)


def _by_block(blocks: Sequence[Block], kept: Mapping[str, list[Update]]) -> tuple[Sequence[Update], ...]:
    """The updates of each block, sorted by site; a site put its blocks in their order."""
    left = {site: iter(updates) for site, updates in kept.items()}
    return tuple([next(left[site]) for site in sorted(kept) if site in block.names] for block in blocks)


def _problem(
    reply: Reply | Failure, site: str, blocks: Sequence[Block], asked: Mapping[str, int], control: Sum
) -> Failure | None:
    if not isinstance(reply, Trained):
        return as_failure(reply)
    like: Tensors = {name: block.like[key] for block in blocks for key, name in block.names.get(site, {}).items()}
    try:
        check_like(reply.weights, like)
        if control.count or reply.control:
            _check_control(reply.control, like, control)
    except ContractError:
        return SiteError("ContractError", "wrong_tensors", "")
    if (wrong := untrue(reply, asked[site])) is not None:
        return wrong
    # a sum is not finite exactly if an element is not, or if it overflows: one pass, no temporary of the tensor's size
    every = (*reply.weights.values(), *reply.control.values())
    if not all(bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all()) for t in every):
        return SiteError("FloatingPointError", "not_finite", "")
    return None


def untrue(reply: Trained, asked: int) -> Failure | None:
    """What is wrong with the numbers that a site told of its training."""
    if not 1 <= reply.n_cases <= LARGEST_WEIGHT // UNITS:
        return SiteError("ContractError", "no_cases" if reply.n_cases < 1 else "too_many_cases", "")
    if not 0 <= reply.n_steps <= asked or (reply.n_steps == 0 and reply.loss != 0):
        return SiteError("ContractError", "wrong_steps", "")
    if not math.isfinite(reply.loss) or not math.isfinite(reply.seconds):
        return SiteError("FloatingPointError", "not_finite", "")
    return None


def _check_control(tensors: Tensors, like: Tensors, control: Sum) -> None:
    """Check that what came beside the weights is shaped as they are, and is what the others sent.

    Raises:
        ContractError: it is not.
    """
    names = control.names if control.count else tuple(name for name in tensors if name in like)
    check_like(tensors, {name: like[name] for name in names if name in like})
