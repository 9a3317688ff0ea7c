"""A finished vertical model at work: every party runs its front on the same windows of a case, and the label holder concludes.

No party sends an image, and none gets another's front. The server has the part in between, where the study gives it one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from concilium.answers.vertical import set_absent
from concilium.engines import Engine, ask
from concilium.messages import (
    Conclude,
    Evaluate,
    Evaluated,
    Failure,
    Look,
    Looked,
    Reply,
    SiteError,
    Tensors,
    as_failure,
)
from concilium.networks import Stages
from concilium.networks._fusion import FRONTS, Fronts, own_part, tail_of, without_fronts
from concilium.optimization import autocast, device_named
from concilium.planning import Plans, network_of
from concilium.protocols._steps import filled
from concilium.schedule import Model
from concilium.transport import decode, encode

WINDOWS = {2: 16, 3: 2}
"""Axes of a patch -> how many windows travel in a message."""


@dataclass(frozen=True)
class Served:
    """A vertical model as the server has it: the network, where its tail begins, and who has what."""

    network: Stages
    after: str
    fronts: Fronts
    labels: str
    owned: Mapping[str, frozenset[str]]
    """Site -> the names of its tensors."""


def served(model: Model, plans: Plans) -> Served:
    """What is needed to serve a model of this setting."""
    study = model.setting.study
    p = study.protocol.options
    at_labels = p["body"] == "labels"
    network = network_of(study, plans)(deep_supervision=study.training.deep_supervision and at_labels)
    after = FRONTS if at_labels else tail_of(network)
    fronts = cast(Fronts, network[FRONTS])
    owned = {
        site: frozenset(own_part(network, site, tail_after=after, labelled=site == p["labels"]).held.state_dict())
        for site in model.setting.sites
    }
    return Served(network, after, fronts, str(p["labels"]), owned)


def own_weights(model: Model, plans: Plans, weights: Tensors) -> dict[str, Tensors]:
    """Site -> those of these weights that are its own; what stays at sites is in neither."""
    owned = {site: dict.fromkeys(sorted(names)) for site, names in served(model, plans).owned.items()}
    if model.apart:
        owned = {site: without_fronts(names) for site, names in owned.items()}
    return {site: {n: weights[n] for n in names} for site, names in owned.items()}


def serve(
    engine: Engine,
    model: Model,
    plans: Plans,
    weights: Tensors,
    request: Evaluate,
    *,
    device: str,
    cases: Sequence[Mapping[str, int]] | None = None,
) -> Reply | Failure:
    """Have the cases of a subset segmented and scored; what the label holder answers at the end, or how a site failed.

    `cases`: for each who has it, and its place there; omitted: all parties have all, at the same places.
    """
    made = served(model, plans)
    study = model.setting.study
    chosen = device_named(device)
    body = made.network.split(FRONTS, made.after)[1] if made.after != FRONTS else None
    if body is not None:
        body.load_state_dict({n: weights[n] for n in body.state_dict()})
        body.to(chosen).eval()
    parties = made.fronts.parties
    between = _Between(parties, body, chosen, study.training.precision, study.protocol.options["transport"])
    n_windows = WINDOWS[len(plans.patch_size)]
    case, n_cases = 0, 1 if cases is None else len(cases)
    reply: Reply | Failure = SiteError("EngineError", "no_cases", "")
    while case < n_cases:
        at = dict.fromkeys((*parties, made.labels), case) if cases is None else cases[case]
        there, absent = [p for p in parties if p in at], tuple(p for p in parties if p not in at)
        start, last = 0, False
        while not last:
            look = Look(request.model, request.subset, case, start, n_windows, between.transport)
            looked = _look(engine, {p: replace(look, case=at[p]) for p in there}, same=cases is None)
            if not isinstance(looked, _Windows):
                return looked
            last = start + len(looked.maps) >= looked.n_windows
            n_cases = looked.n_cases if cases is None else n_cases
            if not looked.n_cases:
                return reply
            maps = tuple(between(window, there) for window in looked.maps)  # none where a party cannot read the case
            conclude = Conclude(request, at[made.labels], start, maps, last, made.after, absent, between.transport)
            (reply,) = dict(ask(engine, {made.labels: conclude})).values()
            if isinstance(reply, Failure):
                return reply
            start += len(looked.maps)
        case += 1
    return reply if isinstance(reply, Evaluated) else as_failure(reply)


@dataclass(frozen=True)
class _Windows:
    """For each window the maps of all that were asked, in turn; how many windows the case has, and cases are there."""

    maps: tuple[tuple[Tensor, ...], ...]
    n_windows: int
    n_cases: int


def _look(engine: Engine, requests: Mapping[str, Look], *, same: bool) -> _Windows | Failure:
    """What these parties see of the windows; or how one failed. `same`: whether all must have as many cases."""
    looked: dict[str, Looked] = {}
    for site, answer in list(ask(engine, requests)):  # all, or the next question gets the last replies
        if not isinstance(answer, Looked):
            return as_failure(answer)
        looked[site] = answer
    n_cases = {reply.n_cases for reply in looked.values()}
    count = next(iter(requests.values())).count
    told = {(len(reply.maps), reply.n_windows) for reply in looked.values()}
    wrong = SiteError("ContractError", "wrong_maps", "")
    if same and len(n_cases) > 1:
        return wrong
    if not all(reply.maps for reply in looked.values()):
        return _Windows((), 0, max(n_cases))
    (n, n_windows), *others = told
    if others or n > count:
        return wrong
    each = zip(*(looked[party].maps for party in requests), strict=True)
    return _Windows(tuple(tuple(m for maps in window for m in maps) for window in each), n_windows, max(n_cases))


@dataclass(frozen=True)
class _Between:
    """What the server does to the maps of a window."""

    parties: Sequence[str]
    body: Stages | None
    device: torch.device
    precision: str
    transport: str

    def __call__(self, maps: tuple[Tensor, ...], there: Sequence[str]) -> tuple[Tensor, ...]:
        """The maps that the tail takes, from those of the parties that are `there`."""
        maps = filled(maps, there, self.parties)
        if self.body is None:
            return maps
        set_absent(self.body, [party for party in self.parties if party not in there])
        came = [m.to(self.device) for m in decode(maps, self.transport, dtype=torch.float32)]
        with torch.no_grad(), autocast(self.device, self.precision):
            return encode(self.body.run(tuple(came)), self.transport)
