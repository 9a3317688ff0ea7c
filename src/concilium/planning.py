"""The plan of a setting, or of each of its sites; the networks that are built by it, and what of these is shared."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from concilium import catalog
from concilium.data.draws import drawn_from
from concilium.data.labels import Labels, looked_for, n_heads, with_labels
from concilium.data.parties import uncropped
from concilium.data.plan import make_plans, open_plan
from concilium.defences import guarded
from concilium.errors import StudyError
from concilium.freezing import freezing
from concilium.messages import Fingerprint, Frozen, Prepare, Tensors
from concilium.networks import Stages, make_network, names_elsewhere
from concilium.sharing import EVERYTHING, ROLES, Sharing, Table, kept_of, match
from concilium.start_from import Start
from concilium.study import Study, guard_of, is_vertical, training_of


@dataclass(frozen=True)
class Told:
    """What the sites told of their data."""

    channels: tuple[str, ...]
    labels: Labels
    file_ending: str
    fingerprints: Mapping[str, Fingerprint]
    """Of the study's sites, by name."""
    partial: bool = False
    """Whether a site annotates some labels only, or does in some cases."""
    annotated: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    """Of the study's sites: what was looked for in some case; `None`: all."""
    patients: tuple[int, ...] = ()
    """Where sites hold channels of the same patients: a number for the patient of each case that all have."""

    def looked_for(self, sites: Collection[str]) -> dict[str, frozenset[str]]:
        """The labels that each of these sites looked for in some case."""
        return {site: frozenset(looked_for(self.labels, self.annotated[site])) for site in sites}


@dataclass(frozen=True)
class Plans:
    """The plan that was made of what the sites told, and what follows from it."""

    text: str
    channels: tuple[str, ...]
    labels: Labels
    patch_size: tuple[int, ...]
    batch_size: int
    start: Start | None = None
    """What models start from in place of drawn weights."""
    by_site: Mapping[str, str] = field(default_factory=dict)
    """Site -> its own plan, where each has one; then `text` is that of all their cases together, for baselines."""
    held: Mapping[str, str] = field(default_factory=dict)
    """Site -> the plan of the channels that it holds, where each holds some."""
    patients: tuple[int, ...] = ()
    """As in `Told`."""
    sharing: Sharing = EVERYTHING
    """What of the setting's own model travels."""
    unknown: tuple[str, ...] = ()
    """Labels that no site which trains looked for."""
    frozen: Tensors = field(default_factory=dict)
    """The tensors of the network that do not train."""
    told: Mapping[str, Frozen] = field(default_factory=dict)
    """What a site with a plan of its own is told of these; under no name all others."""

    def of(self, site: str) -> str:
        """The plan by which a site prepares and trains."""
        return self.by_site.get(site) or self.held.get(site) or self.text

    def request(self, study: Study, site: str = "") -> Prepare:
        """What a site is asked to prepare by the plan of all, or where each has one by its own; the study's fold is one."""
        v, everywhere = study.validation, self.told.get("", Frozen())
        return Prepare(
            self.by_site.get(site, self.text), study.plan.configuration, study.network, training_of(study), v.folds,
            cast(int, v.fold), study.study.seed, study.study.max_excluded, self.channels, self.labels, study.sharing.keep,
            guard=guard_of(study), filters=study.filters, frozen=self.told.get(site, everywhere),
        )  # fmt: skip


def plan_text(study: Study, told: Told, fingerprint: Fingerprint) -> str:
    """nnU-Net's plan of these cases, by the study's settings."""
    p, t, r = study.plan, study.training, study.preprocessing
    options = study.network.options
    plans = make_plans(
        fingerprint,
        channels=told.channels,
        labels=told.labels,
        file_ending=told.file_ending,
        configuration=p.configuration,
        planner=p.planner,
        memory_gb=p.memory_gb,
        base_features=cast("int | None", options.get("base_features", _inner(options).get("base_features"))),
        batch_size=t.batch_size,
        patch_size=t.patch_size,
        resize=None if r.name == "nnunet" else {"size": r.size, "intensity": r.intensity},
    )
    return uncropped(plans) if is_vertical(study) else plans


