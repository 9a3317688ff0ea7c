"""THE LINE: study -> data -> engine -> protocol -> record -> results. Read this file first.

A run examines the sites' data and plans once. For each variant, seed and fold (`schedule.py`) it prepares the sites
(`preparation.py`), trains each model in turn, gives the finished model to every site and scores it there (`scoring.py`). After
each round the sites write a snapshot and then the server writes the round, so that a killed run goes on from the last complete
round with `resume`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from concilium import catalog
from concilium.aggregation import must_see_updates, weight_of
from concilium.beginning import begin_with, start_weights
from concilium.costs import note_cost
from concilium.engines import Engine
from concilium.errors import ConciliumError
from concilium.giving import for_elsewhere, forget_best, give, tell
from concilium.messages import Forget, Restore, SiteError, SiteLost, Snapshot
from concilium.optimization import device_named
from concilium.planning import batch_size_of, network_of
from concilium.preparation import (
    Event,
    Ledger,
    Work,
    agree_on_tensors,
    failure_line,
    on_folders,
    prepare_sites,
)
from concilium.protocols import Round, copy_traffic, start_with
from concilium.readiness import planned
from concilium.record import Record
from concilium.results import write_results
from concilium.schedule import Model, Setting, ensemble_key, models
from concilium.scoring import account_of, note_rounds, score, watch_validation
from concilium.segmenting import segment_new, segments_new
from concilium.sharing import EVERYTHING
from concilium.start_from import weights_at_sites
from concilium.study import Study, divide, of_sites, training_of
from concilium.together import pool_of

NOT_READY = SiteError("EngineError", "not_prepared", "")
"""A site of the study that failed before training began."""


@dataclass(frozen=True)
class Outcome:
    """Where the run is, what came out, and the exit code: 0, or 4 where it is not what was asked."""

    folder: Path
    results: Mapping[str, Any]
    exit_code: int


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
    layout = divide(study, out)  # before too: what the data do not allow is mended in the study
    record = Record(out, study, resume=resume)
    torch.set_num_threads(study.engine.threads)  # a protocol may compute at the server
    ledger = Ledger(warnings=[*record.changes, *layout.notes])
    if layout.parts:
        watch(Event("stage", f"Writing {layout.summary}"))
        study = on_folders(study, layout, out)
    engine = _connect(study, record, connect or catalog.load("engines", study.engine.name))
    finished: list[Mapping[str, Any]] = []
    try:
        watch(Event("stage", "Reading every case"))
        every = planned(study, engine, record, ledger)
        for note in dict.fromkeys(plans.start.note for _, plans in every if plans.start is not None):
            watch(Event("stage", note))
        for members, plans in every:
            finished += _train_members(Work(study, engine, record, plans, watch), members, ledger)
    except BaseException as e:
        known = isinstance(e, ConciliumError)
        ledger.problems.append(str(e) if known else f"The run was stopped ({type(e).__name__}).")
        raise
    finally:
        engine.close()
        results = write_results(study, record, finished, **asdict(ledger))
        record.close()
    return Outcome(record.folder, results, 0 if results["complete"] else 4)


def _connect(study: Study, record: Record, connect: Callable[..., Engine]) -> Engine:
    e, test = study.engine, study.test
    return connect(
        sites={name: site.data for name, site in study.sites.items()},
        test=test and test.data,
        folder=record.folder,
        run=record.run_id,
        workers=e.workers,
        threads=e.threads,
        device=e.device,
        cache=e.cache,
        pictures=e.pictures,
        **of_sites(study),
        **pool_of(study, record.folder) | weights_at_sites(study),
    )


# ------------------------------------------------------------------------------------------------------------ training


def _train_members(work: Work, members: Sequence[Setting], ledger: Ledger) -> Iterator[Mapping[str, Any]]:
    """Train and score the models of settings that differ by fold only, then the ensembles that these make up."""
    made: dict[str, list[Model]] = {}
    for setting in members:
        ready, found = _prepared_models(work, setting, ledger)
        for model in found:
            made.setdefault(model.name, []).append(model)
            yield _train_and_score(ready, model)
            segment_new(ready, model, ledger)
    if len(members) > 1:
        for together in made.values():
            yield _score_together(work, together)


def _prepared_models(work: Work, setting: Setting, ledger: Ledger) -> tuple[Work, Sequence[Model]]:
    """Have the sites get ready for a setting: its models. Nothing is asked of them where a stopped run had finished all."""
    record, name = work.record, f"checkpoints/{setting.title}{setting.suffix}.json"
    batch_size = partial(batch_size_of, setting.study, work.plans)
    ready = record.read_json(name)
    own = models(setting, ready["cases"], batch_size) if ready else ()
    done = ready and all(_finished(record, m.key) and (not m.member or _finished(record, ensemble_key(m))) for m in own)
    if not done or segments_new(setting.study):
        p, name_of = work.plans, setting.title + setting.suffix
        patch = "×".join(map(str, p.patch_size))
        what = f"{name_of}: patch {patch}, batch {p.batch_size} ({setting.study.plan.configuration})"
        each = f", and by site: {', '.join(p.by_site)}" if p.by_site else ""
        work.watch(Event("stage", f"Planned {what}{each}. Preprocessing"))
        prepared = Ledger()
        told = prepare_sites(setting, work.engine, record, p, prepared)
        cases = {site: reply.n_training for site, reply in told.items()}
        if p.by_site:
            there = {site: n for site, n in cases.items() if site in p.by_site}
            work = replace(work, plans=agree_on_tensors(setting, work.engine, record, p, there, prepared))
        ready = {"cases": cases, "patients": {site: reply.n_patients for site, reply in told.items()}} | asdict(
            prepared
        )
        record.write_json(name, ready)
        ledger.warnings += note_cost(setting, work.plans, cases, record)
    ledger.warnings += ready["warnings"]
    ledger.problems += ready["problems"]
    ledger.excluded += ready.get("excluded", ())  # a run that an earlier version began has none
    return work, list(models(setting, ready["cases"], batch_size))


def _finished(record: Record, key: str) -> dict[str, Any] | None:
    """What a model's training and scoring left; `None` if it is not done, or to be scored again."""
    finished: dict[str, Any] | None = record.read_json(f"checkpoints/{key}/finished.json")
    return None if finished is None or finished["again"] else finished


