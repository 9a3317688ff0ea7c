"""Before training: the sites' fingerprints become one plan, and every site prepares its cases by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from concilium._set_aside import told as set_aside
from concilium.beginning import begun
from concilium.data.fingerprint import merge, to_json
from concilium.data.labels import looked_for, to_nnunet, unknown_labels
from concilium.data.matching import Space, agree, annotation_notes, reorder
from concilium.data.parties import of_channels
from concilium.data.partition import Layout, materialise
from concilium.data.plan import open_plan
from concilium.defences import check_batches, lapses
from concilium.engines import Engine, ask
from concilium.errors import DataError, EngineError
from concilium.filters import site_level
from concilium.local_updates import check_labels, doubts_of
from concilium.messages import (
    Describe,
    Described,
    Examine,
    Examined,
    Failure,
    Prepared,
    Reply,
    Request,
    Share,
    SiteError,
    describe,
)
from concilium.planning import Plans, Told, image_of, network_of, plan_text, share_one_plan, share_own_plans
from concilium.record import Record
from concilium.rehearsal import try_loss, try_network, try_rule, try_tensors
from concilium.schedule import Setting
from concilium.sharing import Sharing, table_of
from concilium.start_from import check_start
from concilium.study import SiteTable, Study, holdings, is_vertical, places
from concilium.together import NOTHING, align_parties, as_one, held_requests, must_lie_alike


@dataclass
class Ledger:
    """What went wrong on the way; a run with an entry ends with exit code 4."""

    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)
    """What sites elsewhere told of cases that they set aside (`_set_aside.told`)."""


@dataclass(frozen=True)
class Event:
    """Something a person who watches a run may want to see."""

    kind: str
    """`stage`, `round`, `scored` or `warning`."""
    text: str = ""
    model: str = ""
    round: int = 0
    rounds: int = 0
    loss: float | None = None


@dataclass(frozen=True)
class Work:
    """What the steps of a run share."""

    study: Study
    engine: Engine
    record: Record
    plans: Plans
    watch: Callable[[Event], None]


def on_folders(study: Study, layout: Layout, folder: Path) -> Study:
    """The study with the folders that `divide` asked for, made in the run folder, as the data of its sites and test set."""
    seed = study.study.seed if study.partition is None or study.partition.seed is None else study.partition.seed
    made = materialise(layout, folder, seed=seed)
    test = made.pop("test", None)
    sites = {n: replace(site, data=made.get(n, site.data), shift=None) for n, site in study.sites.items()}
    return replace(
        study,
        sites=sites,
        test=replace(study.test or SiteTable(), data=test, shift=None) if test else study.test,
        partition=None,
    )


def ask_sites(study: Study, engine: Engine, record: Record, ledger: Ledger) -> Told:
    """Have every site read its cases and tell what may be told of them.

    Raises:
        DataError: sites disagree, or the data of one cannot be used.
        EngineError: too few sites answered.
    """
    for one in (study, *study.variants.values()):
        check_start(one, record)
    held = holdings(study) if is_vertical(study) else {}
    most = dict.fromkeys(held, 1.0)  # of parties those count that all have: the alignment knows
    asked = {
        name: Examine(study.plan.exact_geometry, most.get(name, study.study.max_excluded), held.get(name))
        for name, site in engine.sites.items()
        if site.role in ("site", "test")
    }
    told = {name: reply for name, reply in _must(engine, record, asked, study, ledger) if isinstance(reply, Examined)}
    told = {name: told[name] for name in (*study.sites, *told) if name in told}  # the first site's order and ids count
    ledger.excluded += [x for name, r in told.items() if record.is_elsewhere(name) for x in set_aside(name, r.excluded)]
    each = told
    if held:
        told = as_one(study, each)
    space, how = agree({name: Space(reply.channels, reply.labels, reply.annotated) for name, reply in told.items()})
    first = next(iter(told.values()))
    about = {
        "channel_names": {str(i): c for i, c in enumerate(space.channels)},
        **to_nnunet(space.labels),
        "file_ending": first.file_ending,
    }
    _keep(record, "dataset.json", json.dumps(about, indent=1) + "\n")
    if any(r.annotated is not None for r in told.values()):
        known = {n: list(looked_for(space.labels, r.annotated)) for n, r in told.items() if n in study.sites}
        _keep(record, "annotated.json", json.dumps(known, indent=1) + "\n")
    unknown = annotation_notes(
        space.labels,
        {name: reply.annotated for name, reply in told.items() if name in study.sites},
        partly=[name for name, reply in told.items() if name in study.sites and reply.partly],
    )
    ledger.warnings += unknown
    agreed = align_parties(study, engine, record) if held else NOTHING
    ledger.warnings += agreed.warnings
    ledger.problems += agreed.problems
    if agreed.fewer:  # the plan is that of the cases that all have
        again = {name: replace(asked[name], common=True) for name in held}
        replies = _must(engine, record, again, study, ledger)
        told = as_one(study, each | {name: reply for name, reply in replies if isinstance(reply, Examined)})
    fingerprints = {name: reorder(told[name].fingerprint, how[name]) for name in sorted(told) if name in study.sites}
    about_labels = {name: told[name].annotated for name in fingerprints}
    found = Told(space.channels, dict(space.labels), first.file_ending, fingerprints, bool(unknown), about_labels)
    return replace(found, patients=agreed.patients)


def plan_for(setting: Setting, told: Told, record: Record, ledger: Ledger) -> Plans:
    """The plan of a setting, from the fingerprints of the sites that train; the record keeps it where models will find it.

    Raises:
        DataError: it is not the one that the run began with.
        StudyError: the study's network or protocol cannot be had with it.
    """
    study = setting.study
    fingerprints = {name: f for name, f in told.fingerprints.items() if name in setting.sites or is_vertical(study)}
    merged = merge(list(fingerprints.values()))
    text = plan_text(study, told, merged)
    if setting.is_base:
        _keep(record, "fingerprint.json", to_json(merged))
    _keep(record, "plans.json" if setting.is_base else f"plans/{setting.title}.json", text)
    plan = open_plan(text, study.plan.configuration)
    plans = Plans(text, told.channels, told.labels, plan.patch_size, plan.batch_size)
    if study.plan.fingerprint == "site":
        plans = replace(plans, by_site={name: plan_text(study, told, f) for name, f in fingerprints.items()})
    if is_vertical(study):
        held = {name: of_channels(text, mine or (0,)) for name, mine in places(study).items()}
        plans = replace(plans, held=held, patients=told.patients)
    for name, own in plans.by_site.items():
        _keep(record, f"plans/{setting.title}/{name}.json", own)
    for name in plans.by_site or ("",):
        try_network(study, network_of(study, plans, name))
        try_tensors(study, network_of(study, plans, name), image_of(study, plans, name))
    check_batches(study.defences, plans.batch_size)
    check_labels(study.local_update, plans.labels)
    if told.partial:
        try_loss(study, plans.labels)
        try_rule(study.aggregation.name, told.looked_for(fingerprints))
    if not plans.by_site:
        plans = replace(plans, sharing=share_one_plan(study, plans))
        _note_own_heads(setting, plans.sharing, record)
    unknown = _unknown_to(setting, told, ledger)
    name = "start_from" if setting.is_base else f"start/{setting.title}"
    plans = begun(study, replace(plans, unknown=unknown), record, name=name)
    ledger.warnings += plans.start.warnings if plans.start else ()
    return plans


def _unknown_to(setting: Setting, told: Told, ledger: Ledger) -> tuple[str, ...]:
    """The labels that no site which trains looked for: the models of the setting know nothing of them."""
    unknown = unknown_labels(told.labels, [names for name, names in told.annotated.items() if name in setting.sites])
    text = f"{setting.title}: no site that trains annotates {', '.join(unknown)}: not drawn and not scored (not_annotated)."
    if unknown and text not in ledger.warnings:  # once for all seeds
        ledger.warnings.append(text)
    return unknown


def _note_own_heads(setting: Setting, sharing: Sharing, record: Record) -> None:
    """Where some labels are unknown somewhere: write down for predictions at which sites the model knows that site's only."""
    if (record.folder / "annotated.json").is_file():
        known = record.read_json("own_heads.json") or {}
        record.write_json("own_heads.json", known | {setting.title: sorted(sharing.own_heads)})


