"""Local updates: one optimisation step at a site. One file here: one way to take it.

    step(local: Local, batch: Batch, *, ...options) -> Tensor

The result is the loss as a tensor of one element, without what the update adds to it, so that losses can be compared. `Local`
lends what a step needs.

A file may have besides

    finish(local: Local, *, steps: int, ...options) -> Tensors

called after the steps of a round: tensors that go to the server beside the weights. It adds the sites' up, weighted by their
share of all training cases, to what it has; every site gets the total with the next round (`Local.control`), at first nothing.

    PERSONAL = True

A second network of the site's own, with an optimiser, that stays there and is evaluated beside the shared one (`Local.personal`).

    TOGETHER = True

It makes sense only where weights are shared: models that train alone (`local`, `centralized`) then take `plain` steps.

    OPTIMIZERS = ("adam", "adamw")

It makes sense with these optimisers of the study only; others are refused.

    check(labels: Labels, **options) -> None

called for every variant before anything trains: it raises a `StudyError` where the update cannot train a network of these
labels.

    doubts(n_patients: int, **options) -> str

what should be known of it at a site of so many patients, which a run warns of.

    PROTOCOLS, COMPUTES_MORE = ("federated",), True

It makes sense with these protocols only. A step of it costs more than one of `plain`, and is not forecast.

    check_network(network: Stages, **options) -> None

called at the server before anything trains, and at each site before each round: it raises a `StudyError` where the update cannot
train this network.

    sample(batches: Batches, patients: Sequence[Sequence[str]], **options) -> an object with `draw(*key) -> Batch`

where patients are drawn, not patches: what draws the steps' batches (`Batch.patients`), from the cases of each patient. The key
then has the site's secret in it, and a digest of the weights that the round starts from, as has what `step` draws from.

    release(*, steps: int, **options) -> tuple[float, float, int]
    account(history: Sequence[tuple[float, float, int]], **options) -> float

of an update with differential privacy: noise, rate and steps of what leaves after a round; and the epsilon of all that left
(`answers/ledger.py`).

Where more than the step is its own, a file also has

    bring(*, plan: Plan, labels: Labels, channels: Sequence[str], device: torch.device, ...options) -> Brought

and the site trains that network with that optimiser on those batches. The study's network must be the same one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    labels: Labels = field(default_factory=dict)
    """What the channels of the logits stand for."""
    micro_batch: int | None = None
    """How many patches the network sees at once; `None`: all of a batch."""
    kept: Callable[[Batch, int | None], Sequence[Tensor]] | None = None
    """Logits of a batch of views, so many at a time, of which stages that do not train have kept what they make."""
    progress: float = 0.0
    """From 0 in the first round to 1 in the last."""
    n_patients: int = 0
    """Who have training cases here."""

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """Those of `received` that train, where the network is."""
        return {name: self.received[name].to(p.device) for name, p in trained(self.network)}


Change: TypeAlias = Iterable[tuple[nn.Parameter, Tensor]]
"""Parameters, and what is added to the gradient of each."""


def trained(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train, each once, also where the network knows it by several names."""
    return ((name, p) for name, p in network.named_parameters() if p.requires_grad)


def brought_by(
    local_update: PlugIn, *, plan: Plan, labels: Labels, channels: Sequence[str], device: torch.device
) -> Brought | None:
    """What a local update brings, with new weights; `None` where it is a step and no more."""
    bring = part_of(local_update.name, "bring")
    if bring is None:
        return None
    return cast(Brought, bring(plan=plan, labels=labels, channels=channels, device=device, **local_update.options))


def finish_of(local_update: PlugIn, local: Local, *, steps: int) -> Tensors:
    """What the local update sends beside the weights after the steps of a round."""
    finish = part_of(local_update.name, "finish")
    return {} if finish is None else cast(Tensors, finish(local, steps=steps, **local_update.options))


def check_labels(local_update: PlugIn, labels: Labels) -> None:
    """Let the local update say whether it can train a network of these labels.

    Raises:
        StudyError: it cannot.
    """
    check = part_of(local_update.name, "check")
    if check is not None:
        check(labels, **local_update.options)


def has_personal(name: str) -> bool:
    """Whether a local update trains a second network that stays at its site."""
    return part_of(name, "PERSONAL") is not None


