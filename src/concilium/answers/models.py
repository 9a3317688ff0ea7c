"""The models of a site and their states between requests: at most one in memory, the others on disk.

A state on disk is weights and optimiser. `working` is the one after the last request; numbered ones are snapshots of rounds.
Files are replaced, never written into, so that a snapshot is a second name of the same file.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from concilium.answers import Cut, Job
from concilium.answers.features import FOLDER
from concilium.answers.split import Session
from concilium.answers.train import Learner
from concilium.answers.vertical import Party
from concilium.errors import ContractError, PrivacyError
from concilium.messages import Front, Tensors
from concilium.wire import header_of, part, read_tensors, write_tensors


class Models:
    """See the module's text."""

    def __init__(self, folder: Path, device: torch.device, *, site: str) -> None:
        self.site = site
        self.device = device
        self._folder = folder
        self._resident: tuple[str, Learner] | None = None
        self._dirty = False
        """Whether the model in memory differs from its state on disk."""
        self._session: Session | Party | None = None
        """The round of split training at hand; its model stays in memory until it is over."""

    def learner(self, job: Job, model: str, cut: Cut | None = None) -> Learner:
        """The model, in memory; the one that was there goes to disk.

        Raises:
            PrivacyError: it trained here as a party's part, and is asked for as another network.
        """
        if self._resident is not None and self._resident[0] == model and self._resident[1].cut == cut:
            self._write_working()  # a request that fails goes back to the state on disk
            return self._resident[1]
        self.park()
        learner = Learner(job, self.device, cut, self._folder)
        if learner.own is None and self._is_of_party(model):
            raise _not_apart(model)
        if self._working(model).is_file():
            learner.load(self._working(model))
        self._resident, self._dirty = (model, learner), False
        return learner

    def changed(self) -> None:
        """The model in memory has trained: its state on disk is no longer the last one."""
        self._dirty = True

    def begin(self, job: Job, request: Front) -> Session | Party:
        """Begin a round of split or vertical training."""
        self.give_up()
        cut = Cut(request.cut, request.reveal_labels, self.site if request.party else "")
        kind = Party if request.party else Session
        self._session = kind(self.learner(job, request.model, cut), request, site=self.site)
        return self._session

    @property
    def session(self) -> Session | Party:
        """The round of split training at hand.

        Raises:
            ContractError: there is none.
        """
        if self._session is None:
            raise ContractError(
                f"{self.site} was asked for a step of a round that it has not begun. Expected the round's first step. "
                "Start the round again."
            )
        return self._session

    def end(self) -> None:
        """The round of split training is over, and its model has trained."""
        self._session = None
        self.changed()

    def give_up(self) -> None:
        """Whoever asked has given up the round of split training at hand: its model goes back to the state before it."""
        if self._session is not None:
            self.drop(self._session.model)

    def park(self) -> None:
        """Write the model in memory to disk and let go of it; between two split steps it stays."""
        if self._session is None:
            self._write_working()
            self._resident = None

    @property
    def is_between_steps(self) -> bool:
        """Whether a round of split training is at hand."""
        return self._session is not None

    def drop(self, model: str) -> None:
        """Let go of what the model has become in memory: its state is the one on disk again."""
        if self._session is not None and self._session.model == model:
            self._session = None
        if self._resident is not None and self._resident[0] == model:
            self._resident, self._dirty = None, False

    def snapshot(self, model: str, number: int) -> None:
        """Keep the state under this number; older ones than the one before go."""
        if self._resident is not None and self._resident[0] == model:
            self._write_working()
        if self._working(model).is_file():  # a site that never trained has no state, and its snapshot is none
            _same_file(self._working(model), self._numbered(model, number))
        for old in self._states(model).glob("[0-9]*.safetensors"):
            if int(old.stem) < number - 1:
                old.unlink()

    def restore(self, model: str, number: int) -> None:
        """Go back to a snapshot.

        Raises:
            ContractError: there are earlier ones, but not this.
        """
        self.drop(model)
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
                f"{self.site} has no snapshot {number} of {model}, but others. Expected {snapshot}. Start the run again."
            )

    def forget(self, model: str, *, finished: bool) -> None:
        """Drop state and snapshots, and with `finished` the finished weights."""
        self.drop(model)
        shutil.rmtree(self._states(model), ignore_errors=True)
        shutil.rmtree(self._folder / FOLDER, ignore_errors=True)  # a model that has use for it makes it again
        if finished:
            self._finished(model).unlink(missing_ok=True)

    def keep(self, model: str, weights: Tensors) -> None:
        """Store the weights of a finished model."""
        write_tensors(self._finished(model), weights, {})

    def in_training(self, model: str) -> Tensors:
        """The weights of a model in training; of split training, those of front and tail.

        Raises:
            ContractError: it never trained here.
        """
        if self._resident is not None and self._resident[0] == model:
            return self._resident[1].trained_weights()
        if not self._working(model).is_file():
            raise ContractError(
                f"{self.site} was asked for what it keeps of {model}. It never trained that. Train it first."
            )
        return part(read_tensors(self._working(model))[0], "weights/")

    def to_be_fetched(self, model: str) -> Tensors:
        """The same, for what of it may leave.

        Raises:
            ContractError: it never trained here.
            PrivacyError: it is a party's part of a network.
        """
        self.park()
        if self._is_of_party(model):
            raise _not_apart(model)
        return self.in_training(model)

    def _is_of_party(self, model: str) -> bool:
        """Whether the state on disk is that of a party's part of a network."""
        return self._working(model).is_file() and "party" in header_of(self._working(model))

    def finished(self, model: str) -> Tensors:
        """The weights of a finished model.

        Raises:
            ContractError: there are none.
        """
        return read_tensors(self._finished(model))[0]

    def _states(self, model: str) -> Path:
        return self._folder / "states" / model

    def _working(self, model: str) -> Path:
        return self._states(model) / "working.safetensors"

    def _numbered(self, model: str, number: int) -> Path:
        return self._states(model) / f"{number:06d}.safetensors"

    def _finished(self, model: str) -> Path:
        return self._folder / "models" / f"{model}.safetensors"

    def _write_working(self) -> None:
        if self._resident is not None and self._dirty:
            self._resident[1].save(self._working(self._resident[0]))
            self._dirty = False


def _not_apart(model: str) -> PrivacyError:
    return PrivacyError(
        f"{model} is asked for as another network than the one that trained here, a party's part. Expected that, or a front "
        "could leave. Do not take part in this study.",
        rule="kept",
    )


def _same_file(source: Path, target: Path) -> None:
    """Give the file a second name, or where the disk knows no such thing a copy."""
    unfinished = target.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    unfinished.replace(target)