def _keep(record: Record, name: str, text: str) -> None:
    """Write the file. Once a round is complete, it must come out as it was.

    Raises:
        DataError: it does not.
    """
    path = record.folder / name
    if record.begun and path.is_file() and path.read_text(encoding="utf-8") != text:
        raise DataError(
            f"{path} would change. The run began with other data, fewer or more sites that answered, or other versions, and "
            "models that began with one plan cannot go on with another. Put it back as it was, or give another --out."
        )
    record.write_text(name, text)


def prepare_sites(
    setting: Setting, engine: Engine, record: Record, plans: Plans, ledger: Ledger
) -> dict[str, Prepared]:
    """Have the sites preprocess; what each told that is ready."""
    study = setting.study
    request = plans.request(study)
    pools = setting.is_base and "centralized" in study.protocol.compare
    roles = {"site", "test"} | ({"pooled"} if pools else set())
    there = [name for name, site in engine.sites.items() if site.role in roles]
    asked = {name: plans.request(study, name) if name in plans.by_site else request for name in there}
    if is_vertical(study):
        asked = held_requests(setting, plans, asked)
    ledger.warnings += [*site_level(setting.title, study.filters), *lapses(setting.title, study.defences)]
    ready: dict[str, Prepared] = {}
    for name, reply in _must(engine, record, asked, study, ledger):
        if isinstance(reply, Prepared):
            ready[name] = reply
            told = (*reply.warnings, doubts_of(study.local_update, reply.n_patients if reply.n_training else 0))
            ledger.warnings += [f"{name}: {text}" for text in told if text]
            if record.is_elsewhere(name):
                ledger.warnings += [
                    f"{name}: {e.count} case{'s' * (e.count != 1)} set aside ({e.reason})." for e in reply.excluded
                ]
                ledger.excluded += set_aside(name, reply.excluded)
    if is_vertical(study):
        must_lie_alike(ready)
    return ready