def is_more_than_a_step(name: str) -> bool:
    """Whether a local update brings network, optimiser and batches."""
    return part_of(name, "bring") is not None


def exchanges(name: str) -> bool:
    """Whether a local update sends more than weights."""
    return part_of(name, "finish") is not None


def needs_others(name: str) -> bool:
    """Whether a local update makes sense only where weights are shared."""
    return part_of(name, "TOGETHER") is not None


def doubts_of(update: PlugIn, n_patients: int) -> str:
    """What a local update says of a site of so many patients."""
    said = part_of(update.name, "doubts")
    return "" if said is None else str(said(n_patients, **update.options))


def optimizers_of(name: str) -> tuple[str, ...]:
    """The optimisers that a local update needs one of; none: any will do."""
    return part_of(name, "OPTIMIZERS") or ()


def when_alone(local_update: PlugIn) -> PlugIn:
    """What a model that trains alone takes in place of a local update."""
    return PlugIn("plain") if needs_others(local_update.name) else local_update


def part_of(name: str, part: str) -> Any:
    """What else a local update's module has; `None` where it has not."""
    return getattr(inspect.getmodule(catalog.load("local_updates", name)), part, None)


def logits_of(local: Local, batch: Batch) -> Sequence[Tensor]:
    """Forget the gradient of the step before, and run the network on the batch, in micro-batches where the site says so."""
    local.optimizer.zero_grad(set_to_none=True)
    with local.autocast():
        if local.kept is not None and batch.views:
            return local.kept(batch, local.micro_batch)
        return in_parts(local.network, (batch.image,), local.micro_batch)


def in_parts(network: Callable[..., Sequence[Tensor]], maps: Sequence[Tensor], size: int | None) -> Sequence[Tensor]:
    """Logits of the whole batch, of which the network sees `size` patches at a time; of each part the logits alone are kept.

    Back-propagation then runs the network on each part once more, with the same draws of chance, and forgets it again. So the
    gradient is that of the whole batch, for a loss that counts over it too: gradients of parts, added up, are not (nnU-Net's
    Dice). Chen et al. 2016 (arXiv:1604.06174), over the batch as Gao et al. 2021 (arXiv:2101.06983).
    """
    if size is None or size >= len(maps[0]):
        return network(*maps)
    each = zip(*(torch.split(m, size) for m in maps), strict=True)
    parts = [checkpoint(network, *part, use_reentrant=False) for part in each]
    return tuple(torch.cat(scale) for scale in zip(*parts, strict=True))


def descend(local: Local, loss: Tensor, change: Change = ()) -> None:
    """Back-propagate, clip the gradient to `clip_norm`, and let the optimiser take its step.

    A `change` is made before the gradient is clipped: then no step is longer than in plain training, and where gradient and
    change cancel, they do so whatever the norm. It is worked out after back-propagation, a parameter at a time. A parameter that
    the loss does not depend on has no gradient, and is left as it is.

    Raises:
        FloatingPointError: the gradient is not finite (in float16 such a step is left out instead).
    """
    parameters = local.network.parameters()
    if local.scaler is None:
        loss.backward()  # type: ignore[no-untyped-call]
        _make(change)
        clip_and_step(parameters, local.optimizer, local.clip_norm)
        return
    local.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    local.scaler.unscale_(local.optimizer)
    _make(change)
    nn.utils.clip_grad_norm_(parameters, local.clip_norm)
    local.scaler.step(local.optimizer)
    local.scaler.update()


def _make(change: Change) -> None:
    for parameter, added in change:
        if parameter.grad is not None:
            parameter.grad.add_(added)


def take(local: Local, batch: Batch, change: Change = ()) -> Tensor:
    """Take a step down the loss, with a change of its gradient; the loss before it.

    Where nothing is annotated there is no step to take.
    """
    if batch.is_unknown:
        return torch.zeros(())
    loss = local.objective(logits_of(local, batch), batch)
    descend(local, loss, change)
    return loss.detach()


def pull(local: Local, weight: float) -> Change:
    """The gradient of `weight` / 2 times the squared distance to the weights that the round started from."""
    if weight == 0:
        return ()
    return ((p, weight * (p.detach() - local.start[name])) for name, p in trained(local.network))