def _train_and_score(work: Work, model: Model) -> Mapping[str, Any]:
    """Train one model and score it at every site; on resumption, take what is there, and score again what failed to be.

    What sites train of their own beside a model comes right after it, and is only given and scored: it is trained by then.
    """
    finished = _finished(work.record, model.key)
    if finished is None:
        training, scoring = Ledger(), Ledger()
        last = None if model.beside else _train(work, model, training)
        before = copy_traffic(work.engine, model.steps)
        last = last or _made_beside(work, model, scoring)
        give(work, model, last, scoring)
        scored = score(work, [model], scoring)
        finished = {"model": account_of(work, model, before)} | asdict(scored) | _told(training, scoring)
        work.record.write_json(f"checkpoints/{model.key}/finished.json", finished)
    if _finished(work.record, model.key):
        forget_best(work, model)
    if all(_finished(work.record, key) for key in model.group):  # told again on resumption
        tell(work.engine, dict.fromkeys(model.steps, Forget(model.group[0])))
    return finished


def _made_beside(work: Work, model: Model, ledger: Ledger) -> Round:
    """What a model that was made beside another starts from: nothing where sites have it, else what they send for it."""
    trained = work.record.last_round(model.beside)
    return start_with({} if model.stays or trained is None else for_elsewhere(work, model, trained, ledger))


def _score_together(work: Work, members: Sequence[Model]) -> Mapping[str, Any]:
    """Score the ensemble that the members of a model make up, one per fold, on the test set."""
    key = ensemble_key(members[0])
    finished = _finished(work.record, key)
    if finished is None:
        scoring = Ledger()
        finished = {"model": None} | asdict(score(work, members, scoring)) | _told(Ledger(), scoring)
        work.record.write_json(f"checkpoints/{key}/finished.json", finished)
    return finished


