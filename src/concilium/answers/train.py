"""Answer to `Train`: a model at a site, its optimiser, and the steps it takes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from concilium import catalog
from concilium.aggregation import check_like
from concilium.answers import Cancelled, Check, Job
from concilium.data.augment import deep_supervision_weights
from concilium.data.draws import seed_all
from concilium.data.patches import Batches, stream
from concilium.errors import ContractError, DataError
from concilium.local_updates import Local
from concilium.messages import Tensors, Train, Trained, Training
from concilium.wire import read_tensors, write_tensors

POWER = 0.9
"""Exponent of the polynomial decay of the learning rate (Isensee et al. 2021)."""


class Learner:
    """A model that trains at a site: network, optimiser, and in float16 the loss scale."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job = job
        self.device = device
        self.network = job.network().to(device)
        self.optimizer = make_optimizer(self.network, job.training)
        self.scaler = torch.amp.GradScaler(device.type) if job.training.precision == "float16" else None
        self.trained = False

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
        tensors = {f"weights/{n}": t for n, t in self.weights().items()}
        numbers: dict[str, Any] = {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{name}"] = value.detach().cpu().contiguous()
                else:
                    numbers[f"{index}/{name}"] = value
        scale = self.scaler.state_dict() if self.scaler else {}
        write_tensors(path, tensors, {"optimizer": json.dumps(numbers), "scaler": json.dumps(scale)})

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote."""
        tensors, about = read_tensors(path)
        self.load_weights({n.removeprefix("weights/"): t for n, t in tensors.items() if n.startswith("weights/")})
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/", 2)
                state.setdefault(int(index), {})[key] = tensor
        for name, number in json.loads(about["optimizer"]).items():
            index, key = name.split("/", 1)
            state.setdefault(int(index), {})[key] = number
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.scaler:
            self.scaler.load_state_dict(json.loads(about["scaler"]))

    def train(self, request: Train, *, site: str, cancelled: Check) -> Trained:
        """Take the steps that were asked for.

        Raises:
            ContractError: the weights are not this network's, or there never were any.
            DataError: there is nothing to train on.
            FloatingPointError: the loss, or a weight, is not finite.
            Cancelled: the request was cancelled.
        """
        started = time.monotonic()
        batches = self.job.batches
        if batches is None:
            raise DataError(
                f"{site} has no training cases in this fold. Expected at least one. Choose other folds.",
                code="no_training_cases",
            )
        if request.weights:
            self.load_weights(request.weights)
        if not self.trained:
            raise ContractError(
                f"{site} has no weights of {request.model}. The first round must send them. Start the run again."
            )
        self.network.train()
        losses = self._steps(batches, request, site, cancelled)
        # a loss is that before its step: the last step may have ruined the weights unnoticed
        if not all(bool(torch.isfinite(t).all()) for t in self.network.parameters()):
            raise FloatingPointError(f"Weights of {request.model} are not finite after round {request.round}.")
        weights = self.weights() if request.send_weights else {}
        n_cases = len(self.job.entries["training"])
        return Trained(weights, n_cases, request.steps, sum(losses) / len(losses), time.monotonic() - started)

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
        )
        keys = [(self.job.seed, site, request.round, step) for step in range(request.steps)]
        losses: list[float] = []
        for step, (image, labels) in enumerate(stream(batches, keys, workers=training.loader_workers)):
            if cancelled():
                raise Cancelled
            rate = training.learning_rate * (1 - (request.first_step + step) / request.total_steps) ** POWER
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            seed_all(*keys[step], "step")  # whatever drew the batch, dropout and the like draw from here
            loss = float(take(local, image.to(self.device), [x.to(self.device) for x in labels]))
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of {request.model} is {loss} at step {step} of round {request.round}."
                )
            losses.append(loss)
        return losses


def make_optimizer(network: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimiser, over the parameters that train; without `requires_grad` a parameter has no state."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    match training.optimizer:
        case "sgd":
            return torch.optim.SGD(
                parameters,
                training.learning_rate,
                momentum=training.momentum,
                weight_decay=training.weight_decay,
                nesterov=training.momentum > 0,
            )
        case "adam":
            return torch.optim.Adam(parameters, training.learning_rate, weight_decay=training.weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, training.learning_rate, weight_decay=training.weight_decay)
    raise ContractError(f"Optimiser {training.optimizer!r} is not known. Known: sgd, adam, adamw. Correct the request.")


def make_objective(job: Job) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    """Loss over the scales of deep supervision: each weighs half of the finer one, the coarsest nothing (Isensee et al. 2021)."""
    plug_in = job.training.loss
    loss = partial(catalog.load("losses", plug_in.name), batch_dice=job.plan.batch_dice, **plug_in.options)
    weights = deep_supervision_weights(job.plan) if job.training.deep_supervision else (1.0,)

    def objective(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        scales = weights if len(logits) > 1 else (1.0,)  # a network without deep supervision has one scale
        terms = [w * loss(x, y, None) for w, x, y in zip(scales, logits, labels, strict=False) if w]
        return cast(Tensor, sum(terms[1:], terms[0]))

    return objective


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which the network computes in this precision; weights stay float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))
