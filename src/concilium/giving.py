"""The final push of a trained model: to every site, or to its own, or from site to site; and what sites make of it."""

from __future__ import annotations

from collections.abc import Mapping

from concilium.aggregation import Sum
from concilium.beginning import complete
from concilium.engines import Engine, ask
from concilium.errors import EngineError
from concilium.messages import (
    Done,
    Failure,
    Fetch,
    Fetched,
    Forget,
    Keep,
    Personalize,
    Reestimate,
    Request,
    Tensors,
    Trained,
    as_failure,
)
from concilium.preparation import Ledger, Work, failure_line
from concilium.protocols import WEIGHTS, Round
from concilium.protocols.cyclic import HOLDER, hand_out
from concilium.schedule import BEST, Model
from concilium.serving import own_weights
from concilium.study import is_vertical, training_of
from concilium.wire import part


def tell(engine: Engine, requests: Mapping[str, Request], deadline_s: float | None = None) -> dict[str, Failure]:
    """Send what is answered by `Done`; the failures."""
    replies = ask(engine, requests, deadline_s=deadline_s)
    return {site: as_failure(reply) for site, reply in replies if not isinstance(reply, Done)}


def give(work: Work, model: Model, last: Round, ledger: Ledger) -> None:
    """The final push: server and sites keep the same tensors. A model that stays is kept by its site alone, or all sites.

    Raises:
        EngineError: the site that has the model cannot give it to the others.
    """
    requests: dict[str, Request] = {}
    best = best_of(work, model)
    if model.is_finetuned:
        personalize(work, model, ledger)
        return
    if model.each_own:
        for site in model.steps:
            if site in best:
                requests[site] = Keep(model.key, {}, model.key + BEST)
            else:
                requests[site] = keep_at(work, model, site, part(last.tensors, WEIGHTS))
    elif not model.stays:
        weights = work.record.best_weights(model.key) or part(last.tensors, WEIGHTS)
        work.record.save_weights(model.key, complete(work.plans, weights))
        requests = keep_everywhere(work, model, weights, best=bool(best))
    if not model.beside and (never := [s for s in model.steps if s not in asked_of(work, model)]):
        ledger.warnings.append(f"{model.key}: {', '.join(never)} took part in no round. More rounds would reach them.")
    failures = pass_on(work, model, last) if model.stays and model.is_one else tell(work.engine, requests)
    if model.beside and not model.stays and model.setting.study.sharing.unseen == "reestimate":
        there = [site for site in requests if site not in failures]
        failures |= tell(work.engine, dict.fromkeys(there, Reestimate(model.key)))
    for site, failure in failures.items():
        ledger.problems.append(f"{model.key}, final push: {failure_line(work.record, site, failure)}")


def best_of(work: Work, model: Model) -> dict[str, tuple[int, float]]:
    """Site -> the round whose weights are to be kept, and its validation Dice; nothing where those of the last round are."""
    return work.record.best_rounds(model.key) if work.study.validation.select == "best" else {}


def forget_best(work: Work, model: Model) -> None:
    """Have sites let go of what they kept of the best rounds. Until all is scored the model may have to be given again."""
    best = best_of(work, model)
    keepers = [s for s in model.steps if best and (model.apart or (model.stays and s in best))]
    tell(work.engine, dict.fromkeys(keepers, Forget(model.key + BEST, finished=True)))


def pass_on(work: Work, model: Model, done: Round) -> dict[str, Failure]:
    """Have the sites give the model that they pass on among themselves to one another, to keep; the failures.

    Raises:
        EngineError: nobody has got it.
    """
    p = model.setting.study.protocol
    failures = hand_out(work.engine, model.key, done, reveal=p.options["reveal"], deadline_s=p.round_seconds)
    if len(failures) >= sum(site.role in ("site", "test") for site in work.engine.sites.values()):
        site, failure = str(done.values[HOLDER]), next(iter(failures.values()))
        raise EngineError(
            f"{model.key}, round {done.number}: {failure_line(work.record, site, failure)}. It has the weights, and must "
            "give them to the others. Mend it, then go on with --resume."
        )
    return failures


def personalize(work: Work, model: Model, ledger: Ledger) -> None:
    """Have every site train the finished model on for itself."""
    study = model.setting.study
    own, rounds = study.personalize, study.protocol.rounds
    training = training_of(study)
    deep = training.deep_supervision and bool(study.protocol.options.get("reveal_labels", True))
    rate = own.learning_rate or training.learning_rate
    request = Personalize(model.key, model.beside, rounds + 1, own.steps or 0, rate, deep, own.tensors)
    for site, reply in ask(work.engine, dict.fromkeys(model.steps, request)):
        if not isinstance(reply, Trained):
            failure = failure_line(work.record, site, as_failure(reply))
            ledger.problems.append(f"{model.key}, fine-tuning: {failure}")


def keep_everywhere(work: Work, model: Model, weights: Tensors, *, best: bool = False) -> dict[str, Request]:
    """Ask all sites and the test set to store a model; where sites hold channels, each its own part, and the pool all of it.

    Args:
        best: the weights are the best of all rounds, and where something stays at sites each has kept that.
    """
    whole = Keep(model.key, weights)
    keepers = [name for name, site in work.engine.sites.items() if site.role in ("site", "test")]
    if not is_vertical(model.setting.study):
        return dict.fromkeys(keepers, whole)
    if model.protocol == "centralized":
        return {name: whole for name in work.engine.sites if name in ("pooled", "test")}
    own = parts_to_keep(work, model, weights)
    if model.apart and best:
        own = {site: Keep(model.key, {}, model.key + BEST) for site in own}
    return {name: own.get(name, whole) for name in keepers if name in own or name == "test"}


def parts_to_keep(work: Work, model: Model, weights: Tensors) -> dict[str, Keep]:
    """Ask each party to store its part of a model, with what stays there of it."""
    own = own_weights(model, work.plans, weights)
    return {site: Keep(model.key, part, merge=model.apart) for site, part in own.items()}


def keep_at(work: Work, model: Model, site: str, weights: Tensors) -> Keep:
    """Ask a site to store a model that stays: what it trained, or the shared weights with those of its own."""
    if model.partly:
        return Keep(model.key, work.plans.sharing.for_site(weights, site), merge=True)
    return Keep(model.key, {}, personal=model.beside)


def for_elsewhere(work: Work, model: Model, trained: Round, ledger: Ledger) -> Tensors:
    """A network for sites that did not train: the shared weights after the last round, and the mean of what each site keeps.

    Weighted by cases. A site that does not send what it keeps is not in the mean, which is then a problem of the run.
    """
    total = Sum()
    for site, reply in ask(work.engine, dict.fromkeys(model.steps, Fetch(model.beside))):
        if isinstance(reply, Fetched):
            total.add(reply.weights, max(1, reply.n_cases))
        else:
            failure = failure_line(work.record, site, as_failure(reply))
            ledger.problems.append(f"{model.key}, what {site} keeps: {failure}")
    return {**part(trained.tensors, WEIGHTS), **(total.mean() if total.count else {})}


def asked_of(work: Work, model: Model) -> set[str]:
    """The sites that took part in a round so far; all, in a run that an earlier version began."""
    return {site for line in work.record.rounds(model.beside or model.key) for site in line.get("asked", model.steps)}
