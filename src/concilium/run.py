"""THE LINE: study -> data -> engine -> protocol -> record -> results. Read this file first.

A run examines the sites' data, plans once, prepares the sites, trains each model in turn, gives the finished model to every
site, and scores it there. After each round the sites write a snapshot and then the server writes the round, so that a killed run
goes on from the last complete round with `resume`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from concilium import catalog
from concilium.engines import Engine, ask
from concilium.errors import ConciliumError
from concilium.messages import (
    Done,
    Evaluate,
    Evaluated,
    Failure,
    Forget,
    Keep,
    PlugIn,
    Request,
    Restore,
    SiteError,
    SiteLost,
    Snapshot,
    as_failure,
)
from concilium.optimization import device_named
from concilium.preparation import Ledger, Plans, failure_line, initial_weights, network_of, plan_together, prepare_sites
from concilium.protocols import WEIGHTS, Round, part, start_with
from concilium.record import Record
from concilium.results import METRICS, account, score_rows, write_results
from concilium.study import Study, training_of

NOT_READY = SiteError("EngineError", "not_prepared", "")
"""A site of the study that failed before training began."""


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


@dataclass(frozen=True)
class _Job:
    """What the steps of a run share."""

    study: Study
    engine: Engine
    record: Record
    plans: Plans
    watch: Callable[[Event], None]


def run(
    study: Study,
    out: Path,
    *,
    resume: bool = False,
    watch: Callable[[Event], None] = lambda event: None,
    connect: Callable[..., Engine] | None = None,
) -> Outcome:
    """Run a study into the folder `out`; `connect` in place of the study's engine gets what `catalog.SUPPLIED` lists.

    Raises:
        StudyError, DataError, EngineError, PrivacyError: the run could not be finished; what there is lies in `out`.
    """
    if connect is None and study.engine.name == "flare":  # before there is a folder that says a run began
        catalog.load("engines", "flare")(sites=study.sites, test=None, folder=out, run="")
    record = Record(out, study, resume=resume)
    torch.set_num_threads(study.engine.threads)  # a protocol may compute at the server
    ledger = Ledger(warnings=record.changes)
    engine = _connect(study, record, connect or catalog.load("engines", study.engine.name))
    finished: list[Mapping[str, Any]] = []
    try:
        watch(Event("stage", "Reading every case"))
        plans = plan_together(study, engine, record, ledger)
        patch = "×".join(map(str, plans.patch_size))
        watch(
            Event(
                "stage", f"Planned {study.plan.configuration}: patch {patch}, batch {plans.batch_size}. Preprocessing"
            )
        )
        cases = prepare_sites(study, engine, record, plans, ledger)
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
        record.close()
    return Outcome(record.folder, results, 0 if results["complete"] else 4)


def _connect(study: Study, record: Record, connect: Callable[..., Engine]) -> Engine:
    e = study.engine
    return connect(
        sites={name: site.data for name, site in study.sites.items()},
        test=study.test.data if study.test else None,
        folder=record.folder,
        run=record.run_id,
        workers=e.workers,
        threads=e.threads,
        device=e.device,
        cache=e.cache,
        pictures=e.pictures,
    )


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
    """Train one model and score it at every site; on resumption, take what is there, and score again what failed to be."""
    name = f"checkpoints/{model.name}/finished.json"
    finished: dict[str, Any] | None = job.record.read_json(name)
    if finished is None or finished["again"]:
        training, scoring = Ledger(), Ledger()
        last = _train(job, model, training)
        _give(job, model, last, scoring)
        cases = _score(job, model, scoring)
        rounds, batch_size = job.record.rounds(model.name), job.plans.batch_size
        about = account(model.name, model.protocol, list(model.steps), rounds, batch_size)
        about["parameters"] = sum(t.numel() for t in initial_weights(job.study, job.plans).values())
        problems, warnings = training.problems + scoring.problems, training.warnings + scoring.warnings
        again = bool(scoring.problems)
        finished = {"model": about, "cases": cases, "problems": problems, "warnings": warnings, "again": again}
        job.record.write_json(name, finished)
    if not finished["again"]:  # told once more on resumption: a kill may have come between
        _tell(job.engine, dict.fromkeys(model.steps, Forget(model.name)))
    return finished


def _train(job: _Job, model: Model, ledger: Ledger) -> Round:
    """The protocol's loop, with everything that happens after each round."""
    study, engine, record = job.study, job.engine, job.record
    p = study.protocol
    done = record.last_round(model.name) or start_with(initial_weights(study, job.plans))
    for site, failure in _tell(engine, dict.fromkeys(model.steps, Restore(model.name, done.number))).items():
        ledger.problems.append(
            f"{model.name}, going back to round {done.number}: {failure_line(record, site, failure)}"
        )
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
        deadline_s=None if model.protocol == "centralized" else p.round_seconds,  # a site's, and the pool is none
        network=network_of(study, job.plans),
        training=training_of(study),
        seed=study.study.seed,
        device=device_named(study.engine.device),
        **(p.options if model.protocol == p.name else {}),
    )
    began = time.monotonic()
    missing = [site for site in study.sites if site not in model.steps and model.protocol != "centralized"]
    for done in rounds:
        # a site may have trained although its answer came late or could not be used: it goes back to where it was
        failed = [site for site, failure in done.failures.items() if not isinstance(failure, SiteLost)]
        unsaved = _tell(engine, dict.fromkeys(failed, Restore(model.name, done.number - 1)), p.round_seconds)
        there = [site for site in model.steps if site not in unsaved]
        unsaved |= _tell(engine, dict.fromkeys(there, Snapshot(model.name, done.number)), p.round_seconds)
        done = replace(done, failures={**dict.fromkeys(missing, NOT_READY), **unsaved, **done.failures})
        record.commit(model.name, done, seconds=time.monotonic() - began)
        losses = [a.loss for a in done.answers.values()]
        loss = sum(losses) / len(losses) if losses else None
        job.watch(Event("round", model=model.name, round=done.number, rounds=p.rounds, loss=loss))
        for site, failure in done.failures.items():
            job.watch(Event("warning", f"{model.name}, round {done.number}: {failure_line(record, site, failure)}"))
        began = time.monotonic()
    for line in record.rounds(model.name):
        failed = line["failures"].items()
        ledger.problems += [f"{model.name}, round {line['round']}: {site}: {f['text']}" for site, f in failed]
    return done


def _tell(engine: Engine, requests: Mapping[str, Request], deadline_s: float | None = None) -> dict[str, Failure]:
    """Send what is answered by `Done`; the failures."""
    replies = ask(engine, requests, deadline_s=deadline_s)
    return {site: as_failure(reply) for site, reply in replies if not isinstance(reply, Done)}


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
        ledger.problems.append(f"{model.name}, final push: {failure_line(job.record, site, failure)}")


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
                ledger.problems.append(f"{where}: {failure_line(record, site, as_failure(reply))}")
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
