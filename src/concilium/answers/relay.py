"""Answers to `Introduce`, `Pass`, `Hand` and `Take`: weights that sites pass on, sealed for one another (`sealing.py`).

What was passed on once leaves this site sealed or not at all: a file beside the model's states says so, and requests that would
send its weights in the open are refused, whatever life of the site they find. A message is opened once: it is bound to its round,
and a round that was taken is not taken again unless the site went back to before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from concilium.answers import Check, Job, Settings, complete
from concilium.answers.models import Models
from concilium.answers.train import Learner
from concilium.errors import ContractError, PrivacyError
from concilium.messages import Card, Done, Hand, Handed, Introduce, Introduced, Pass, Passed, Reply, Take, Tensors
from concilium.sealing import NOTHING, About, check_card, make_card, own_key, seal, unseal

Carried: TypeAlias = Introduce | Hand | Take


class Relay:
    """What a site must know to pass weights on in one run."""

    def __init__(self, settings: Settings, *, run: str) -> None:
        self._settings, self._run = settings, run
        self._last: dict[str, int] = {}
        """Model -> the last round whose weights were opened here, in this life or before the snapshot it went back to."""

    def answer(self, request: Carried, models: Models, job: Callable[[], Job]) -> Reply:
        """The reply to what is no training. A site shows its card, and takes a finished model, before it is prepared too."""
        match request:
            case Introduce():
                return self.introduce()
            case Hand():
                return self.hand(models.learner(job(), request.model), request)
            case Take():
                models.keep(request.model, complete(job(), self.take(request)))
        return Done()

    def introduce(self) -> Introduced:
        """The site's card."""
        return Introduced(make_card(self._settings.name, self._run, self._own(), self._settings.identity))

    def train(self, learner: Learner, request: Pass, cancelled: Check) -> Passed:
        """Open, train, seal.

        Raises:
            ContractError: the weights are not for this site and round, or this network's, or there never were any.
            PrivacyError: a card is not that of a site of this federation, or the model was passed on otherwise before.
            DataError, FloatingPointError, Cancelled: as in training.
        """
        order, name = request.train, self._settings.name
        self._mark(request.model, reveal=request.reveal)
        received = order.weights
        if request.sender is not None:
            if order.round <= self._last.get(request.model, 0):
                raise ContractError(
                    f"Weights of {request.model} for round {order.round} came to {name}. It has taken those of round "
                    f"{self._last[request.model]}. Go back to a snapshot before it."
                )
            received = self._open(request.sealed, request.sender, request, "pass")
        trained = learner.train(replace(order, weights=received, send_weights=False), site=name, cancelled=cancelled)
        sealed = NOTHING
        if request.to is not None:
            sealed = self._seal(learner.weights(), request, request.to, "pass", request.to_round)
        self._last[request.model] = order.round
        return Passed(trained, sealed)

    def hand(self, learner: Learner, request: Hand) -> Handed:
        """Seal a model's weights once more; or send them, where that was said from the start.

        Raises:
            ContractError: the model was not passed on here.
            PrivacyError: a card is not that of a site of this federation, or the weights may not leave in the open.
        """
        self._mark(request.model, reveal=request.reveal)
        weights = learner.trained_weights()
        if request.to is not None:
            purpose = "final" if request.final else "pass"
            return Handed(self._seal(weights, request, request.to, purpose, request.round), {})
        if not request.reveal:
            raise PrivacyError(
                f"The weights of {request.model} were asked for in the open. They leave {self._settings.name} sealed. Ask for "
                "them so.",
                rule="sealed",
            )
        return Handed(NOTHING, weights)

    def take(self, request: Take) -> Tensors:
        """A finished model.

        Raises:
            ContractError: it is not for this site, or not finite.
            PrivacyError: the sender's card is not that of a site of this federation.
        """
        self._mark(request.model, reveal=request.reveal)
        return self._open(request.sealed, request.sender, request, "final")

    def went_back(self, model: str, number: int) -> None:
        """The site is where it was after this round."""
        self._last[model] = number

    def check_open(self, model: str) -> None:
        """Check that this model's weights may leave as they are.

        Raises:
            PrivacyError: they were passed on sealed before.
        """
        if self._mark_of(model).is_file():
            raise PrivacyError(
                f"Weights of {model} were asked for in the open. They were passed on sealed before, and leave "
                f"{self._settings.name} in no other way. Use another name for another model.",
                rule="sealed",
            )

    # ------------------------------------------------------------------------------------------------------- internals

    def _own(self) -> X25519PrivateKey:
        return own_key(self._settings.sealing_key or self._settings.folder / "sealing.key")

    def _mark_of(self, model: str) -> Path:
        return self._settings.folder / "states" / model / "sealed.json"

    def _mark(self, model: str, *, reveal: bool) -> None:
        """Note that a model is passed on sealed, and whether the server is to have it in the end.

        Raises:
            PrivacyError: another thing was said before.
        """
        path = self._mark_of(model)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"reveal": reveal}), encoding="utf-8")
            unfinished.replace(path)
        noted = json.loads(path.read_text(encoding="utf-8"))["reveal"]
        if noted != reveal:
            raise PrivacyError(
                f"{model} came with reveal = {reveal}. It began here with reveal = {noted}, and goes on so. Begin another run.",
                rule="sealed",
            )

    def _seal(self, weights: Tensors, request: Pass | Hand, to: Card, purpose: str, number: int) -> Tensor:
        receiver = check_card(to, self._run, self._settings.identity)
        about = About(self._run, request.model, number, self._settings.name, to.site, purpose, request.reveal)
        return seal(weights, about, own=self._own(), receiver=receiver)

    def _open(self, sealed: Tensor, sender: Card, request: Pass | Take, purpose: str) -> Tensors:
        known = check_card(sender, self._run, self._settings.identity)
        about = About(
            self._run, request.model, request.round, sender.site, self._settings.name, purpose, request.reveal
        )
        opened = unseal(sealed, about, own=self._own(), sender=known)
        if not all(bool(torch.isfinite(t).all()) for t in opened.values()):
            raise ContractError(
                f"Weights of {about.model} from {about.sender} in round {about.round} are not finite. Expected finite ones. Go "
                "on from others."
            )
        return opened
