"""Local updates: one optimisation step at a site. One file here: one way to take it.

    step(local: Local, batch: Batch, *, ...options) -> Tensor

The result is the loss as a tensor of one element. `Local` lends what a step needs.

A file may have besides

    finish(local: Local, *, steps: int, ...options) -> Tensors

called after the steps of a round: tensors that go to the server beside the weights. It adds the sites' up, weighted by their
share of all training cases, to what it has; every site gets the total with the next round (`Local.control`), at first nothing.

    PERSONAL = True

A second network of the site's own, with an optimiser, that stays there and is evaluated beside the shared one (`Local.personal`).

Where more than the step is its own, a file also has

    bring(*, plan: Plan, labels: Labels, channels: Sequence[str], device: torch.device, ...options) -> Brought

and the site trains that network with that optimiser on those batches. The study's network must be the same one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from concilium import catalog
from concilium.data.labels import Labels
from concilium.data.patches import Batch, Batches
from concilium.data.plan import Plan
from concilium.data.preprocess import Prepared
from concilium.messages import PlugIn, Tensors
from concilium.networks import Stages
from concilium.optimization import clip_and_step


class Brought(Protocol):
    """What a local update brings that is more than a step."""

    network: Stages
    scaler: torch.amp.GradScaler | None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """It may be another after `begin`."""

    def batches(self, prepared: Mapping[str, Path | Prepared]) -> Batches:
        """Where the batches of these cases come from."""

    def begin(self, *, total_steps: int) -> None:
        """Get ready for steps of a model that takes so many in all."""

    def set_rate(self, step: int) -> None:
        """Give the optimiser the learning rate of this step."""

    def end(self) -> None:
        """Raise an error of ours where the steps have left something that a snapshot does not hold."""


@dataclass(frozen=True)
class Local:
    """What a site's optimisation step works on."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Callable[[Sequence[Tensor], Batch], Tensor]
    """Loss of the network's logits against the batch's labels, over all scales."""
    autocast: Callable[[], AbstractContextManager[object]]
    """The precision that the forward pass computes in."""
    received: Tensors
    """The weights that this round started from: what was sent, and what stays here."""
    clip_norm: float
    scaler: torch.amp.GradScaler | None = None
    """Scales the loss in float16 only."""
    brought: Brought | None = None
    """What the local update's own `bring` gave."""
    teacher: Callable[[Tensor], Sequence[Tensor]] | None = None
    """Logits, without gradient, of the network as this round began."""
    control: Tensors = field(default_factory=dict)
    """What the server made of all that `finish` sent."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """The local update's own, kept from step to step and from round to round."""
    personal: Local | None = None
    """The same of the site's own second network."""


def brought_by(
    local_update: PlugIn, *, plan: Plan, labels: Labels, channels: Sequence[str], device: torch.device
) -> Brought | None:
    """What a local update brings, with new weights; `None` where it is a step and no more."""
    bring = _part_of(local_update.name, "bring")
    if bring is None:
        return None
    return cast(Brought, bring(plan=plan, labels=labels, channels=channels, device=device, **local_update.options))


def finish_of(local_update: PlugIn, local: Local, *, steps: int) -> Tensors:
    """What the local update sends beside the weights after the steps of a round."""
    finish = _part_of(local_update.name, "finish")
    return {} if finish is None else cast(Tensors, finish(local, steps=steps, **local_update.options))


def has_personal(name: str) -> bool:
    """Whether a local update trains a second network that stays at its site."""
    return _part_of(name, "PERSONAL") is not None


def is_more_than_a_step(name: str) -> bool:
    """Whether a local update brings network, optimiser and batches."""
    return _part_of(name, "bring") is not None


def _part_of(name: str, part: str) -> Any:
    """What else a local update's module has; `None` where it has not."""
    return getattr(inspect.getmodule(catalog.load("local_updates", name)), part, None)


def descend(local: Local, loss: Tensor) -> None:
    """Back-propagate, clip the gradient to `clip_norm`, and let the optimiser take its step.

    Raises:
        FloatingPointError: the gradient is not finite (in float16 such a step is left out instead).
    """
    parameters = local.network.parameters()
    if local.scaler is None:
        loss.backward()  # type: ignore[no-untyped-call]
        clip_and_step(parameters, local.optimizer, local.clip_norm)
        return
    local.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    local.scaler.unscale_(local.optimizer)
    nn.utils.clip_grad_norm_(parameters, local.clip_norm)
    local.scaler.step(local.optimizer)
    local.scaler.update()
