"""A trained model given to every site and scored there: at its end, and in between for the curves and the choice of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any, TypeAlias

from concilium._set_aside import DATA, UNSEEN
from concilium._set_aside import told as set_aside
from concilium.beginning import n_parameters
from concilium.engines import Traffic, ask
from concilium.errors import EngineError
from concilium.giving import asked_of, best_of, keep_at, parts_to_keep, pass_on, tell
from concilium.messages import Evaluate, Evaluated, Failure, Keep, PlugIn, Reply, Tensors, as_failure
from concilium.planning import batch_size_of
from concilium.preparation import Event, Ledger, Work, failure_line
from concilium.protocols import WEIGHTS, Round, begun_at, copy_traffic, traffic_since
from concilium.results import METRICS, account, score_rows, short_of_steps
from concilium.schedule import BEST, POOL, Model, ensemble_key
from concilium.serving import serve
from concilium.study import is_vertical
from concilium.wire import part, read_tensors

Names: TypeAlias = Mapping[int, Mapping[str, str]]


def note_rounds(model: str, rounds: Sequence[Mapping[str, Any]], ledger: Ledger, *, averaged: bool = True) -> None:
    """Note the failures of all rounds, and, where updates are `averaged`, who took fewer steps than it was asked for."""
    for line in rounds:
        failed = line["failures"].items()
        ledger.problems += [f"{model}, round {line['round']}: {site}: {f['text']}" for site, f in failed]
    ledger.warnings += short_of_steps(model, rounds) if averaged else []


@dataclass
class Scored:
    """Rows of results: scores of cases, averages of sites that keep those back, and what sites elsewhere could not score."""

    cases: list[dict[str, Any]] = field(default_factory=list)
    averages: list[dict[str, Any]] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)

    def add(self, about: Mapping[str, Any], site: str, subset: str, reply: Evaluated, names: Names) -> None:
        """Take in what a site answered."""
        self.cases += score_rows(about, site, subset, reply, names)
        where = "test" if subset == "test" else site
        place = {**about, "site": where, "subset": subset}
        self.averages += [place | asdict(average) for average in reply.averages]
        if not names:
            stage = {"test": DATA, "unseen": UNSEEN}.get(subset, f"fold {about['fold']}")
            self.excluded += set_aside(where, reply.excluded, stage)


def score(work: Work, members: Sequence[Model], ledger: Ledger) -> Scored:
    """Scores of one model at every site's validation cases and on the test set; of several, of their ensemble on the test set.

    A model that stays is scored at its own site only; one that never saw a site, on all cases of that site too.
    """
    study, model = work.study, members[0]
    options = {"nsd": {"tolerance": study.validation.tolerance}}
    metrics = tuple(PlugIn(m, options.get(m, {})) for m in METRICS)
    together = len(members) > 1
    where: list[tuple[str, str, list[str]]] = []
    own = model.each_own
    if not together:
        seen = list(model.steps) if own else _validates(model)
        where.append(("validation", "validation", seen))
        where += [("unseen", "all", [site]) for site in (model.setting.unseen,) if site and not own]
    if study.test is not None and (together or not model.member):
        where.append(("test", "test", list(model.steps) if own else ["test"]))
    key = ensemble_key(model) if together else model.key
    scored = Scored()
    for subset, of_site, sites in where:
        work.watch(Event("stage", f"{key}: scoring the {subset} cases", model=key))
        request = Evaluate(key, of_site, metrics, tuple(m.key for m in members), unknown=work.plans.unknown)
        for site, reply in _asked(work, model, request, sites, None):
            label = f"{key}, {subset} at {site}"
            if isinstance(reply, Evaluated):
                _add(scored, work, model, site, subset, reply, together=together)
                _count_excluded(work, label, reply, ledger)
            else:
                ledger.problems.append(f"{label}: {failure_line(work.record, site, as_failure(reply))}")
    work.watch(Event("scored", model=key))
    return scored


def _validates(model: Model) -> list[str]:
    """Who has validation cases: all sites; where sites hold channels whoever has the labels, or the pool, which has the same."""
    study = model.setting.study
    if not is_vertical(study):
        return list(model.setting.sites)
    return ["pooled" if model.protocol == "centralized" else str(study.protocol.options["labels"])]


def _asked(
    work: Work, model: Model, request: Evaluate, sites: Sequence[str], weights: Tensors | None
) -> Iterable[tuple[str, Reply | Failure]]:
    """What sites answer to the request; of a vertical model its label holder, when all parties have done their share.

    `weights`: of the server's part of it; omitted: those of the finished model.
    """
    if model.protocol != "vertical" or request.subset == "test":
        return ask(work.engine, _to_each(work, model, request, sites))
    weights = (
        read_tensors(work.record.folder / "weights" / f"{model.key}.safetensors")[0] if weights is None else weights
    )
    device = work.study.engine.device
    return [(site, serve(work.engine, model, work.plans, weights, request, device=device)) for site in sites]


def _to_each(work: Work, model: Model, request: Evaluate, sites: Iterable[str]) -> dict[str, Evaluate]:
    """The request to each site, which says whether the layers that make logits saw that site only."""
    own = work.plans.sharing.own_heads if model.stays else ()
    request = replace(request, defended=bool(model.study.defences))
    return {site: replace(request, own=model.protocol == "local" or site in own) for site in sites}


def _add(
    scored: Scored, work: Work, model: Model, site: str, subset: str, reply: Evaluated, *, together: bool = False
) -> None:
    names = work.record.case_names("test" if subset == "test" else site)
    if site == "pooled" and is_vertical(
        work.study
    ):  # the same cases, which whoever has the labels knows by the same names
        site = str(work.study.protocol.options["labels"])
    about = {
        "model": f"{model.name}:{site}" if model.each_own else model.name,
        "seed": model.seed,
        "fold": None if together else model.fold,
    }
    scored.add(about, site, subset, reply, names)


def _count_excluded(work: Work, where: str, reply: Evaluated, ledger: Ledger) -> None:
    n_scored = len({s.case for s in reply.scores}) or max((a.n_cases for a in reply.averages), default=0)
    n_not = sum(e.count for e in reply.excluded)
    if n_not:
        reasons = ", ".join(e.reason for e in reply.excluded)
        text = f"{where}: {n_not} of {n_scored + n_not} cases not scored ({reasons})"
        too_many = n_not > work.study.study.max_excluded * (n_scored + n_not)
        (ledger.problems if too_many else ledger.warnings).append(text)


def account_of(work: Work, model: Model, before: Mapping[str, Traffic]) -> dict[str, Any]:
    """What a model took to train, to give, and to score, as it stands in results.json.

    Args:
        before: traffic of its sites when its training was done.
    """
    record = work.record
    besides = {site: [t.down, t.up] for site, t in traffic_since(work.engine, model.steps, before).items()}
    took = account(
        model,
        record.rounds(model.group[0]),
        batch_size=partial(batch_size_of, model.setting.study, work.plans),
        selected={site: number for site, (number, _) in best_of(work, model).items()},
        besides=[besides, *(line.get("bytes", {}) for line in record.curve(model.key))],
    )
    return took | n_parameters(model, work.plans)


# ------------------------------------------------------------------------------------------------------- between rounds


def watch_validation(work: Work, model: Model, done: Round, ledger: Ledger) -> None:
    """Where the study asks for it after this round: score the validation cases, note the curve, keep the best weights.

    The test set and a site that the model never saw take no part in the choice.
    """
    v = work.study.validation
    if v.every is None or done.number == 0 or done.number % v.every or work.record.has_curve(model.key, done.number):
        return
    weights, before = part(done.tensors, WEIGHTS), copy_traffic(work.engine, model.steps)
    pooled = model.protocol == "centralized"  # trained where the server cannot see it, and scored there
    if model.partly:  # a site that was not asked yet has nothing of its own to add
        begun = begun_at(done)
        sites = [site for site in model.steps if site in begun]
        keep = {site: keep_at(work, model, site, weights) for site in sites}
    else:
        own = model.each_own
        vertical = is_vertical(model.setting.study)
        sites = list(model.steps) if own or pooled else [*_validates(model), *_unseen(model)]
        if model.beside:  # a site that did not take part yet has no network of its own
            sites = [site for site in sites if site in asked_of(work, model)]
        same = Keep(model.key, {} if model.stays or pooled else weights, personal=model.beside)
        keep = dict.fromkeys(sites, same)
        if vertical and not pooled:
            keep = parts_to_keep(work, model, weights)
    failures = pass_on(work, model, done) if model.is_one else tell(work.engine, keep)
    request = Evaluate(model.key, "validation", (PlugIn("dice"),), final=False, unknown=work.plans.unknown)
    in_parts = model.protocol == "vertical"  # of which none may be that of an earlier round
    there = [site for site in sites if site not in failures and not (in_parts and failures)]
    replies = dict(_asked(work, model, request, there, weights))
    failures |= {site: as_failure(r) for site, r in replies.items() if not isinstance(r, Evaluated)}
    for site, failure in failures.items():
        ledger.problems.append(
            f"{model.key}, round {done.number}, validation: {failure_line(work.record, site, failure)}"
        )
    scored = Scored()
    for site, r in replies.items():
        if isinstance(r, Evaluated):
            _add(scored, work, model, site, "validation", r)
    curve = _curve(scored, [*model.steps])
    if v.select == "best" and not pooled:
        _keep_best(work, model, done.number, weights, curve, ledger)
    sent = traffic_since(work.engine, model.steps, before)
    work.record.add_curve(model.key, done.number, curve, sent=sent, beside=model.beside)


def _unseen(model: Model) -> tuple[str, ...]:
    return (model.setting.unseen,) if model.setting.unseen else ()


def _curve(scored: Scored, trains: Sequence[str]) -> dict[str, float]:
    """Site -> mean validation Dice over its patients, and that over the patients of all sites that train."""

    patients: dict[str, dict[str, list[float]]] = {}
    for row in scored.cases:
        if row["dice"] is not None:
            patients.setdefault(row["site"], {}).setdefault(row["patient"], []).append(row["dice"])
    means = {site: [fmean(values) for values in of.values()] for site, of in patients.items()}
    for row in scored.averages:  # over all labels where there are several; it comes last
        if row["mean"] is not None:
            means[row["site"]] = [row["mean"]] * row["n"]
    pool = [value for site in means if site in trains for value in means[site]]
    return {site: fmean(values) for site, values in means.items()} | ({POOL: fmean(pool)} if pool else {})


def _keep_best(
    work: Work, model: Model, number: int, weights: Tensors, curve: Mapping[str, float], ledger: Ledger
) -> None:
    """Have the best weights so far kept: by the server, or each site's own by itself.

    Raises:
        EngineError: a party did not keep its part of them.
    """
    best = work.record.best_rounds(model.key)
    if not model.stays:
        if curve.get(POOL, -1.0) > best.get(POOL, (0, -1.0))[1]:
            _keep_parts(work, model, number)
            work.record.save_best(model.key, number, weights)
        return
    better = [site for site in model.steps if curve.get(site, -1.0) > best.get(site, (0, -1.0))[1]]
    failures = tell(work.engine, dict.fromkeys(better, Keep(model.key + BEST, {}, model.key)))
    for site, failure in failures.items():
        ledger.problems.append(f"{model.key}, round {number}, keeping: {failure_line(work.record, site, failure)}")


def _keep_parts(work: Work, model: Model, number: int) -> None:
    """Have each party whose front stays keep its part: parts of other rounds make no model together."""
    asked = dict.fromkeys(model.steps, Keep(model.key + BEST, {}, model.key)) if model.apart else {}
    if failures := tell(work.engine, asked):
        site, failure = next(iter(failures.items()))
        raise EngineError(
            f"{model.key}, round {number}, keeping: {failure_line(work.record, site, failure)}. All parties must keep their "
            "parts of the best weights. Mend it, then go on with --resume."
        )
