"""A site: the only module that holds data and answers. Everything a server can have of a site goes through `Site.handle`.

It dispatches requests, turns whatever goes wrong into a failure without words, writes the words to its own log, and keeps the
state of models between requests: at most one in memory, the others on disk. A request to train that fails leaves the state
as it was.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
import traceback
from pathlib import Path
from typing import Any, cast

import torch

from concilium import wire
from concilium.answers import Cancelled, Check, Entry, Job, Settings
from concilium.answers.evaluate import evaluate
from concilium.answers.statistics import Exclusions, examine, find_cases, prepare
from concilium.answers.train import Learner
from concilium.errors import ConciliumError, ContractError, DataError, PrivacyError
from concilium.messages import (
    REQUESTS,
    Done,
    Evaluate,
    Examine,
    Failure,
    Forget,
    Keep,
    Prepare,
    Reply,
    Request,
    Restore,
    SiteError,
    SiteRefused,
    SiteTimeout,
    Snapshot,
    Train,
)  # fmt: skip
from concilium.wire import Envelope, read_tensors, write_tensors


class Site:
    """One site in one life: a restarted site is a new one, with a new `epoch`."""

    def __init__(self, settings: Settings, *, run: str, epoch: int) -> None:
        self.settings = settings
        self.run = run
        self.epoch = epoch
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
        )
        self._job: Job | None = None
        self._resident: tuple[str, Learner] | None = None
        self._dirty = False
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
        # a name that Python or Concilium gave; that of a class from outside may say anything
        name = next(c.__name__ for c in type(e).__mro__ if c.__module__ in ("builtins", "concilium.errors"))
        self.log("failure", reference=reference, error="".join(traceback.format_exception(e)))
        match e:
            case PrivacyError():
                return SiteRefused("policy")
            case DataError():
                return SiteError("DataError", e.code, reference)
            case ContractError():
                return SiteError("ContractError", "contract", reference)
            case FloatingPointError():
                return SiteError("FloatingPointError", "not_finite", reference)
            case MemoryError() | torch.OutOfMemoryError():
                return SiteError(name, "out_of_memory", reference)
            case RuntimeError() if "can't allocate memory" in str(e) or "out of memory" in str(e):
                return SiteError(name, "out_of_memory", reference)
            case OSError():
                return SiteError(name, "disk", reference)
            case ConciliumError():
                return SiteError(name, "concilium", reference)
        return SiteError(name, "failed", reference)

    # -------------------------------------------------------------------------------------------------------- requests

    def answer(self, request: Request, cancelled: Check) -> Reply:
        """The reply to a request; whatever goes wrong is raised."""
        model = getattr(request, "model", "none")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", model):  # it names files here, and comes from outside
            raise ContractError(f"A model is called {model!r}. Allowed: letters, digits, - and _. Rename it.")
        match request:
            case Examine():
                examined, excluded = examine(self.settings, request, cancelled)
                self._note_cases(excluded)
                return examined
            case Prepare():
                self._resident = None
                prepared, self._job, excluded = prepare(self.settings, request, cancelled)
                self._note_cases(excluded)
                return prepared
            case Train():
                return self._train(request, cancelled)
            case Keep():
                kept = request.weights or self._learner(request.model).trained_weights()
                write_tensors(self._finished(request.model), kept, {})
            case Evaluate():
                weights, _ = read_tensors(self._finished(request.model))
                evaluated, excluded = evaluate(
                    self.settings, self._prepared_job(), weights, request, device=self.device, cancelled=cancelled
                )
                self._note(
                    "excluded.json", {**self._noted("excluded.json"), **{c: list(r) for c, r in excluded.items()}}
                )
                return evaluated
            case Snapshot(model, number):
                self._snapshot(model, number)
            case Restore(model, number):
                self._restore(model, number)
            case Forget(model):
                self._drop(model)
                shutil.rmtree(self._states(model), ignore_errors=True)
        return Done()

    def _train(self, request: Train, cancelled: Check) -> Reply:
        learner = self._learner(request.model)
        try:
            trained = learner.train(request, site=self.settings.name, cancelled=cancelled)
            if cancelled():  # in the last step: whoever asked has given it up, so it must not have happened
                raise Cancelled
        except BaseException:
            self._drop(request.model)  # the state on disk is the one before this request
            raise
        self._dirty = True
        self.log(
            "trained",
            model=request.model,
            round=request.round,
            steps=trained.n_steps,
            loss=trained.loss,
            seconds=trained.seconds,
        )
        return trained

    def _prepared_job(self) -> Job:
        if self._job is None:
            raise ContractError(f"{self.settings.name} was asked to work before it was prepared. Send Prepare first.")
        return self._job

    # ----------------------------------------------------------------------------------------------- models and states

    def _states(self, model: str) -> Path:
        return self.settings.folder / "states" / model

    def _working(self, model: str) -> Path:
        """The state after the last request, of a model that is not in memory."""
        return self._states(model) / "working.safetensors"

    def _numbered(self, model: str, number: int) -> Path:
        return self._states(model) / f"{number:06d}.safetensors"

    def _finished(self, model: str) -> Path:
        return self.settings.folder / "models" / f"{model}.safetensors"

    def _learner(self, model: str) -> Learner:
        """The model, in memory; the one that was there goes to disk."""
        if self._resident is not None and self._resident[0] == model:
            return self._resident[1]
        self.park()
        learner = Learner(self._prepared_job(), self.device)
        if self._working(model).is_file():
            learner.load(self._working(model))
        self._resident, self._dirty = (model, learner), False
        return learner

    def park(self) -> None:
        """Write the model in memory, and the last reply, to disk and let go of them."""
        if self._resident is not None:
            self._write_working()
            self._resident = None
        if self._last is not None and isinstance(self._last[1], bytes):
            path = self.settings.folder / "last.reply"
            path.write_bytes(self._last[1])
            self._last = (self._last[0], path)

    def _write_working(self) -> None:
        if self._resident is not None and self._dirty:
            self._resident[1].save(self._working(self._resident[0]))
            self._dirty = False

    def _drop(self, model: str) -> None:
        if self._resident is not None and self._resident[0] == model:
            self._resident, self._dirty = None, False

    def _snapshot(self, model: str, number: int) -> None:
        if self._resident is not None and self._resident[0] == model:
            self._write_working()
        if self._working(model).is_file():  # a site that never trained has no state, and its snapshot is none
            _same_file(self._working(model), self._numbered(model, number))
        for old in self._states(model).glob("[0-9]*.safetensors"):
            if int(old.stem) < number - 1:
                old.unlink()

    def _restore(self, model: str, number: int) -> None:
        self._drop(model)
        self._working(model).unlink(missing_ok=True)
        snapshot = self._numbered(model, number)
        others = {int(p.stem): p for p in self._states(model).glob("[0-9]*.safetensors")}
        for other, path in others.items():
            if other > number:
                path.unlink()  # of a round that was never complete: it is taken again
        if snapshot.is_file():
            _same_file(snapshot, self._working(model))
        elif number > 0 and any(other <= number for other in others):
            raise ContractError(
                f"{self.settings.name} has no snapshot {number} of {model}, but others. Expected {snapshot}. Start the run again."
            )

    # -------------------------------------------------------------------------------------------------- the site's own

    def log(self, event: str, **values: Any) -> None:
        """Add a line to the site's own log, which never leaves it."""
        with (self.settings.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "epoch": self.epoch, "event": event, **values}) + "\n")

    def _note_cases(self, excluded: Exclusions) -> None:
        """Write which number stands for which case, and what was set aside and why: for the site's own eyes."""
        data = dict(self.settings.data) | ({"test": self.settings.test} if self.settings.test else {})
        found: dict[str, tuple[Entry, ...]] = {
            member: find_cases({member: folder})[0] for member, folder in data.items()
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


def _same_file(source: Path, target: Path) -> None:
    """Give the file a second name, or where the disk knows no such thing a copy; files are replaced, never written into."""
    unfinished = target.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    unfinished.replace(target)
