"""THE LINE: study -> data -> engine -> protocol -> record -> results. Read this file first.

A run examines the sites' data, plans once, prepares the sites, trains each model in turn, gives the finished model to every
site, and scores it there. After each round the sites write a snapshot and then the server writes the round, so that a killed run
goes on from the last complete round with `resume`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from concilium import catalog
from concilium.data.draws import drawn_from
from concilium.data.fingerprint import merge, to_json
from concilium.data.plan import make_plans, open_plan
from concilium.engines import Engine, ask
from concilium.errors import ConciliumError, DataError, EngineError
from concilium.messages import (
    Done,
    Evaluate,
    Evaluated,
    Examine,
    Examined,
    Failure,
    Forget,
    Keep,
    PlugIn,
    Prepare,
    Prepared,
    Reply,
    Request,
    Restore,
    SiteError,
    Snapshot,
    Tensors,
    describe,
)  # fmt: skip
from concilium.networks import as_stages
from concilium.protocols import WEIGHTS, Round, part, start_with
from concilium.record import Record
from concilium.results import METRICS, account, score_rows, write_results
from concilium.study import Study, training_of


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
class Outcome:
    """Where the run is, what came out, and the exit code: 0, or 4 where it is not what was asked."""

    folder: Path
    results: Mapping[str, Any]
    exit_code: int


@dataclass(frozen=True)
class Model:
    """One model to train: its protocol, and who takes how many steps a round."""

    name: str
    protocol: str
    steps: Mapping[str, int]
    stays: bool = False
    """Whether it stays at its site (and is a different one at each)."""


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
    labels: Mapping[str, int]
    file_ending: str
    batch_size: int


@dataclass(frozen=True)
class _Job:
    """What the steps of a run share."""

    study: Study
    engine: Engine
    record: Record
    plans: Plans
    watch: Callable[[Event], None]


def run(
    study: Study, out: Path, *, resume: bool = False, watch: Callable[[Event], None] = lambda event: None
) -> Outcome:
    """Run a study into the folder `out`.

    Raises:
        StudyError, DataError, EngineError, PrivacyError: the run could not be finished; what there is lies in `out`.
    """
    record = Record(out, study, resume=resume)
    ledger = Ledger()
    engine = _connect(study, record)
    finished: list[Mapping[str, Any]] = []
    try:
        watch(Event("stage", "Reading every case"))
        plans = _plan(study, engine, record, ledger, watch)
        watch(Event("stage", "Preprocessing"))
        cases = _prepare(study, engine, record, plans, ledger)
        job = _Job(study, engine, record, plans, watch)
        for model in _models(study, cases, plans.batch_size):
            finished.append(_train_and_score(job, model))
    except BaseException as e:
        ledger.problems.append(
            str(e) if isinstance(e, ConciliumError) else f"The run was stopped ({type(e).__name__})."
        )
        raise
    finally:
        engine.close()
        results = write_results(study, record, finished, warnings=ledger.warnings, problems=ledger.problems)
    return Outcome(record.folder, results, 0 if results["complete"] else 4)


def _connect(study: Study, record: Record) -> Engine:
    connect = catalog.load("engines", study.engine.name)
    e = study.engine
    engine = connect(
        sites={name: site.data for name, site in study.sites.items()},
        test=study.test.data if study.test else None,
        folder=record.folder,
        run=record.run_id,
        workers=e.workers,
        threads=e.threads,
        device=e.device,
        cache=e.cache,
    )
    return cast(Engine, engine)


# ------------------------------------------------------------------------------------------------- fingerprint and plan


def _plan(study: Study, engine: Engine, record: Record, ledger: Ledger, watch: Callable[[Event], None]) -> Plans:
    """Ask for fingerprints, merge them, plan once."""
    request = Examine(study.plan.exact_geometry, study.study.max_excluded)
    asked = {name: request for name, site in engine.sites.items() if site.role in ("site", "test")}
    told = {name: reply for name, reply in _must(engine, record, asked, study, ledger) if isinstance(reply, Examined)}
    first = next(reply for name, reply in told.items() if name in study.sites)
    for name, reply in told.items():
        if (reply.channels, dict(reply.labels)) != (first.channels, dict(first.labels)):
            raise DataError(
                f"{name} has channels {list(reply.channels)} and labels {dict(reply.labels)}. "
                f"Expected {list(first.channels)} and {dict(first.labels)}, as at the other sites. Make their dataset.json agree."
            )
    merged = merge([reply.fingerprint for name, reply in sorted(told.items()) if name in study.sites])
    record.write_text("fingerprint.json", to_json(merged))
    about = {
        "channel_names": {str(i): c for i, c in enumerate(first.channels)},
        "labels": dict(first.labels),
        "file_ending": first.file_ending,
    }
    record.write_json("dataset.json", about)
    p, t = study.plan, study.training
    base_features = cast("int | None", study.network.options.get("base_features"))
    text = make_plans(
        merged,
        channels=first.channels,
        labels=first.labels,
        file_ending=first.file_ending,
        configuration=p.configuration,
        planner=p.planner,
        memory_gb=p.memory_gb,
        base_features=base_features,
        batch_size=t.batch_size,
        patch_size=t.patch_size,
    )
    record.write_text("plans.json", text)
    plan = open_plan(text, p.configuration)
    watch(
        Event(
            "stage", f"Planned {p.configuration}: patch {'×'.join(map(str, plan.patch_size))}, batch {plan.batch_size}"
        )
    )
    return Plans(text, first.channels, dict(first.labels), first.file_ending, plan.batch_size)


def _prepare(study: Study, engine: Engine, record: Record, plans: Plans, ledger: Ledger) -> dict[str, int]:
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
    )
    roles = {"site", "test"} | ({"pooled"} if "centralized" in study.protocol.compare else set())
    asked = {name: request for name, site in engine.sites.items() if site.role in roles}
    cases: dict[str, int] = {}
    for name, reply in _must(engine, record, asked, study, ledger):
        if isinstance(reply, Prepared):
            cases[name] = reply.n_training
            ledger.warnings += [f"{name}: {text}" for text in reply.warnings]
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
        text = _failed(record, name, reply)
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


def _failed(record: Record, site: str, failure: Failure) -> str:
    """One line about a failure, with the site's own words where this is a simulation."""
    words = record.site_error(site, failure.reference) if isinstance(failure, SiteError) else None
    return f"{site}: {describe(failure)}" + (f": {words}" if words else "")


