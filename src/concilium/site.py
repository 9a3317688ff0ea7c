"""A site: the only module that holds data and answers. Everything a server can have of a site goes through `Site.handle`.

It dispatches requests, turns whatever goes wrong into a failure without words, writes the words to its own log, and keeps the
state of models between requests: at most one in memory, the others on disk. A request to train that fails leaves the state
as it was.
"""

from __future__ import annotations

import json
import secrets
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from concilium import wire
from concilium.aggregation import check_like
from concilium.answers import Cancelled, Check, Entry, Job, Settings, built
from concilium.answers.evaluate import evaluate, subset_of
from concilium.answers.failing import failure_of
from concilium.answers.judge import judge
from concilium.answers.ledger import note
from concilium.answers.models import Models
from concilium.answers.own import personalize, reestimate
from concilium.answers.permission import check_names, check_policy
from concilium.answers.relay import Carried, Relay
from concilium.answers.statistics import Exclusions, examine, find_cases, prepare
from concilium.errors import ContractError
from concilium.messages import (
    REQUESTS,
    Describe,
    Done,
    Evaluate,
    Examine,
    Failure,
    Fetch,
    Fetched,
    Finish,
    Forget,
    Front,
    Hand,
    Introduce,
    Judge,
    Keep,
    Pass,
    Passed,
    Personalize,
    Prepare,
    Reestimate,
    Reply,
    Request,
    Restore,
    Share,
    SiteTimeout,
    Snapshot,
    Tail,
    Take,
    Tensors,
    Train,
    Trained,
)  # fmt: skip
from concilium.optimization import device_named
from concilium.sharing import all_but, described
from concilium.wire import Envelope


