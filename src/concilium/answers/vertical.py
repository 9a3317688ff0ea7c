"""Answers to `Front`, `Tail` and `Finish` at a party of vertical training, which holds some channels of patients, or the labels.

The party's front sees its own channels. Where the labels are, the tail is there too. All parties draw the same patches of the
same cases, by the key of the step alone. After Roth et al. 2022, Split-U-Net (arXiv:2208.10553).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from concilium.answers import Cancelled, Check, Job, noise_key
from concilium.answers.objective import make_objective
from concilium.answers.split import back_propagate, image_would_leave, leaf, shows
from concilium.answers.train import Learner
from concilium.data.draws import seed_all
from concilium.data.patches import Batch, stream
from concilium.data.places import Key
from concilium.defences import penalty_of, undefended
from concilium.errors import ContractError
from concilium.messages import Done, Finish, Front, Gradients, Maps, Placed, Tail, Trained, Where
from concilium.networks import Stack, Stages
from concilium.networks._fusion import FUSE, Fuse, Own
from concilium.optimization import are_of, autocast, clip_and_step, floats_of, gradient_of, set_rate
from concilium.transport import decode, decode_like, encode

DRAWN = "vertical"
"""In the keys of batches, in place of the site: all parties draw the same."""


class Party:
    """One round of vertical training at a party. Between two requests it holds the graph of the step at hand."""

    def __init__(self, learner: Learner, request: Front, *, site: str) -> None:
        if learner.own is None:
            raise ContractError(f"{request.model} is no network of parties at {site}. Expected one. Report this.")
        self.learner = learner
        self.own: Own = learner.own
        self.site = site
        self.model, self.round, self.steps = request.model, request.round, request.steps
        self.transport = request.transport
        job = learner.job
        batches = learner.begin(request.weights, site=site, model=request.model, begins=request.begins)
        self._keys = keys_of(job, request.round, request.steps)
        if request.places:
            batches.tell(dict(zip(self._keys, request.places, strict=False)))
        self._batches: Iterator[Batch] = stream(batches, self._keys, workers=job.training.loader_workers)
        self._front, self._defences = undefended(self.own.front)
        self._secret = noise_key(job, request.model, self._front.state_dict()) if self._defences.names else ()
        """What draws noise that nobody else can draw again."""
        self._penalty: Tensor | None = None
        self._drawn = 0
        self._objective = make_objective(job)
        self._at = -1
        """The step that was last begun."""
        self._awaits = ""
        """What must come before the next step: `tail`, or nothing."""
        self._losses: list[float] = []
        self._taken = 0
        self._seconds = 0.0
        self._sent: Stack = ()
        self._batch: Batch | None = None

    def front(self, request: Front, cancelled: Check) -> Maps | Done:
        """Finish the step before, if there is one, draw the batch, and run the front on it; `Done` where nothing is annotated.

        Raises:
            ContractError: another step was to come, or the gradients are not those of the maps that were sent.
            PrivacyError: the image itself would leave the site.
            FloatingPointError: the gradient is not finite, or a map cannot travel.
            Cancelled: the request was cancelled.
        """
        began = time.monotonic()
        if (request.model, request.round) != (self.model, self.round) or not self._at < request.step < self.steps:
            raise self._refusal(f"front of step {request.step} of {request.model}, round {request.round}")
        if self._awaits:
            raise self._refusal(f"front of step {request.step}")
        self._finish_step(request.gradients)
        if cancelled():
            raise Cancelled
        training, device = self.learner.job.training, self.learner.device
        while self._drawn <= request.step:  # those in which this party was absent are drawn, and left
            self._batch = next(self._batches)
            self._drawn += 1
        batch = self._batch = self._batch.to(device) if self._batch is not None else None
        self._at = request.step
        set_rate(
            self.learner.optimizer, training, step=request.first_step + request.step, total_steps=request.total_steps
        )
        self.learner.optimizer.zero_grad(set_to_none=True)
        known = batch is not None and not batch.is_unknown
        labelled = self.own.tail is not None
        if batch is None or request.absent or not self.own.front.names or (labelled and not known):
            self._awaits = "tail" if labelled and known else ""
            return Done() if labelled and not known else Maps(())
        seed_all(self.learner.job.seed, self.site, request.round, request.step, "step", *self._secret)
        with autocast(device, training.precision):
            sent = self._front.run((batch.image,))
            if not self._taken and any(shows(batch.image, m) for m in sent):
                raise image_would_leave(self._front.names[-1])
            self._sent = self._defences.run(sent)
        self._penalty = penalty_of(self._defences, batch.image, self._sent)
        self._awaits = "tail" if labelled else ""
        self._taken += not labelled
        self._seconds += time.monotonic() - began
        return Maps(encode(self._sent, self.transport))

    def tail(self, request: Tail) -> Gradients:
        """Run the tail and the loss, and send the gradients of the maps that came.

        Raises:
            ContractError: another step was to come, the labels are not here, or the maps are not what the tail needs.
            FloatingPointError: the loss is not finite, or a gradient cannot travel.
        """
        began = time.monotonic()
        tail, batch = self.own.tail, self._batch
        given = (request.model, request.round, request.step)
        if tail is None or batch is None or self._awaits != "tail" or given != (self.model, self.round, self._at):
            raise self._refusal(f"tail of step {request.step} of {request.model}, round {request.round}")
        maps = [
            leaf(m.to(self.learner.device))
            for m in decode(request.maps, self.transport, dtype=floats_of(self.own.held))
        ]
        if len(maps) != tail.reach() or not all(m.is_floating_point() for m in maps):
            raise ContractError(
                f"{len(maps)} maps came to {self.site}. Expected {tail.reach()}, all float. Start the round again."
            )
        set_absent(tail, request.absent)
        seed_all(self.learner.job.seed, self.site, self.round, self._at, "tail")
        with autocast(self.learner.device, self.learner.job.training.precision):
            logits = tail.run(tuple(maps))[::-1]
        loss = self._objective(logits, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"The loss of {self.model} is {value} at step {self._at} of round {self.round}.")
        loss.backward()  # type: ignore[no-untyped-call]
        self._losses.append(value)
        self._awaits = ""
        self._seconds += time.monotonic() - began
        return Gradients(encode((gradient_of(m) for m in maps), self.transport))

    def finish(self, request: Finish) -> Trained:
        """Finish the last step; the update of the party's part.

        Raises:
            ContractError: a step is not finished, or the gradients are not those of the maps that were sent.
            FloatingPointError: the gradient, or a weight, is not finite.
        """
        began = time.monotonic()
        if (request.model, request.round) != (self.model, self.round) or self._awaits:
            raise self._refusal(f"end of round {request.round} of {request.model}")
        self._finish_step(request.gradients)
        self._seconds += time.monotonic() - began
        losses = self._losses if self.own.tail is not None else [0.0] * self._taken
        trained = self.learner.finish(losses, model=self.model, round=self.round, send=True, seconds=self._seconds)
        return replace(trained, loss=trained.loss if self.own.tail is not None else 0.0)

    def _finish_step(self, gradients: Sequence[Tensor]) -> None:
        """Back-propagate through the front with the gradients that came, and step; nothing where nothing was done."""
        if self._sent:
            gradients = decode_like(gradients, self.transport, self._sent)
            if gradients and not are_of(gradients, self._sent):
                raise ContractError(
                    f"{len(gradients)} gradients came to {self.site}. Expected {len(self._sent)}, in shape and type of the maps "
                    "that were sent, or none. Start the round again."
                )
            trains = [i for i, m in enumerate(self._sent) if m.requires_grad]
            if gradients:
                came = [gradients[i].to(self.learner.device) for i in trains]
                back_propagate([self._sent[i] for i in trains], came, self._penalty)
        parameters = list(self.learner.network.parameters())
        if any(p.grad is not None for p in parameters):
            clip_and_step(parameters, self.learner.optimizer, self.learner.job.training.clip_norm)
            self.learner.optimizer.zero_grad(set_to_none=True)
        self._sent, self._penalty = (), None

    def _refusal(self, what: str) -> ContractError:
        after = f"after the front of step {self._at}, {self._awaits or 'a front'}"
        return ContractError(
            f"The {what} was asked for. Expected {after}, of {self.model}, round {self.round}. Start the round again."
        )


def keys_of(job: Job, round: int, steps: int) -> list[Key]:
    """The keys of a round's batches, the same at all parties."""
    return [(job.seed, DRAWN, round, step) for step in range(steps)]


def place(job: Job, request: Where) -> Placed:
    """Where the patches of a round lie.

    Raises:
        ContractError: the labels are not here, or there is nothing to train on.
    """
    if not job.labelled or job.batches is None:
        raise ContractError(
            f"{request.model}: places of patches were asked for where there are no labels to train on. Only who has labels can "
            "tell. Report this."
        )
    return Placed(job.batches.places(keys_of(job, request.round, request.steps)))


def set_absent(network: Stages, absent: Sequence[str]) -> None:
    """Tell the stage where maps meet, if the network has it, which parties are missing."""
    if FUSE in network.names and isinstance(stage := network[FUSE], Fuse):
        stage.absent = frozenset(absent)
