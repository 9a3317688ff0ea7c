"""Before training: the sites' fingerprints become one plan, and every site prepares its cases by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from concilium.data.draws import drawn_from
from concilium.data.fingerprint import merge, to_json
from concilium.data.labels import Labels, n_heads, to_nnunet
from concilium.data.matching import Names, Space, agree, reorder
from concilium.data.plan import make_plans, open_plan
from concilium.engines import Engine, ask
from concilium.errors import DataError, EngineError
from concilium.messages import (
    Examine,
    Examined,
    Failure,
    Prepare,
    Prepared,
    Reply,
    Request,
    SiteError,
    Tensors,
    describe,
)
from concilium.networks import Stages, make_network
from concilium.record import Record
from concilium.study import Study, training_of


@dataclass
class Ledger:
    """What went wrong on the way; a run with an entry ends with exit code 4."""

    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plans:
    """What the sites told, and the plan that was made of it."""

    text: str
    channels: tuple[str, ...]
    labels: Labels
    patch_size: tuple[int, ...]
    batch_size: int


def names_of(study: Study) -> dict[str, Names]:
    """What sites, and the test set, call otherwise than the study; between hospitals each site's own settings say it."""
    if study.engine.name == "flare":
        return {}
    tables = dict(study.sites) | ({"test": study.test} if study.test else {})
    return {name: Names(t.labels or {}, t.channels or {}) for name, t in tables.items() if t.labels or t.channels}


def plan_together(study: Study, engine: Engine, record: Record, ledger: Ledger) -> Plans:
    """Ask for fingerprints, merge them, plan once."""
    request = Examine(study.plan.exact_geometry, study.study.max_excluded)
    asked = {name: request for name, site in engine.sites.items() if site.role in ("site", "test")}
    told = {name: reply for name, reply in _must(engine, record, asked, study, ledger) if isinstance(reply, Examined)}
    told = {name: told[name] for name in (*study.sites, *told) if name in told}  # the first site's order and ids count
    space, how = agree({name: Space(reply.channels, reply.labels) for name, reply in told.items()})
    first = next(iter(told.values()))
    merged = merge([reorder(told[name].fingerprint, how[name]) for name in sorted(told) if name in study.sites])
    _keep(record, "fingerprint.json", to_json(merged))
    about = {
        "channel_names": {str(i): c for i, c in enumerate(space.channels)},
        **to_nnunet(space.labels),
        "file_ending": first.file_ending,
    }
    _keep(record, "dataset.json", json.dumps(about, indent=1) + "\n")
    p, t = study.plan, study.training
    base_features = cast("int | None", study.network.options.get("base_features"))
    text = make_plans(
        merged,
        channels=space.channels,
        labels=space.labels,
        file_ending=first.file_ending,
        configuration=p.configuration,
        planner=p.planner,
        memory_gb=p.memory_gb,
        base_features=base_features,
        batch_size=t.batch_size,
        patch_size=t.patch_size,
    )
    _keep(record, "plans.json", text)
    plan = open_plan(text, p.configuration)
    return Plans(text, space.channels, dict(space.labels), plan.patch_size, plan.batch_size)


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


def prepare_sites(study: Study, engine: Engine, record: Record, plans: Plans, ledger: Ledger) -> dict[str, int]:
    """Have the sites preprocess; the number of training cases of each that is ready."""
    v = study.validation
    request = Prepare(
        plans.text,
        study.plan.configuration,
        study.network,
        training_of(study),
        v.folds,
        v.fold,
        study.study.seed,
        study.study.max_excluded,
        plans.channels,
        plans.labels,
    )
    roles = {"site", "test"} | ({"pooled"} if "centralized" in study.protocol.compare else set())
    asked = {name: request for name, site in engine.sites.items() if site.role in roles}
    cases: dict[str, int] = {}
    for name, reply in _must(engine, record, asked, study, ledger):
        if isinstance(reply, Prepared):
            cases[name] = reply.n_training
            ledger.warnings += [f"{name}: {text}" for text in reply.warnings]
            if not record.case_names(name):  # a site elsewhere tells how many, not which
                ledger.warnings += [f"{name}: {e.count} cases set aside ({e.reason})." for e in reply.excluded]
    return cases


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


def network_of(study: Study, plans: Plans) -> Callable[..., Stages]:
    """What builds the study's network, with new weights each time; `deep_supervision` may be given in place of the study's."""
    return partial(
        make_network,
        study.network,
        n_channels=len(plans.channels),
        n_labels=n_heads(plans.labels),
        plan=open_plan(plans.text, study.plan.configuration).architecture,
        deep_supervision=study.training.deep_supervision,
    )


def initial_weights(study: Study, plans: Plans) -> Tensors:
    """The weights that every model of a run starts from: a function of the seed and the plan."""
    network = network_of(study, plans)
    with drawn_from(study.study.seed, "weights"):
        return network().state_dict()
