"""Answer to `Train`: a model at a site, its optimiser, and the steps it takes."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from concilium import catalog
from concilium.aggregation import check_like
from concilium.answers import Cancelled, Check, Job
from concilium.data.augment import deep_supervision_weights
from concilium.data.draws import seed_all
from concilium.data.labels import has_regions, ignored
from concilium.data.patches import Batches, stream
from concilium.errors import ContractError, DataError
from concilium.local_updates import Brought, Local, brought_by
from concilium.messages import Tensors, Train, Trained
from concilium.networks import Parts, cut_apart
from concilium.optimization import autocast, make_optimizer, restore_state, set_rate, state_of
from concilium.wire import read_tensors, write_tensors


@dataclass(frozen=True)
class Cut:
    """Where a network is split, and whether heads may act on maps that the server made."""

    after: tuple[str, ...]
    reveal_labels: bool


class Learner:
    """A model that trains at a site: network, optimiser, and in float16 the loss scale.

    With a cut it is the front and the tail only; the body between them is the server's.
    """

    def __init__(self, job: Job, device: torch.device, cut: Cut | None = None) -> None:
        self.job = job
        self.device = device
        self.cut = cut
        self.parts: Parts | None = None
        self.brought: Brought | None = None
        if cut is not None:
            whole = job.network(deep_supervision=job.training.deep_supervision and cut.reveal_labels)
            self.parts = cut_apart(whole, cut.after, reveal_labels=cut.reveal_labels)
        else:
            self.brought = brought_by(
                job.training.local_update, plan=job.plan, labels=job.labels, channels=job.channels, device=device
            )
        if self.brought is not None:
            self.network, self.scaler = self.brought.network.to(device), self.brought.scaler
        else:
            self.network = (self.parts.at_site if self.parts else job.network()).to(device)
            self.scaler = torch.amp.GradScaler(device.type) if job.training.precision == "float16" else None
        self._optimizer = None if self.brought else make_optimizer(self.network, job.training)
        self.trained = False

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over the parameters that train."""
        return self.brought.optimizer if self.brought else cast(torch.optim.Optimizer, self._optimizer)

    def load_weights(self, weights: Tensors) -> None:
        """Replace all weights.

        Raises:
            ContractError: they are not those of this network.
        """
        check_like(weights, self.network.state_dict())
        self.network.load_state_dict(dict(weights))
        self.trained = True

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights, on the CPU."""
        return {name: t.detach().cpu().clone() for name, t in self.network.state_dict().items()}

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights, of a model that has any but those it was built with.

        Raises:
            ContractError: it never received nor trained any.
        """
        if not self.trained:
            raise ContractError(
                "A model that never trained here was asked for. Only one that did can be kept. Train it first."
            )
        return self.weights()

    def save(self, path: Path) -> None:
        """Write weights and optimiser, at once or not at all."""
        moments, numbers = state_of(self.optimizer)
        tensors = {f"weights/{n}": t for n, t in self.weights().items()}
        tensors |= {f"optimizer/{n}": t for n, t in moments.items()}
        scale = self.scaler.state_dict() if self.scaler else {}
        write_tensors(path, tensors, {"optimizer": numbers, "scaler": json.dumps(scale)})

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote."""
        tensors, about = read_tensors(path)
        self.load_weights({n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")})
        moments = {n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")}
        restore_state(self.optimizer, moments, about["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(json.loads(about["scaler"]))

    def begin(self, weights: Tensors, *, site: str, model: str) -> Batches:
        """Take over the weights, where there are any, and get ready to take steps; where the batches come from.

        Raises:
            ContractError: the weights are not this network's, or there never were any.
            DataError: there is nothing to train on.
        """
        if self.job.batches is None:
            raise DataError(
                f"{site} has no training cases in this fold. Expected at least one. Choose other folds.",
                code="no_training_cases",
            )
        if weights:
            self.load_weights(weights)
        if not self.trained:
            raise ContractError(
                f"{site} has no weights of {model}. The first round must send them. Start the run again."
            )
        self.network.train()
        return self.job.batches

    def finish(self, losses: Sequence[float], *, model: str, round: int, send: bool, seconds: float) -> Trained:
        """What the site answers after the steps with these losses.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        # a loss is that before its step: the last step may have ruined the weights unnoticed
        if not all(bool(torch.isfinite(t).all()) for t in self.network.parameters()):
            raise FloatingPointError(f"Weights of {model} are not finite after round {round}.")
        n_cases = len(self.job.entries["training"])
        return Trained(self.weights() if send else {}, n_cases, len(losses), sum(losses) / len(losses), seconds)

    def train(self, request: Train, *, site: str, cancelled: Check) -> Trained:
        """Take the steps that were asked for.

        Raises:
            ContractError: the weights are not this network's, or there never were any.
            DataError: there is nothing to train on.
            FloatingPointError: the loss, or a weight, is not finite.
            Cancelled: the request was cancelled.
        """
        started = time.monotonic()
        batches = self.begin(request.weights, site=site, model=request.model)
        if self.brought is not None:
            self.brought.begin(total_steps=request.total_steps)
        losses = self._steps(batches, request, site, cancelled)
        if self.brought is not None:
            self.brought.end()
        seconds = time.monotonic() - started
        return self.finish(losses, model=request.model, round=request.round, send=request.send_weights, seconds=seconds)

    def _steps(self, batches: Batches, request: Train, site: str, cancelled: Check) -> list[float]:
        training = self.job.training
        take = partial(catalog.load("local_updates", training.local_update.name), **training.local_update.options)
        local = Local(
            self.network,
            self.optimizer,
            make_objective(self.job),
            partial(autocast, self.device, training.precision),
            request.weights,
            training.clip_norm,
            self.scaler,
            self.brought,
        )
        keys = [(self.job.seed, site, request.round, step) for step in range(request.steps)]
        losses: list[float] = []
        for step, (image, labels) in enumerate(stream(batches, keys, workers=training.loader_workers)):
            if cancelled():
                raise Cancelled
            if self.brought is not None:
                self.brought.set_rate(request.first_step + step)
            else:
                set_rate(self.optimizer, training, step=request.first_step + step, total_steps=request.total_steps)
            seed_all(*keys[step], "step")  # whatever drew the batch, dropout and the like draw from here
            loss = float(take(local, image.to(self.device), [x.to(self.device) for x in labels]))
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of {request.model} is {loss} at step {step} of round {request.round}."
                )
            losses.append(loss)
        return losses


