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
from concilium.answers import Cancelled, Check, Job, Settings, built, complete
from concilium.answers.align import align, blind, offer
from concilium.answers.evaluate import evaluate, subset_of
from concilium.answers.failing import failure_of
from concilium.answers.judge import judge
from concilium.answers.ledger import note
from concilium.answers.models import Models
from concilium.answers.notes import note_cases, note_excluded, note_plan
from concilium.answers.own import merged, personalize, reestimate
from concilium.answers.permission import check_names, check_policy
from concilium.answers.relay import Carried, Relay
from concilium.answers.secure import Secret, Secure
from concilium.answers.service import Service
from concilium.answers.statistics import Exclusions, examine, prepare
from concilium.answers.vertical import place
from concilium.errors import ContractError
from concilium.messages import (
    REQUESTS,
    Align,
    Blind,
    Conclude,
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
    Held,
    Hold,
    Judge,
    Keep,
    Look,
    Offer,
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
    Train,
    Trained,
    Where,
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
        self._secure = Secure(settings, run=run)
        self._service = Service(settings, self.device)
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
        check_policy(request, self.settings.policy, self._job)
        if not isinstance(request, Front | Tail | Finish):
            self._models.give_up()
        match request:
            case Examine():
                reply, excluded = examine(self.settings, request, cancelled)
                note_cases(self.settings, excluded, request.holding)
                return reply
            case Offer() | Blind() | Align() | Where() | Look() | Conclude():
                return self._take_part(request, cancelled)
            case Prepare():
                self._models.park()
                prepared, self._job, excluded = prepare(self.settings, request, cancelled)
                note_cases(self.settings, excluded, request.holding)
                note_plan(self.settings, request)
                return prepared
            case Train() | Front() | Tail() | Finish() | Pass() | Hold():
                return self._train(request, cancelled)
            case Evaluate() | Judge():
                return self._evaluate(request, cancelled)
            case Keep() | Snapshot() | Restore() | Forget():
                self._store(request)
            case _:
                return self._make_own(request, cancelled)
        return Done()

    def _take_part(self, request: Offer | Blind | Align | Where | Look | Conclude, cancelled: Check) -> Reply:
        """What a site does that holds channels of the same patients as others do."""
        settings, models, reply = self.settings, self._models, cast(Reply, Done())
        excluded: Exclusions = {}
        match request:
            case Offer():
                reply, excluded = offer(settings, request, cancelled)
            case Blind():
                reply = blind(settings, request)
            case Align():
                reply, excluded = align(settings, request)
            case Where():
                reply = place(self._prepared_job(), request)
            case Look():
                reply, excluded = self._service.look(self._prepared_job(), models.finished, request)
            case Conclude():
                reply, excluded = self._service.conclude(self._prepared_job(), models.finished, request, cancelled)
        note_excluded(self.settings, excluded)
        return reply

    def _make_own(self, request: Request, cancelled: Check) -> Reply:
        """What has to do with tensors that are the site's own, sealed or masked."""
        if isinstance(request, Carried):
            return self._relay.answer(request, self._models, self._prepared_job)
        if isinstance(request, Secret):
            return self._secure.answer(request)
        job, models, site = self._prepared_job(), self._models, self.settings.name
        match request:
            case Describe():
                return described(built(job), job.kept)
            case Share(names):
                self._job = replace(job, kept=all_but(built(job), job.kept, names))
            case Fetch(model):
                self._relay.check_open(model)
                own = models.to_be_fetched(model)
                return Fetched({n: own[n] for n in sorted(job.kept & own.keys())}, len(job.entries["training"]))
            case Personalize(model, source):
                models.park()  # one network in memory at a time
                weights = models.finished(source)
                trained, own = personalize(job, weights, request, site=site, device=self.device, cancelled=cancelled)
                models.keep(model, complete(job, own))
                return trained
            case Reestimate(model):
                models.park()
                entries, _ = subset_of(self.settings, job, "test" if self.settings.role == "test" else "all")
                weights = models.finished(model)
                own = reestimate(job, weights, entries, device=self.device, cancelled=cancelled)
                models.keep(model, complete(job, own))
        return Done()

    def _store(self, request: Keep | Snapshot | Restore | Forget) -> None:
        models = self._models
        match request:
            case Keep(model, weights, source, personal, merge):
                own = weights or (models.finished(source) if source else None)
                if merge:
                    own = merged(self._prepared_job(), models.in_training(model), weights)
                if not own and self._job is not None and not self._job.has_all:
                    own = models.in_training(model)  # of a part that is frozen nothing was sent
                elif not own:
                    own = models.learner(self._prepared_job(), personal or model).trained_weights(
                        personal=bool(personal)
                    )
                models.keep(model, complete(self._job, own))
            case Snapshot(model, number):
                models.snapshot(model, number)
            case Restore(model, number):
                models.restore(model, number)
                self._relay.went_back(model, number)
            case Forget(model, finished):
                models.forget(model, finished=finished)

    def _train(self, request: Train | Front | Tail | Finish | Pass | Hold, cancelled: Check) -> Reply:
        models, job = self._models, self._prepared_job()
        reply: Trained | Passed | Held
        if isinstance(request, Train | Front | Hold):
            self._relay.check_open(request.model)
        try:
            match request:
                case Front():
                    session = models.begin(job, request) if request.step == 0 else models.session
                    return session.front(request, cancelled)
                case Tail():
                    return models.session.tail(request)
                case Finish():
                    reply = models.session.finish(request)
                    models.end()
                case Train():
                    learner = models.learner(job, request.model)
                    trained = learner.train(request, site=models.site, cancelled=cancelled)
                    reply = note(self.settings.folder, request, trained, job.training.local_update, learner.draws)
                case Pass():
                    reply = self._relay.train(models.learner(job, request.model), request, cancelled)
                case Hold():
                    reply = self._secure.hold(models.learner(job, request.model), request, cancelled)
            models.changed()
            if cancelled():  # in the last step: whoever asked has given it up, so it must not have happened
                raise Cancelled
        except BaseException:
            models.drop(request.model)  # the state on disk is the one before this request
            raise
        t = reply if isinstance(reply, Trained) else reply.trained
        self.log("trained", model=request.model, round=request.round, steps=t.n_steps, loss=t.loss, seconds=t.seconds)
        return reply

    def _evaluate(self, request: Evaluate | Judge, cancelled: Check) -> Reply:
        if isinstance(request, Judge):
            return judge(self.settings, self._prepared_job(), request, device=self.device, cancelled=cancelled)
        evaluated, excluded = evaluate(
            self.settings,
            self._prepared_job(),
            [self._models.finished(member) for member in request.members or (request.model,)],
            request,
            device=self.device,
            cancelled=cancelled,
        )
        note_excluded(self.settings, excluded)
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