def _told(training: Ledger, scoring: Ledger) -> dict[str, Any]:
    return {
        "problems": training.problems + scoring.problems,
        "warnings": training.warnings + scoring.warnings,
        "again": bool(scoring.problems),
    }


def _train(work: Work, model: Model, ledger: Ledger) -> Round:
    """The protocol's loop, with everything that happens after each round."""
    engine, record, p = work.engine, work.record, model.setting.study.protocol
    done = record.last_round(model.key) or start_with(start_weights(model, work.plans))
    for site, failure in tell(engine, dict.fromkeys(model.steps, Restore(model.key, done.number))).items():
        ledger.problems.append(f"{model.key}, going back to round {done.number}: {failure_line(record, site, failure)}")
    if done.number:
        work.watch(Event("stage", f"{model.key}: going on after round {done.number}", model=model.key))
    rounds = rounds_of(work, model, done)
    _watch(work, model, done, ledger)  # a kill may have come between
    began = time.monotonic()
    missing = [site for site in model.setting.sites if site not in model.steps and model.protocol != "centralized"]
    for done in rounds:
        # a site may have trained although its answer came late or could not be used: it goes back to where it was; not so one
        # whose update counts, and that failed afterwards
        failed = [s for s, f in done.failures.items() if not isinstance(f, SiteLost) and s not in done.answers]
        unsaved = tell(engine, dict.fromkeys(failed, Restore(model.key, done.number - 1)), p.round_seconds)
        there = [site for site in model.steps if site not in unsaved]
        unsaved |= tell(engine, dict.fromkeys(there, Snapshot(model.key, done.number)), p.round_seconds)
        failures = {**dict.fromkeys(missing, NOT_READY), **unsaved, **done.failures}
        done = replace(done, failures=failures, asked=model.steps)
        record.commit(model.key, done, seconds=time.monotonic() - began)
        losses = [a.loss for a in done.answers.values() if a.n_steps]
        loss = sum(losses) / len(losses) if losses else None
        work.watch(Event("round", model=model.key, round=done.number, rounds=p.rounds, loss=loss))
        for site, failure in done.failures.items():
            work.watch(Event("warning", f"{model.key}, round {done.number}: {failure_line(record, site, failure)}"))
        _watch(work, model, done, ledger)
        began = time.monotonic()
    note_rounds(model.key, record.rounds(model.key), ledger, averaged=model.protocol != "vertical")
    return done


def _watch(work: Work, model: Model, done: Round, ledger: Ledger) -> None:
    for each in (model, model.personal):
        if each is not None:
            watch_validation(work, each, done, ledger)


def rounds_of(work: Work, model: Model, done: Round) -> Iterator[Round]:
    """The model's protocol, from a complete round on."""
    study, p = model.setting.study, model.setting.study.protocol
    deadline = None if model.protocol == "centralized" else p.round_seconds  # a site's, and the pool is none
    weigh = weight_of(study.aggregation.name)
    return cast(
        Iterator[Round],
        catalog.load("protocols", model.protocol)(
            work.engine,
            done,
            model=model.key,
            collect=partial(
                catalog.load("collect", study.collect.name),
                weigh=weigh,
                see_updates=must_see_updates(study.aggregation.name),
                spool=work.record.folder / "spool",
                **study.collect.options,
            ),
            weigh=weigh,
            rule=partial(catalog.load("aggregation", study.aggregation.name), **study.aggregation.options),
            rounds=p.rounds,
            steps=model.steps,
            min_sites=min(p.min_sites or 1, len(model.steps)),
            deadline_s=deadline,
            box_s=deadline if p.time_box else None,
            network=network_of(model.study, work.plans),
            training=training_of(study),
            seed=study.study.seed,
            device=device_named(work.study.engine.device),
            cases=model.cases,
            sharing=work.plans.sharing if model.partly else EVERYTHING,
            begin_with=begin_with(work.plans),
            **(p.options if model.protocol == p.name else {}),
        ),
    )
