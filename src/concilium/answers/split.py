"""Answers to `Front`, `Tail` and `Finish`: a site's part of split training, where the body of the network is the server's.

Image and label map stay here, and so do the heads. What is sent was cut off from the graph (`detach`), and every float map
that is sent gets its gradient back. Thapa et al. 2022, SplitFed (arXiv:2004.12088), in the U-shape of Vepakomma et al. 2018
(arXiv:1812.00564), where labels are not shared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from concilium.answers import Cancelled, Check, noise_key
from concilium.answers.micro_batch import must_be_whole
from concilium.answers.objective import make_objective
from concilium.answers.train import Learner
from concilium.data.draws import seed_all
from concilium.data.patches import Batch, stream
from concilium.defences import penalty_of, undefended
from concilium.errors import ContractError, PrivacyError
from concilium.messages import Finish, Front, Gradients, Maps, Tail, Trained
from concilium.networks import Parts, Stack, are_of_kinds
from concilium.optimization import are_of, autocast, clip_and_step, floats_of, gradient_of, set_rate
from concilium.transport import decode, decode_like, encode

POOLED: Mapping[int, tuple[Callable[..., Tensor], ...]] = {
    2: (functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d),
    3: (functional.adaptive_avg_pool3d, functional.adaptive_max_pool3d),
}
"""Number of spatial axes -> how an image may be made smaller."""


class Session:
    """One round of split training at a site. Between two requests it holds the graph of the step at hand."""

    def __init__(self, learner: Learner, request: Front, *, site: str) -> None:
        if learner.parts is None:
            raise ContractError(f"{request.model} was not cut at {site}. A split step needs a cut. Report this.")
        _must_be_guarded(learner, request)
        must_be_whole(
            None if learner.job.by_memory else learner.job.micro_batch, learner.job.plan.batch_size, request.model
        )
        self.learner = learner
        self.parts: Parts = learner.parts
        self.model, self.round, self.steps = request.model, request.round, request.steps
        self.transport = request.transport
        training = learner.job.training
        batches = learner.begin(request.weights, site=site, model=request.model, begins=request.begins)
        self._keys = [(learner.job.seed, site, request.round, step) for step in range(request.steps)]
        self._batches: Iterator[Batch] = stream(batches, self._keys, workers=training.loader_workers)
        self._objective = make_objective(learner.job)
        self._next = ("front", 0)
        """What must be asked for next, and of which step."""
        self._losses: list[float] = []
        self._seconds = 0.0
        self._stack: Stack = ()
        """What the front left in the step at hand; its top `_reach` maps were sent."""
        self._reach = self.parts.body.reach()
        self._front, self._defences = undefended(self.parts.front)
        at_start = self.parts.at_site.state_dict()
        self._secret = noise_key(learner.job, request.model, at_start) if self._defences.names else ()
        self._batch: Batch | None = None
        self._known = True
        """Whether anything is annotated in the batch of the step at hand; otherwise the step changes nothing, anywhere."""
        self._penalty: Tensor | None = None
        """What defences add to the loss of the step at hand."""
        self._own: dict[int, Tensor] = {}
        """Gradients that the tail gave maps of the stack which never left."""

    def front(self, request: Front, cancelled: Check) -> Maps:
        """Finish the step before, if there is one, and run the front on the next batch.

        Raises:
            ContractError: another step was to come, or the gradients are not those of the maps that were sent.
            PrivacyError: the image itself would leave the site.
            FloatingPointError: the gradient is not finite, or a map cannot travel.
            Cancelled: the request was cancelled.
        """
        began = time.monotonic()
        self._expect(request.model, request.round, "front", request.step)
        if request.step > 0:
            self._finish_step(request.gradients)
        if cancelled():
            raise Cancelled
        training, device = self.learner.job.training, self.learner.device
        self._batch = next(self._batches).to(device)
        image = self._batch.image
        self._known = not self._batch.is_unknown
        if not self._known:
            self._next = ("tail", request.step)
            return Maps(())
        set_rate(
            self.learner.optimizer, training, step=request.first_step + request.step, total_steps=request.total_steps
        )
        seed_all(*self._keys[request.step], "step", *self._secret)
        self.learner.optimizer.zero_grad(set_to_none=True)
        with autocast(device, training.precision):
            self._stack = self._front.run((image,))
            if not self._losses and any(shows(image, m) for m in self._stack[self._home :]):
                raise image_would_leave(self._front.names[-1])
            self._stack = self._defences.run(self._stack)
        sent = self._stack[self._home :]
        self._penalty = penalty_of(self._defences, image, sent)
        self._next = ("tail", request.step)
        self._seconds += time.monotonic() - began
        return Maps(encode(sent, self.transport))

    def tail(self, request: Tail) -> Gradients:
        """Run the tail and the loss, and send the gradients of the maps that came.

        Raises:
            ContractError: another step was to come, or the maps are not what the tail needs.
            FloatingPointError: the loss is not finite, or a gradient cannot travel.
        """
        began = time.monotonic()
        self._expect(request.model, request.round, "tail", request.step)
        if not (self._known or request.maps or request.order):
            return self._then(Gradients(()), request.step)
        device, home = self.learner.device, self._home
        maps = decode(request.maps, self.transport, dtype=floats_of(self.learner.network))
        if request.order.count(-1) != len(maps) or any(not -1 <= j < self._reach for j in request.order):
            raise ContractError(
                f"{len(maps)} maps came in the order {request.order}. Expected a -1 for each, and else places of the "
                f"{self._reach} that were sent. Start the round again."
            )
        own = {i: leaf(self._stack[i]) for i in (*range(home), *(home + j for j in request.order if j >= 0))}
        came = [leaf(m.to(device)) for m in maps]
        new = iter(came)
        left = [own[home + j] if j >= 0 else next(new) for j in request.order]
        if not are_of_kinds(left, self.parts.left):
            raise ContractError(
                f"Maps of type {', '.join(str(m.dtype) for m in left)} came, in the order {request.order}. Expected "
                f"{', '.join(self.parts.left)}: whole numbers as uint8, all others float. Start the round again."
            )
        self._descend((*(own[i] for i in range(home)), *left), request.step)
        self._own = {i: m.grad for i, m in own.items() if m.grad is not None}
        self._seconds += time.monotonic() - began
        sent = encode((gradient_of(m) for m in came if m.requires_grad), self.transport)
        return self._then(Gradients(sent), request.step)

    def _then(self, gradients: Gradients, step: int) -> Gradients:
        """These gradients; the front of the next step must come next, or the end."""
        self._batch = None
        self._next = ("front", step + 1) if step + 1 < self.steps else ("finish", self.steps)
        return gradients

    def _descend(self, maps: Stack, step: int) -> None:
        """Run the tail and the loss, and back-propagate to these maps."""
        seed_all(*self._keys[step], "tail")
        with autocast(self.learner.device, self.learner.job.training.precision):
            logits = self.parts.tail.run(maps)[::-1]
        loss = self._objective(logits, cast(Batch, self._batch))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"The loss of {self.model} is {value} at step {step} of round {self.round}.")
        loss.backward()  # type: ignore[no-untyped-call]
        self._losses.append(value)

    def finish(self, request: Finish) -> Trained:
        """Finish the last step; the update of front and tail.

        Raises:
            ContractError: the round has more steps, or the gradients are not those of the maps that were sent.
            FloatingPointError: the gradient, or a weight, is not finite.
        """
        began = time.monotonic()
        self._expect(request.model, request.round, "finish", self.steps)
        self._finish_step(request.gradients)
        self._seconds += time.monotonic() - began
        return self.learner.finish(self._losses, model=self.model, round=self.round, send=True, seconds=self._seconds)

    @property
    def _home(self) -> int:
        """How many maps of the stack stay here."""
        return len(self._stack) - self._reach

    def _expect(self, model: str, round: int, what: str, step: int) -> None:
        if (model, round, what, step) != (self.model, self.round, *self._next):
            raise ContractError(
                f"The {what} of step {step} of {model}, round {round}, was asked for. Expected the {self._next[0]} of step "
                f"{self._next[1]} of {self.model}, round {self.round}. Start the round again."
            )

    def _finish_step(self, gradients: Sequence[Tensor]) -> None:
        """Back-propagate through the front with the gradients that came and those of the maps that stayed, and step."""
        if not (self._known or gradients):
            return
        places = [i for i in range(self._home, len(self._stack)) if self._stack[i].is_floating_point()]
        gradients = decode_like(gradients, self.transport, [self._stack[i] for i in places])
        if not are_of(gradients, [self._stack[i] for i in places]):
            raise ContractError(
                f"{len(gradients)} gradients came. Expected {len(places)}, in shape and type of the float maps that were sent. "
                "Start the round again."
            )
        totals = {i: g.to(self.learner.device) for i, g in zip(places, gradients, strict=True)}
        for i, own in self._own.items():
            totals[i] = totals[i] + own if i in totals else own
        maps = [i for i in totals if self._stack[i].requires_grad]  # not what comes from layers that do not train
        back_propagate([self._stack[i] for i in maps], [totals[i] for i in maps], self._penalty)
        clip_and_step(self.learner.network.parameters(), self.learner.optimizer, self.learner.job.training.clip_norm)
        self._stack, self._own, self._penalty = (), {}, None


def _must_be_guarded(learner: Learner, request: Front) -> None:
    """Check that maps leave where the defences are that the study told of."""
    guard = learner.job.guard
    if guard.defences and (guard.cut, guard.reveal_labels) != (request.cut, request.reveal_labels):
        raise ContractError(
            f"{request.model} was to be cut at {request.cut}. Its defences are at {guard.cut}. Do not take part in this study."
        )


def image_would_leave(after: str) -> PrivacyError:
    """What a site raises in place of sending its image."""
    return PrivacyError(
        f"After {after} the image itself would leave the site. Cut where no map is the image.", rule="image"
    )


def back_propagate(maps: Sequence[Tensor], gradients: Sequence[Tensor], penalty: Tensor | None) -> None:
    """From the maps that were sent to the front's parameters, and from what defences add to the loss."""
    outputs, given = [*maps], cast(list[Tensor | None], [*gradients])
    if penalty is not None and penalty.requires_grad:
        outputs, given = [*outputs, penalty], [*given, None]
    torch.autograd.backward(outputs, given)


def leaf(m: Tensor) -> Tensor:
    """The map cut off from what made it; a float one collects its gradient."""
    return m.detach().requires_grad_(m.is_floating_point())


def shows(image: Tensor, m: Tensor) -> bool:
    """Whether a channel of the map is a channel of the image, or of the image made smaller: by means, maxima or single voxels.

    A channel that is the same number everywhere shows nothing: a patch of air gives dead features, too.
    """
    dims = image.ndim - 2
    size = m.shape[2:]
    if any(small > large for small, large in zip(size, image.shape[2:], strict=True)):
        return False
    smaller = [functional.interpolate(image, size)]  # the image itself, where sizes are equal
    if size != image.shape[2:]:
        smaller += [pool(image, size) for pool in POOLED[dims]]
    told = [i for i in range(image.shape[1]) if bool((image[:, i] != image[0, i].flatten()[0]).any())]
    channels = (s[:, i : i + 1].to(m.dtype) for s in smaller for i in told)
    return any(bool((m == channel).flatten(2).all(2).all(0).any()) for channel in channels)