def _inner(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of the network that a network of several parties is made of."""
    inner = options.get("options")
    return inner if isinstance(inner, Mapping) else {}


def batch_size_of(study: Study, plans: Plans, site: str) -> int:
    """Patches in a batch at a site."""
    own = plans.by_site.get(site)
    return plans.batch_size if own is None else open_plan(own, study.plan.configuration).batch_size


def network_of(
    study: Study, plans: Plans, site: str = "", *, cut: tuple[str, ...] | None = None
) -> Callable[..., Stages]:
    """What builds the study's network, with new weights each time; `deep_supervision` may be given in place of the study's.

    What does not train is frozen in it. Defences are in it, where the study's cut is or this one.
    """
    plan = open_plan(plans.of(site), study.plan.configuration)
    build = partial(
        make_network,
        study.network,
        n_channels=len(plans.channels),
        n_labels=n_heads(plans.labels),
        plan=with_labels(plan.architecture, plans.labels),
        deep_supervision=study.training.deep_supervision,
    )
    frozen = freezing(build, study.training.tensors, None if site in plans.by_site else plans.frozen or None)
    return guarded(frozen, guard_of(study, cut), image=(1, len(plans.channels), *plan.configuration.patch_size))


def image_of(study: Study, plans: Plans, site: str = "") -> tuple[int, ...]:
    """The shape (B, C, *patch) of what the network takes in a step."""
    plan = open_plan(plans.of(site), study.plan.configuration)
    return (plan.batch_size, len(plans.channels), *plan.patch_size)


# ------------------------------------------------------------------------------------------------------ what is shared


def share_one_plan(study: Study, plans: Plans) -> Sharing:
    """What is shared of one network.

    Raises:
        StudyError: what is to be kept is not in it, or not in the part that sites have, or is all of it.
    """
    if not study.sharing.keep:
        return EVERYTHING
    build = network_of(study, plans)
    at_sites = getattr(inspect.getmodule(catalog.load("protocols", study.protocol.name)), "at_sites", None)
    with drawn_from("look"):  # the weights are thrown away
        network = build()
        kept = kept_of(network, study.sharing.keep)
        if at_sites is not None:
            kept = _at_sites(network, kept, at_sites(build, **study.protocol.options), study)
    size = sum(t.numel() for t in network.state_dict().values())
    own_heads = study.sites if _lie_in(network, kept) else ()
    return Sharing(kept, sizes=dict.fromkeys(study.sites, size), own_heads=frozenset(own_heads))


def _lie_in(network: Stages, kept: Collection[str]) -> bool:
    """Whether all tensors of the layers that make logits are among these, by whatever words a study keeps them."""
    heads = set(ROLES["heads"](network))
    return bool(heads) and heads <= set(kept)


def _at_sites(network: Stages, kept: frozenset[str], there: frozenset[str], study: Study) -> frozenset[str]:
    """What is kept of the tensors that sites have, where the server has the others."""
    for one in study.sharing.keep:
        if kept_of(network, [one]).isdisjoint(there):
            stages = ", ".join(dict.fromkeys(n.partition(".")[0] for n in network.state_dict() if n in there))
            raise StudyError(
                f"[sharing] keep = {list(study.sharing.keep)} is not possible with protocol {study.protocol.name!r}: {one!r} "
                f"names tensors of the server's part only. Allowed: tensors that sites have, of the stages {stages}. Correct "
                "it, take it out, or choose another [protocol] cut."
            )
    return kept & there


def share_own_plans(
    study: Study, plans: Plans, tables: Mapping[str, Table], sizes: Mapping[str, int] | None = None
) -> Sharing:
    """What sites' own networks have in common; `sizes`: how many values each has, where tables are not of all.

    Raises:
        StudyError: nothing.
    """
    mode = study.sharing.match
    elsewhere = {}
    if mode == "published":
        known = partial(names_elsewhere, study.network, n_channels=len(plans.channels), n_labels=n_heads(plans.labels))
        elsewhere = {
            site: known(plan=open_plan(plans.of(site), study.plan.configuration).architecture) for site in tables
        }
    axes = {site: tuple(json.loads(plans.of(site))["transpose_forward"]) for site in tables}
    sharing = match(tables, mode=mode, elsewhere=elsewhere, axes=axes)
    own_heads = set()
    with drawn_from("look"):  # the weights are thrown away
        for site in tables:
            network = network_of(study, plans, site)()
            if _lie_in(network, network.state_dict().keys() - sharing.names(site).keys()):
                own_heads.add(site)
    return replace(sharing, sizes=sizes or sharing.sizes, own_heads=frozenset(own_heads))