def agree_on_tensors(
    setting: Setting, engine: Engine, record: Record, plans: Plans, cases: Mapping[str, int], ledger: Ledger
) -> Plans:
    """Where sites have plans of their own: ask what tensors each network has, match them, and tell each site what it shares.

    Raises:
        EngineError: too few sites answered.
        StudyError: no two sites have a tensor in common.
    """
    study = setting.study
    asked = dict.fromkeys(cases, Describe())
    told = {n: r for n, r in _must(engine, record, asked, study, ledger) if isinstance(r, Described)}
    sizes = {name: reply.n_values for name, reply in told.items()}
    sharing = share_own_plans(study, plans, {name: table_of(reply) for name, reply in told.items()}, sizes)
    for site in told:
        if not sharing.names(site):
            ledger.warnings.append(f"{site} has no tensor in common with another site: it trains by itself.")
    shares = {site: Share(tuple(sorted(sharing.names(site)))) for site in told}
    for _ in _must(engine, record, shares, study, ledger):
        pass
    _note_own_heads(setting, sharing, record)
    return replace(plans, sharing=sharing)


def _must(
    engine: Engine, record: Record, requests: Mapping[str, Request], study: Study, ledger: Ledger
) -> Iterator[tuple[str, Reply]]:
    """The replies; a site that failed is out, unless its data are unusable or too few sites are left, which stops the run."""
    replies = dict(ask(engine, requests))
    for name, reply in sorted(replies.items(), key=lambda item: list(requests).index(item[0])):
        if not isinstance(reply, Failure):
            yield name, reply
            continue
        text = failure_line(record, name, reply)
        if isinstance(reply, SiteError) and reply.exception in ("DataError", "StudyError"):
            raise DataError(text)
        if name not in study.sites:
            raise EngineError(text)
        ledger.problems.append(text)
    left = [name for name in requests if name in study.sites and not isinstance(replies[name], Failure)]
    if len(left) < (study.protocol.min_sites or 1):
        raise EngineError(
            f"{len(left)} sites are ready ({'; '.join(ledger.problems)}). At least {study.protocol.min_sites} must be "
            "([protocol] min_sites). Mend the sites and start again."
        )


def failure_line(record: Record, site: str, failure: Failure) -> str:
    """One line about a failure, with the site's own words where this is a simulation."""
    words = record.site_error(site, failure.reference) if isinstance(failure, SiteError) else None
    return f"{site}: {describe(failure)}" + (f": {words}" if words else "")