def make_objective(job: Job) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    """Loss over the scales of deep supervision: each weighs half of the finer one, the coarsest nothing (Isensee et al. 2021)."""
    plug_in = job.training.loss
    function = catalog.load("losses", plug_in.name)
    labels = {"regions": has_regions(job.labels), "ignore": ignored(job.labels)}
    needed = {key: value for key, value in labels.items() if value not in (False, None)}
    known = inspect.signature(function).parameters
    if missing := [key for key in needed if key not in known]:
        raise ContractError(
            f"Loss {plug_in.name} takes no {' and no '.join(missing)}, which these labels have. Allowed is one that does, "
            "such as dice_ce. Choose another [loss]."
        )
    loss = partial(function, batch_dice=job.plan.batch_dice, **needed, **plug_in.options)
    weights = deep_supervision_weights(job.plan) if job.training.deep_supervision else (1.0,)

    def objective(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        scales = weights if len(logits) > 1 else (1.0,)  # a network without deep supervision has one scale
        terms = [w * loss(_full(x), y, None) for w, x, y in zip(scales, logits, labels, strict=False) if w]
        return cast(Tensor, sum(terms[1:], terms[0]))

    return objective


def _full(logits: Tensor) -> Tensor:
    """Logits in float32 at least: a loss sums over more voxels than the digits of half precision can tell."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
