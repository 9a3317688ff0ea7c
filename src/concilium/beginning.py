"""What models begin with: weights drawn from the seed or read from elsewhere, which of them train, and which each site has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from concilium.checkpoints import sha256_of
from concilium.data.draws import drawn_from
from concilium.data.labels import n_heads
from concilium.data.plan import open_plan
from concilium.freezing import digest_of, frozen_of
from concilium.messages import Frozen, Tensors
from concilium.networks._fusion import without_fronts
from concilium.planning import Plans, network_of
from concilium.record import Record
from concilium.schedule import Model
from concilium.start_from import start_of
from concilium.study import Study


def begun(study: Study, plans: Plans, record: Record, *, name: str) -> Plans:
    """The plans with what the study says to start from, matched with its network, and with what of that does not train.

    Args:
        name: of the files about it in the run folder.
    """
    if study.start.weights is None:
        return with_frozen(study, plans)
    trains, frozen = drawn_weights(study, plans)
    start = start_of(
        study,
        {**trains, **frozen},
        record,
        n_channels=len(plans.channels),
        n_labels=n_heads(plans.labels),
        plan=open_plan(plans.text, study.plan.configuration).architecture,
        name=name,
    )
    return with_frozen(study, replace(plans, start=start))


def with_frozen(study: Study, plans: Plans) -> Plans:
    """The plans with what of the network does not train, and what sites are told of it."""
    found: dict[str, Frozen] = {}
    for site in plans.by_site:
        found[site] = Frozen(digest_of(drawn_weights(study, plans, site)[1]))
    _, values = drawn_weights(study, plans)
    told, start = Frozen(digest_of(values)), plans.start
    if values and start is not None and not values.keys().isdisjoint(start.weights):
        values = {name: start.weights.get(name, drawn) for name, drawn in values.items()}
        names = {there: ours for there, ours in start.names.items() if ours in values}
        told = Frozen(digest_of(values), start.sha256, names)
    return replace(plans, frozen=values, told=found | {"": told}) if values else plans


def frozen_as(study: Study, plans: Plans, weights: Tensors, file: Path) -> Plans:
    """The plans with what of finished weights did not train, wherever their run had it from: sites have it from their file."""
    values = {name: weights[name] for name in drawn_weights(study, plans)[1]}
    return replace(plans, frozen=values, told={"": Frozen(digest_of(values), sha256_of(file))}) if values else plans


def complete(plans: Plans, weights: Tensors) -> Tensors:
    """The weights of the one network with what of it does not train."""
    return {**plans.frozen, **weights}


def drawn_weights(study: Study, plans: Plans, site: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that a network is drawn with: those that train, and those that do not."""
    build = network_of(study, plans, site)
    with drawn_from(study.study.seed, "weights"):
        network = build()
    return network.state_dict(), frozen_of(network)


def initial_weights(study: Study, plans: Plans, site: str = "") -> Tensors:
    """The weights that every model of a run starts from: a function of the seed, the plan, and what the study starts from.

    Those that train; what is frozen no model begins with, since it is there.
    """
    drawn, _ = drawn_weights(study, plans, site)
    return drawn if plans.start is None else drawn | {n: t for n, t in plans.start.weights.items() if n in drawn}


def initial_shared(study: Study, plans: Plans) -> Tensors:
    """What the shared tensors of the setting's own model start from; of own plans, those of the first site that has each."""
    sharing = plans.sharing
    if not sharing.blocks:
        return sharing.of(initial_weights(study, plans))
    values: dict[str, Tensors] = {}
    start: dict[str, Tensor] = {}
    for block in sharing.blocks:
        first = min(block.sites)
        own = values.setdefault(first, initial_weights(study, plans, first))
        start |= {key: own[name] for key, name in block.names[first].items()}
    return start


def start_weights(model: Model, plans: Plans) -> Tensors:
    """What the server begins a model with: all weights, or what is shared. What is a site's own begins there."""
    study = model.study
    if model.partly:
        return initial_shared(study, plans)
    if model.apart:
        return without_fronts(initial_weights(study, plans))
    return {} if plans.by_site and model.protocol == "local" else initial_weights(study, plans)


def begin_with(plans: Plans) -> Tensors:
    """Of what stays at the sites, that which the study starts from."""
    start = {} if plans.start is None else plans.start.weights
    return {name: t for name, t in start.items() if name in plans.sharing.kept}


def n_parameters(model: Model, plans: Plans) -> dict[str, int]:
    """How many values a model has, and where not all how many train; where sites' networks differ, those of the largest."""
    own = plans.by_site if model.protocol != "centralized" else {}
    drawn = [drawn_weights(model.study, plans, site) for site in own] if plans.frozen else []
    frozen = max((_count(f) for _, f in drawn), default=_count(plans.frozen))
    if plans.sharing.sizes and model.protocol != "centralized":
        trained = max(plans.sharing.sizes.values())
    else:
        trained = _count(initial_weights(model.study, plans))
    return {"parameters": trained + frozen} | ({"trained": trained} if frozen else {})


def _count(weights: Tensors) -> int:
    return sum(t.numel() for t in weights.values())
