"""Protocols: who talks when. One file here: one protocol, a function of the file's name that is a plain loop over rounds.

    def NAME(engine, start: Round, *, model, collect, rule, rounds, steps, min_sites, deadline_s, network, training, seed, device,
             cases, weigh, sharing, begin_with, box_s, ...options) -> Iterator[Round]

A protocol that does not need all of these takes the rest as `**_`. It starts again from any complete round: a `Round` holds
every value that the next one needs, as named tensors and JSON numbers. At a yield nothing is outstanding. `steps` says who takes
part, and with how many optimiser steps a round; `cases`, how many training cases each has; `weigh`, what an update counts in a
sum (`aggregation.weight_of`); `sharing`, which tensors travel; `begin_with`, what those begin with that do not travel;
`box_s`, after how many seconds a site answers with the steps that it has taken (a study may ask for it only where a protocol has
this parameter).

A file may also have `check(network: Stages, **options) -> None`, called for every variant before anything trains: it raises a
`StudyError` where this protocol cannot train that network. And `at_sites(network: Callable[..., Stages], **options)`: the names
of the tensors that sites hold, where these are not all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from concilium.collect import Answer
from concilium.engines import Engine, Traffic
from concilium.errors import EngineError
from concilium.messages import Failure, Json, Tensors, Train, describe

WEIGHTS = "weights/"
STATE = "rule/"
CONTROL = "control/"
"""Prefixes of a round's tensors: the shared model, what the aggregation rule keeps, and what local updates exchange besides."""

BEGUN = ".begun"
"""Among a round's values: which sites have answered once. No site can be called so."""


@dataclass(frozen=True)
class Round:
    """State of a protocol after `number` complete rounds; the rest tells what happened in the last of them."""

    number: int
    tensors: Tensors
    values: Mapping[str, Json] = field(default_factory=dict)
    answers: Mapping[str, Answer] = field(default_factory=dict)
    failures: Mapping[str, Failure] = field(default_factory=dict)
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    n_tensors: int = 0
    """How many tensors matched by name, shape and type, and were aggregated."""
    shared: Mapping[str, tuple[float, tuple[str, ...]]] = field(default_factory=dict)
    """Where not all is shared: site -> the share of its network's values that were averaged with others, and with whom."""
    server_seconds: float | None = None
    """Of computing the server's part of a network that is split."""
    asked: Mapping[str, int] = field(default_factory=dict)
    """How many steps each site was asked for."""

    def told_server(self) -> dict[str, float]:
        """The server's seconds of computing, for the record; nothing where it computes no part of the network."""
        return {} if self.server_seconds is None else {"server_seconds": round(self.server_seconds, 3)}

    def told_shared(self, site: str) -> dict[str, float | list[str]]:
        """The same of one site, for the record; nothing where all is shared."""
        share, others = self.shared.get(site, (None, ()))
        return {} if share is None else {"shared": round(share, 6), "with": list(others)}


def start_with(weights: Tensors) -> Round:
    """Round 0: the initial weights and nothing else."""
    return Round(0, {WEIGHTS + name: tensor for name, tensor in weights.items()})


def begun_at(start: Round) -> frozenset[str]:
    """Sites that have answered once, where some tensors stay with them."""
    return frozenset(map(str, cast(Sequence[Json], start.values.get(BEGUN, ()))))


def train_requests(
    model: str,
    number: int,
    rounds: int,
    steps: Mapping[str, int],
    weights: Tensors,
    *,
    send_weights: bool,
    control: Tensors | None = None,
    alone: bool = False,
    begins: bool = False,
    box_s: float | None = None,
) -> dict[str, Train]:
    """Round `number`'s request for each site; sites with equally many steps share one, which is packed once."""
    shared = {
        n: Train(
            model, number, (number - 1) * n, n, rounds * n, weights, send_weights, control or {}, alone, begins, box_s
        )
        for n in set(steps.values())
    }
    return {site: shared[n] for site, n in steps.items()}


def traffic_since(engine: Engine, sites: Mapping[str, int], before: Mapping[str, Traffic]) -> dict[str, Traffic]:
    """Bytes to and from each of the sites since the copy `before` was made."""
    return {s: Traffic(engine.traffic[s].down - before[s].down, engine.traffic[s].up - before[s].up) for s in sites}


def copy_traffic(engine: Engine, sites: Mapping[str, int]) -> dict[str, Traffic]:
    """The engine's counters as they are now."""
    return {s: Traffic(engine.traffic[s].down, engine.traffic[s].up) for s in sites}


def require(
    answered: Mapping[str, Answer], failures: Mapping[str, Failure], *, min_sites: int, model: str, number: int
) -> None:
    """Check that enough sites answered.

    Raises:
        EngineError: fewer than `min_sites`; says who failed and how.
    """
    if len(answered) < min_sites:
        failed = "; ".join(f"{site}: {describe(f)}" for site, f in failures.items())
        raise EngineError(
            f"{model}, round {number}: {len(answered)} of {len(answered) + len(failures)} sites answered ({failed}). "
            f"At least {min_sites} must ([protocol] min_sites). Mend the sites, then go on with --resume."
        )
