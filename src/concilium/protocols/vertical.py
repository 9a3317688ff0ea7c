"""Vertical split learning: sites hold different channels of the same patients, one holds the labels, and they train one network.

Roth et al. 2022, Split-U-Net (arXiv:2208.10553). Each party has a front for its own channels; their maps meet in the stage `fuse`
(`networks/_fusion.py`). What follows is the server's up to the cut's second stage and then the label holder's, or all of it the
label holder's. Two exchanges a step, as in `splitfed`: maps from all parties; the tail at the labels; and the gradient of each
map to its owner alone, with the request for the next step. Nothing is averaged: there is one copy of each part. Each owner clips
its own gradient (decisions/0007). With `fronts = "stay"` each party draws its front itself and never sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

from concilium.engines import Engine
from concilium.errors import EngineError, StudyError
from concilium.messages import (
    Front,
    Tensors,
    Training,
    describe,
)
from concilium.networks import Parts, Stages
from concilium.networks._fusion import FRONTS, Fronts, fronts_of, own_part, tail_of, without_fronts
from concilium.protocols import WEIGHTS, Round, copy_traffic, traffic_since
from concilium.protocols._body import ALL, MOMENTS, Body, require_finite, together
from concilium.protocols._steps import Steps
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
    fronts: Literal["sent", "stay"] = "sent",
    parties: tuple[str, ...] = (),
    drop: float = 0.0,
    patches: Literal["uniform", "labels"] = "uniform",
    transport: Transport = "float32",
    exchange_seconds: float | None = None,
    new_patients: bool = False,
    incomplete: bool = False,
    **_: Any,
) -> Iterator[Round]:
    """Yield the state after each round: the whole network's weights but those that stay, and the optimiser of the server's part.

    Args:
        labels: the site whose label maps are trained on.
        cut: `shallow`, `deep`, or the two stages after which the network is cut: fronts end with the first.
        fuse: how the parties' maps are made one: `concat`, side by side and mixed by a 1×1 convolution; `mean`; or `max`.
        body: whether the server has what follows the fronts, up to the second stage of the cut, or the label holder has it all.
        fronts: `sent`: the server has the weights of each front after every round. `stay`: each is drawn at its party, and never
            leaves; then nobody has the whole network.
        parties: whose channels are used; omitted: those of all sites.
        drop: chance that a party is left out of a step (one at least stays), so that the network learns to do without.
        patches: `uniform`: anywhere. `labels`: on foreground as often as `[training] foreground` says, which tells all where
            labels lie.
        transport: as what maps and gradients travel, as in `splitfed`.
        exchange_seconds: deadline of each exchange; omitted: that of a round, `round_seconds`.
        new_patients: in the end, segment the cases that all sites have in `imagesTs`; label maps stay where the labels are.
        incomplete: segment also those that some sites lack: whoever has the labels, and one whose channels are used, have them.

    Raises:
        StudyError: the network is none of several parties.
        EngineError: a party failed in a round, or the server's part is not finite any more.
    """
    deadline = min((s for s in (deadline_s, exchange_seconds) if s is not None), default=None)
    whole = network(deep_supervision=training.deep_supervision and body == "labels")
    after = FRONTS if body == "labels" else tail_of(whole)
    middle = None if body == "labels" else Body(_parts(whole, after), training, device, transport)
    stage = _fronts(whole)
    owned = {site: own_part(whole, site, tail_after=after, labelled=site == labels).held.state_dict() for site in steps}
    if fronts == "stay":
        owned = {site: without_fronts(own) for site, own in owned.items()}
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
        exchange = Steps(
            engine, middle, stage, labels, request, deadline, seed=seed, drop=drop, follows=patches == "labels"
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
        computed = None if middle is None else middle.seconds
        yield Round(
            number, tensors, {ALL: numbers}, answers, failures, traffic, n_tensors=len(made), server_seconds=computed
        )


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
