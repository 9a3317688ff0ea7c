"""THE LINE: study -> data -> engine -> protocol -> record -> results. Read this file first.

A run examines the sites' data, plans once, prepares the sites, trains each model in turn, gives the finished model to every
site, and scores it there. After each round the sites write a snapshot and then the server writes the round, so that a killed run
goes on from the last complete round with `resume`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from concilium.statistics import summarize
from concilium.study import Study, training_of

METRICS = ("dice", "iou", "hd95", "nsd")
SCHEMA_VERSION = 1


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
    results: list[dict[str, Any]] = []
    try:
        watch(Event("stage", "Reading every case"))
        plans = _plan(study, engine, record, ledger, watch)
        watch(Event("stage", "Preprocessing"))
        cases = _prepare(study, engine, record, plans, ledger)
        for model in _models(study, cases, plans.batch_size):
            results.append(_train_and_score(study, model, engine, record, plans, ledger, watch))
    except ConciliumError as e:
        ledger.problems.append(str(e))
        raise
    finally:
        engine.close()
        outcome = _finish(study, record, results, ledger)
    return outcome


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


def _train_and_score(
    study: Study,
    model: Model,
    engine: Engine,
    record: Record,
    plans: Plans,
    ledger: Ledger,
    watch: Callable[[Event], None],
) -> dict[str, Any]:
    """Train one model and score it at every site; on resumption, take what is there."""
    name = f"checkpoints/{model.name}/finished.json"
    finished: dict[str, Any] | None = record.read_json(name)
    if finished is None:
        last = _train(study, model, engine, record, plans, ledger, watch)
        given = Ledger()
        _give(model, last, engine, record, given)
        scores = _score(study, model, engine, record, given, watch)
        finished = {"model": _account(study, model, record, plans), "cases": scores, "problems": given.problems}
        record.write_json(name, finished)
        _tell(engine, {site: Snapshot(model.name, last.number) for site in model.steps})
    for line in record.rounds(model.name):
        ledger.problems += [
            f"{model.name}, round {line['round']}: {s}: {f['text']}" for s, f in line["failures"].items()
        ]
    ledger.problems += finished["problems"]
    return finished


def _train(
    study: Study,
    model: Model,
    engine: Engine,
    record: Record,
    plans: Plans,
    ledger: Ledger,
    watch: Callable[[Event], None],
) -> Round:
    """The protocol's loop, with everything that happens after each round."""
    p = study.protocol
    done = record.last_round(model.name) or start_with(initial_weights(study, plans))
    _tell(engine, {site: Restore(model.name, done.number) for site in model.steps}, required=True)
    if done.number:
        watch(Event("stage", f"{model.name}: going on after round {done.number}", model=model.name))
    protocol = catalog.load("protocols", model.protocol)
    rounds = protocol(
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
        _tell(engine, {site: Snapshot(model.name, done.number) for site in model.steps})
        record.commit(model.name, done, seconds=time.monotonic() - began)
        began = time.monotonic()
        losses = [a.loss for a in done.answers.values()]
        loss = sum(losses) / len(losses) if losses else None
        watch(Event("round", model=model.name, round=done.number, rounds=p.rounds, loss=loss))
        for site, failure in done.failures.items():
            watch(Event("warning", f"{model.name}, round {done.number}: {_failed(record, site, failure)}"))
    return done


def initial_weights(study: Study, plans: Plans) -> Tensors:
    """The weights that every model of a run starts from: a function of the seed and the plan."""
    build = catalog.load("networks", study.network.name)
    options = dict(study.network.options) | {"deep_supervision": study.training.deep_supervision}
    plan = open_plan(plans.text, study.plan.configuration)
    with drawn_from(study.study.seed, "weights"):
        network = build(n_channels=len(plans.channels), n_labels=len(plans.labels), plan=plan.architecture, **options)
    return as_stages(cast(nn.Module, network)).state_dict()


def _tell(engine: Engine, requests: Mapping[str, Request], *, required: bool = False) -> dict[str, Failure]:
    """Send what is answered by `Done`; the failures.

    Raises:
        EngineError: `required`, and a site failed.
    """
    wrong = SiteError("ContractError", "wrong_reply", "")
    failures = {s: r if isinstance(r, Failure) else wrong for s, r in ask(engine, requests) if not isinstance(r, Done)}
    if failures and required:
        raise EngineError(
            "; ".join(f"{s}: {describe(f)}" for s, f in failures.items())
            + ". All must answer. Mend the sites, then --resume."
        )
    return failures


# ------------------------------------------------------------------------------------------------- results of one model


def _give(model: Model, last: Round, engine: Engine, record: Record, given: Ledger) -> None:
    """The final push: server and sites keep the same tensors. A model that stays is kept by its site alone."""
    if model.stays:
        requests = {site: Keep(model.name, {}) for site in model.steps}
    else:
        weights = part(last.tensors, WEIGHTS)
        record.save_weights(model.name, weights)
        shared = Keep(model.name, weights)
        requests = {name: shared for name, site in engine.sites.items() if site.role in ("site", "test")}
    for site, failure in _tell(engine, requests).items():
        given.problems.append(f"{model.name}, final push: {_failed(record, site, failure)}")


def _score(
    study: Study, model: Model, engine: Engine, record: Record, given: Ledger, watch: Callable[[Event], None]
) -> list[dict[str, Any]]:
    """Scores at every site's validation cases and on the test set; a model that stays is scored at its own site only."""
    metrics = tuple(PlugIn(m, {"tolerance": study.validation.tolerance} if m == "nsd" else {}) for m in METRICS)
    subsets = [("validation", [s for s in study.sites if not model.stays or s in model.steps])]
    if study.test is not None:
        subsets.append(("test", list(model.steps) if model.stays else ["test"]))
    cases: list[dict[str, Any]] = []
    for subset, sites in subsets:
        watch(Event("stage", f"{model.name}: scoring the {subset} cases", model=model.name))
        request = Evaluate(model.name, subset, metrics)
        for site, reply in ask(engine, dict.fromkeys(sites, request)):
            if isinstance(reply, Evaluated):
                cases += _rows(f"{model.name}:{site}" if model.stays else model.name, site, subset, reply, record)
                given.problems += [
                    f"{model.name}, {subset} at {site}: {e.count} cases not scored ({e.reason})" for e in reply.excluded
                ]
            else:
                failure = reply if isinstance(reply, Failure) else SiteError("ContractError", "wrong_reply", "")
                given.problems.append(f"{model.name}, {subset} at {site}: {_failed(record, site, failure)}")
    watch(Event("scored", model=model.name))
    return cases


def _rows(model: str, site: str, subset: str, reply: Evaluated, record: Record) -> list[dict[str, Any]]:
    """Scores as they stand in results.json; in a simulation with the names that the site noted for itself."""
    where = "test" if subset == "test" else site
    names = record.case_names(where)
    rows = []
    for s in reply.scores:
        noted = names.get(s.case, {"case": str(s.case), "patient": str(s.patient)})
        row = {"model": model, "site": where, "subset": subset, **noted, "label": s.label}
        row |= {metric: s.values.get(metric) for metric in METRICS}
        row |= {
            "unit": s.unit,
            "reference_volume": s.reference_volume,
            "prediction_volume": s.prediction_volume,
            "status": s.status,
        }
        rows.append(row)
    return rows


def _account(study: Study, model: Model, record: Record, plans: Plans) -> dict[str, Any]:
    """What a model cost."""
    lines = record.rounds(model.name)
    per_site = {
        site: {
            key: sum(line["sites"][site][key] for line in lines if site in line["sites"])
            for key in ("n_steps", "seconds", "bytes_down", "bytes_up")
        }
        for site in model.steps
    }
    n_steps = [s["n_steps"] for s in per_site.values()]
    return {
        "name": model.name,
        "protocol": model.protocol,
        "parameters": sum(t.numel() for t in initial_weights(study, plans).values()),
        "rounds": len(lines),
        "updates": max(n_steps),
        "patches": sum(n_steps) * plans.batch_size,
        "batch_size": plans.batch_size,
        "seconds": round(sum(line["seconds"] for line in lines), 3),
        "sites": per_site,
    }


# ------------------------------------------------------------------------------------------------------ results of all


def _finish(study: Study, record: Record, finished: Sequence[Mapping[str, Any]], ledger: Ledger) -> Outcome:
    """Write results.json from what there is."""
    cases = [case for f in finished for case in f["cases"]]
    excluded = record.excluded([*study.sites, "test"])
    if not study.test:
        ledger.warnings.append("No test set: figures on validation cases are those of one fold.")
    results = {
        "version": SCHEMA_VERSION,
        "study": study.study.name,
        "seed": study.study.seed,
        "complete": not ledger.problems,
        "models": [f["model"] for f in finished],
        "cases": cases,
        "summary": summarize(cases, METRICS, seed=study.study.seed),
        "comparisons": [],
        "excluded": excluded,
        "warnings": ledger.warnings,
        "problems": ledger.problems,
    }
    record.write_json("results.json", results)
    return Outcome(record.folder, results, 4 if ledger.problems else 0)