class Site:
    """One site in one life: a restarted site is a new one, with a new `epoch`."""

    def __init__(self, settings: Settings, *, run: str, epoch: int) -> None:
        self.settings = settings
        self.run = run
        self.epoch = epoch
        self.device = device_named(settings.device)
        self._job: Job | None = None
        self._models = Models(settings.folder, self.device, site=settings.name)
        self._relay = Relay(settings, run=run)
        self._last: tuple[int, bytes | Path] | None = None
        """The last reply, or the file it lies in, with the number of its request."""
        settings.folder.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------------ from the network

    def handle(self, packed: bytes, envelope: Envelope, cancelled: Check) -> bytes:
        """The packed reply to a packed request; the same request again (by its envelope) gives the same reply again."""
        number, last = self._last or (-1, b"")
        if (envelope.run, envelope.epoch) != (self.run, self.epoch) or envelope.sequence < number:
            e = ContractError(
                f"Request {envelope.sequence} for run {envelope.run}, epoch {envelope.epoch} arrived. This site is at request "
                f"{number} of run {self.run}, epoch {self.epoch}. Restore its state first."
            )
            return wire.pack(self._failure(e))
        if envelope.sequence == number:
            return last if isinstance(last, bytes) else last.read_bytes()
        started = time.monotonic()
        try:
            request = wire.unpack(packed)
            if not isinstance(request, REQUESTS):
                raise ContractError(
                    f"{type(request).__name__} is no request. Allowed: {', '.join(r.__name__ for r in REQUESTS)}. Send one."
                )
            torch.set_num_threads(self.settings.threads)
            reply = wire.pack(self.answer(cast(Request, request), cancelled))
        except Cancelled:
            reply = wire.pack(SiteTimeout(time.monotonic() - started))
        except (Exception, SystemExit) as e:  # a site answers whatever happens; what happened stays in its log
            reply = wire.pack(self._failure(e))
        self._last = (envelope.sequence, reply)
        return reply

    def _failure(self, e: BaseException) -> Failure:
        reference = f"{self.settings.name}-{secrets.token_hex(4)}"  # one that no earlier life has left in the log
        self.log("failure", reference=reference, error="".join(traceback.format_exception(e)))
        return failure_of(e, reference)

    # -------------------------------------------------------------------------------------------------------- requests

    def answer(self, request: Request, cancelled: Check) -> Reply:
        """The reply to a request; whatever goes wrong is raised."""
        check_names(request)
        check_policy(request, self.settings.policy)
        if not isinstance(request, Front | Tail | Finish):
            self._models.give_up()
        match request:
            case Examine():
                examined, excluded = examine(self.settings, request, cancelled)
                self._note_cases(excluded)
                return examined
            case Prepare():
                self._models.park()
                prepared, self._job, excluded = prepare(self.settings, request, cancelled)
                self._note_cases(excluded)
                if not self._noted("plan.json"):  # the first is the study's own, later ones may be those of variants
                    self._note("plan.json", json.loads(request.plans))
                return prepared
            case Train() | Front() | Tail() | Finish() | Pass():
                return self._train(request, cancelled)
            case Evaluate():
                return self._evaluate(request, cancelled)
            case Judge():
                return judge(self.settings, self._prepared_job(), request, device=self.device, cancelled=cancelled)
            case Introduce() | Hand() | Take() | Describe() | Share() | Fetch() | Personalize() | Reestimate():
                return self._make_own(request, cancelled)
            case Keep() | Snapshot() | Restore() | Forget():
                self._store(request)
        return Done()

    def _make_own(
        self, request: Carried | Describe | Share | Fetch | Personalize | Reestimate, cancelled: Check
    ) -> Reply:
        """What has to do with tensors that are the site's own, or sealed for it."""
        if isinstance(request, Carried):
            return self._relay.answer(request, self._models, self._prepared_job)
        job, models, site = self._prepared_job(), self._models, self.settings.name
        match request:
            case Describe():
                return described(built(job), job.kept)
            case Share(names):
                self._job = replace(job, kept=all_but(built(job), job.kept, names))
            case Fetch(model):
                self._relay.check_open(model)
                own = models.in_training(model)
                return Fetched({n: own[n] for n in sorted(job.kept & own.keys())}, len(job.entries["training"]))
            case Personalize(model, source):
                models.park()  # one network in memory at a time
                weights = models.finished(source)
                trained, own = personalize(job, weights, request, site=site, device=self.device, cancelled=cancelled)
                models.keep(model, own)
                return trained
            case Reestimate(model):
                models.park()
                entries, _ = subset_of(self.settings, job, "test" if self.settings.role == "test" else "all")
                weights = models.finished(model)
                models.keep(model, reestimate(job, weights, entries, device=self.device, cancelled=cancelled))
        return Done()

    def _store(self, request: Keep | Snapshot | Restore | Forget) -> None:
        models = self._models
        match request:
            case Keep(model, weights, source, personal, merge):
                own = weights or (models.finished(source) if source else None)
                if merge:
                    own = self._merged(models.in_training(model), weights)
                if not own:
                    own = models.learner(self._prepared_job(), personal or model).trained_weights(
                        personal=bool(personal)
                    )
                models.keep(model, own)
            case Snapshot(model, number):
                models.snapshot(model, number)
            case Restore(model, number):
                models.restore(model, number)
                self._relay.went_back(model, number)
            case Forget(model, finished):
                models.forget(model, finished=finished)

    def _merged(self, trained: Tensors, shared: Tensors) -> Tensors:
        """The shared weights with what stays here of those that trained."""
        job = self._prepared_job()
        whole = {**shared, **{n: trained[n] for n in job.kept & trained.keys()}}
        check_like(whole, built(job).state_dict())
        return whole

    def _train(self, request: Train | Front | Tail | Finish | Pass, cancelled: Check) -> Reply:
        models, job = self._models, self._prepared_job()
        reply: Trained | Passed
        if isinstance(request, Train | Front):
            self._relay.check_open(request.model)
        try:
            match request:
                case Front():
                    session = models.begin(job, request) if request.step == 0 else models.session
                    return session.front(request, cancelled)
                case Tail():
                    return models.session.tail(request)
                case Finish():
                    reply = trained = models.session.finish(request)
                    models.end()
                case Train():
                    learner = models.learner(job, request.model)
                    trained = learner.train(request, site=self.settings.name, cancelled=cancelled)
                    folder, update = self.settings.folder, job.training.local_update
                    reply = trained = note(folder, request, trained, update, learner.draws)
                    models.changed()
                case Pass():
                    reply = self._relay.train(models.learner(job, request.model), request, cancelled)
                    trained = reply.trained
                    models.changed()
            if cancelled():  # in the last step: whoever asked has given it up, so it must not have happened
                raise Cancelled
        except BaseException:
            models.drop(request.model)  # the state on disk is the one before this request
            raise
        took = {"steps": trained.n_steps, "loss": trained.loss, "seconds": trained.seconds}
        self.log("trained", model=request.model, round=request.round, **took)
        return reply

    def _evaluate(self, request: Evaluate, cancelled: Check) -> Reply:
        evaluated, excluded = evaluate(
            self.settings,
            self._prepared_job(),
            [self._models.finished(member) for member in request.members or (request.model,)],
            request,
            device=self.device,
            cancelled=cancelled,
        )
        self._note("excluded.json", {**self._noted("excluded.json"), **{c: list(r) for c, r in excluded.items()}})
        return evaluated

    def _prepared_job(self) -> Job:
        if self._job is None:
            raise ContractError(f"{self.settings.name} was asked to work before it was prepared. Send Prepare first.")
        return self._job

    # -------------------------------------------------------------------------------------------------- the site's own

    def park(self) -> None:
        """Write the model in memory, and the last reply, to disk and let go of them; between two split steps nothing goes."""
        if self._models.is_between_steps:
            return
        self._models.park()
        if self._last is not None and isinstance(self._last[1], bytes):
            path = self.settings.folder / "last.reply"
            path.write_bytes(self._last[1])
            self._last = (self._last[0], path)

    def log(self, event: str, **values: Any) -> None:
        """Add a line to the site's own log, which never leaves it."""
        with (self.settings.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "epoch": self.epoch, "event": event, **values}) + "\n")

    def _note_cases(self, excluded: Exclusions) -> None:
        """Write which number stands for which case, and what was set aside and why: for the site's own eyes."""
        data = dict(self.settings.data) | ({"test": self.settings.test} if self.settings.test else {})
        found: dict[str, tuple[Entry, ...]] = {
            member: find_cases({member: folder}, self.settings.names)[0] for member, folder in data.items()
        }
        cases = {
            m: [
                {"number": e.number, "case": e.case.name, "patient": e.case.patient, "patient_number": e.patient}
                for e in es
            ]
            for m, es in found.items()
        }
        self._note("cases.json", cases)
        self._note("excluded.json", {case: list(reason) for case, reason in excluded.items()})

    def _note(self, name: str, value: Any) -> None:
        path = self.settings.folder / name
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8")
        unfinished.replace(path)

    def _noted(self, name: str) -> Any:
        path = self.settings.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