# ------------------------------------------------------------------------------------------------------------ training


def _models(study: Study, cases: Mapping[str, int], batch_size: int) -> list[Model]:
    """The study's own model, then the baselines: `centralized` with one site's steps, `centralized_long` with those of all."""
    p = study.protocol

    def n_steps(name: str) -> int:
        return p.steps or max(1, -(-int(cases[name] * cast(float, p.epochs)) // batch_size))

    steps = {name: n_steps(name) for name in study.sites if name in cases}
    models = [Model(p.name, p.name, steps, stays=p.name == "local")]
    if "local" in p.compare and p.name != "local":
        models.append(Model("local", "local", steps, stays=True))
    if "centralized" in p.compare:
        models.append(Model("centralized", "centralized", {"pooled": max(steps.values())}))
        models.append(Model("centralized_long", "centralized", {"pooled": sum(steps.values())}))
    return models


def _train_and_score(job: _Job, model: Model) -> Mapping[str, Any]:
    """Train one model and score it at every site; on resumption, take what is there."""
    name = f"checkpoints/{model.name}/finished.json"
    finished: dict[str, Any] | None = job.record.read_json(name)
    if finished is None:
        ledger = Ledger()
        last = _train(job, model, ledger)
        _give(job, model, last, ledger)
        cases = _score(job, model, ledger)
        about = account(
            model.name, model.protocol, list(model.steps), job.record.rounds(model.name), job.plans.batch_size
        )
        finished = {"model": about, "cases": cases, "problems": ledger.problems, "warnings": ledger.warnings}
        job.record.write_json(name, finished)
        _tell(job.engine, dict.fromkeys(model.steps, Forget(model.name)))
    return finished


def _train(job: _Job, model: Model, ledger: Ledger) -> Round:
    """The protocol's loop, with everything that happens after each round."""
    study, engine, record = job.study, job.engine, job.record
    p = study.protocol
    done = record.last_round(model.name) or start_with(initial_weights(study, job.plans))
    for site, failure in _tell(engine, dict.fromkeys(model.steps, Restore(model.name, done.number))).items():
        ledger.problems.append(f"{model.name}, going back to round {done.number}: {_failed(record, site, failure)}")
    if done.number:
        job.watch(Event("stage", f"{model.name}: going on after round {done.number}", model=model.name))
    rounds = catalog.load("protocols", model.protocol)(
        engine,
        done,
        model=model.name,
        collect=partial(catalog.load("collect", study.collect.name), **study.collect.options),
        rule=partial(catalog.load("aggregation", study.aggregation.name), **study.aggregation.options),
        rounds=p.rounds,
        steps=model.steps,
        min_sites=min(p.min_sites or 1, len(model.steps)),
        deadline_s=p.round_seconds,
    )
    began = time.monotonic()
    for done in rounds:
        unsaved = _tell(engine, dict.fromkeys(model.steps, Snapshot(model.name, done.number)))
        done = replace(done, failures={**unsaved, **done.failures})
        record.commit(model.name, done, seconds=time.monotonic() - began)
        began = time.monotonic()
        losses = [a.loss for a in done.answers.values()]
        loss = sum(losses) / len(losses) if losses else None
        job.watch(Event("round", model=model.name, round=done.number, rounds=p.rounds, loss=loss))
        for site, failure in done.failures.items():
            job.watch(Event("warning", f"{model.name}, round {done.number}: {_failed(record, site, failure)}"))
    for line in record.rounds(model.name):
        failed = line["failures"].items()
        ledger.problems += [f"{model.name}, round {line['round']}: {site}: {f['text']}" for site, f in failed]
    return done


def initial_weights(study: Study, plans: Plans) -> Tensors:
    """The weights that every model of a run starts from: a function of the seed and the plan."""
    build = catalog.load("networks", study.network.name)
    options = dict(study.network.options) | {"deep_supervision": study.training.deep_supervision}
    plan = open_plan(plans.text, study.plan.configuration)
    with drawn_from(study.study.seed, "weights"):
        network = build(n_channels=len(plans.channels), n_labels=len(plans.labels), plan=plan.architecture, **options)
    return as_stages(cast(nn.Module, network)).state_dict()


def _tell(engine: Engine, requests: Mapping[str, Request]) -> dict[str, Failure]:
    """Send what is answered by `Done`; the failures."""
    wrong = SiteError("ContractError", "wrong_reply", "")
    return {s: r if isinstance(r, Failure) else wrong for s, r in ask(engine, requests) if not isinstance(r, Done)}


# ------------------------------------------------------------------------------------------------- results of one model


def _give(job: _Job, model: Model, last: Round, ledger: Ledger) -> None:
    """The final push: server and sites keep the same tensors. A model that stays is kept by its site alone."""
    if model.stays:
        requests = dict.fromkeys(model.steps, Keep(model.name, {}))
    else:
        weights = part(last.tensors, WEIGHTS)
        job.record.save_weights(model.name, weights)
        keepers = [name for name, site in job.engine.sites.items() if site.role in ("site", "test")]
        requests = dict.fromkeys(keepers, Keep(model.name, weights))
    for site, failure in _tell(job.engine, requests).items():
        ledger.problems.append(f"{model.name}, final push: {_failed(job.record, site, failure)}")


def _score(job: _Job, model: Model, ledger: Ledger) -> list[dict[str, Any]]:
    """Scores at every site's validation cases and on the test set; a model that stays is scored at its own site only."""
    study, record = job.study, job.record
    metrics = tuple(PlugIn(m, {"tolerance": study.validation.tolerance} if m == "nsd" else {}) for m in METRICS)
    subsets = [("validation", list(model.steps) if model.stays else list(study.sites))]
    if study.test is not None:
        subsets.append(("test", list(model.steps) if model.stays else ["test"]))
    cases: list[dict[str, Any]] = []
    for subset, sites in subsets:
        job.watch(Event("stage", f"{model.name}: scoring the {subset} cases", model=model.name))
        for site, reply in ask(job.engine, dict.fromkeys(sites, Evaluate(model.name, subset, metrics))):
            where = f"{model.name}, {subset} at {site}"
            if not isinstance(reply, Evaluated):
                failure = reply if isinstance(reply, Failure) else SiteError("ContractError", "wrong_reply", "")
                ledger.problems.append(f"{where}: {_failed(record, site, failure)}")
                continue
            names = record.case_names("test" if subset == "test" else site)
            cases += score_rows(f"{model.name}:{site}" if model.stays else model.name, site, subset, reply, names)
            n_scored, n_not = len({s.case for s in reply.scores}), sum(e.count for e in reply.excluded)
            if n_not:
                text = f"{where}: {n_not} of {n_scored + n_not} cases not scored ({', '.join(e.reason for e in reply.excluded)})"
                too_many = n_not > study.study.max_excluded * (n_scored + n_not)
                (ledger.problems if too_many else ledger.warnings).append(text)
    job.watch(Event("scored", model=model.name))
    return cases
