"""Plug-ins that are wrong on purpose: what they break must be noticed."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from concilium.aggregation import Sum
from concilium.data.patches import Batch
from concilium.local_updates import Local
from concilium.local_updates.plain import step as plain
from concilium.losses.dice_ce import loss as dice_ce
from concilium.messages import Tensors
from concilium.networks import Stack, Stage, Stages

SECRET = "PATIENT-4711-ON-/mnt/secret"


def burns(fuse: str) -> bool:
    """True once: the file is there, and now gone."""
    if not Path(fuse).exists():
        return False
    Path(fuse).unlink(missing_ok=True)
    return True


def raises(local: Local, batch: Batch, *, fuse: str) -> Tensor:
    """A step that fails once."""
    loss = plain(local, batch)
    if burns(fuse):
        raise RuntimeError(SECRET)
    return loss


def never(local: Local, batch: Batch) -> Tensor:
    """A step that always fails."""
    raise RuntimeError(SECRET)


def diverges(local: Local, batch: Batch, *, fuse: str) -> Tensor:
    """A step whose loss is once not finite."""
    loss = plain(local, batch)
    return loss * float("nan") if burns(fuse) else loss


def dies(local: Local, batch: Batch, *, fuse: str) -> Tensor:
    """A step in which the process is once killed."""
    loss = plain(local, batch)
    if burns(fuse):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


def sleeps(local: Local, batch: Batch, *, fuse: str, seconds: float) -> Tensor:
    """A step that once takes long."""
    loss = plain(local, batch)
    if burns(fuse):
        time.sleep(seconds)
    return loss


def nothing(total: Sum, state: Tensors, *, before: Tensors) -> tuple[Tensors, Tensors]:
    """An aggregation that does nothing: it gives back zeros of what it was given."""
    return {name: tensor * 0 for name, tensor in total.mean().items()}, state


def swapped(total: Sum, state: Tensors, *, before: Tensors) -> tuple[Tensors, Tensors]:
    """An aggregation that mixes up two tensors of equal shape."""
    mean = total.mean()
    pairs = itertools.combinations(mean, 2)
    first, second = next((a, b) for a, b in pairs if mean[a].shape == mean[b].shape and not mean[a].equal(mean[b]))
    mean[first], mean[second] = mean[second], mean[first]
    return mean, state


def blob(*, n_channels: int, n_labels: int, plan: Mapping[str, Any], deep_supervision: bool, width: int) -> nn.Module:
    """Nothing wrong with it: a network that is no list of stages, with dropout to draw from the generators."""
    layers = [nn.Conv3d(n_channels, width, 3, padding=1), nn.Dropout(0.2), nn.ReLU(), nn.Conv3d(width, n_labels, 1)]
    return nn.Sequential(*layers)


def ruins(local: Local, batch: Batch, *, fuse: str) -> Tensor:
    """A step that once leaves a weight that is no number, after a loss that is one."""
    loss = plain(local, batch)
    if burns(fuse):
        next(local.network.parameters()).data.view(-1)[0] = float("nan")
    return loss


def troubled(
    logits: Tensor, labels: Tensor, annotated: object, *, batch_dice: bool, fuse: str, how: str, seconds: float = 0.0
) -> Tensor:
    """A loss in which a site once `raises`, `dies` or `sleeps`, or that is once `nan`: split training has no local update."""
    loss = dice_ce(logits, labels, batch_dice=batch_dice)
    if burns(fuse):
        if how == "raises":
            raise RuntimeError(SECRET)
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "nan":
            return loss * float("nan")
        time.sleep(seconds)
    return loss


class Made(Stage):
    """A stage made of a function of maps; its layer is only held."""

    def __init__(self, takes: int, leaves: int, layer: nn.Module, function: Callable[..., Stack]) -> None:
        super().__init__()
        self.takes, self.leaves, self.layer, self.function = takes, leaves, layer, function

    def forward(self, *maps: Tensor) -> Stack:
        return self.function(*maps)


def stages(*, n_channels: int, n_labels: int, first: Callable[[Tensor], Tensor], dropout: float) -> Stages:
    """`down0` leaves what `first` makes of the image under its own map; `middle` takes both, so that both travel."""
    drop = nn.Dropout(dropout)
    down, middle = nn.Conv3d(n_channels, 4, 3, padding=1), nn.Conv3d(n_channels + 4, 4, 3, padding=1)
    last, head = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, n_labels, 1)
    layers = nn.ModuleList([down, drop, *([first] if isinstance(first, nn.Module) else [])])
    return Stages(
        {
            "down0": Made(1, 2, layers, lambda x: (first(x), drop(down(x)).relu())),
            "middle": Made(2, 1, middle, lambda x, y: (drop(middle(torch.cat((x, y), 1)).relu()),)),
            "last": Made(1, 1, last, lambda y: (drop(last(y)).relu(),)),
            "head0": Made(1, 1, head, lambda y: (head(y),)),
        }
    )


def leaky(*, n_channels: int, n_labels: int, plan: Any, deep_supervision: bool, copied: bool) -> Stages:
    """The image stays on the stack, as it is or as a copy."""
    return stages(n_channels=n_channels, n_labels=n_labels, first=lambda x: x.clone() if copied else x[:], dropout=0.0)


def dropping(*, n_channels: int, n_labels: int, plan: Any, deep_supervision: bool) -> Stages:
    """Nothing wrong with it: dropout in every part draws from the generators."""
    return stages(n_channels=n_channels, n_labels=n_labels, first=nn.Conv3d(n_channels, n_channels, 1), dropout=0.3)


def frozen(*, n_channels: int, n_labels: int, plan: Any, deep_supervision: bool) -> Stages:
    """Nothing wrong with it: one of the maps that travel depends on no weight, as behind layers that do not train."""
    return stages(n_channels=n_channels, n_labels=n_labels, first=lambda x: x.abs().sqrt(), dropout=0.0)


def lacks(local: Local, batch: Batch, *, fuse: str) -> Tensor:
    """A step that once does not fit into memory."""
    if burns(fuse):
        raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")
    return plain(local, batch)


def crawls(local: Local, batch: Batch, *, seconds: float) -> Tensor:
    """A step that takes long."""
    time.sleep(seconds)
    return plain(local, batch)


def lonely(*, n_channels: int, n_labels: int, plan: Any, deep_supervision: bool) -> Stages:
    """One of its parameters is used by nothing; and it says itself that its head alone trains."""
    network = stages(n_channels=n_channels, n_labels=n_labels, first=nn.Conv3d(n_channels, n_channels, 1), dropout=0.0)
    network["down0"].register_parameter("lonely", nn.Parameter(torch.zeros(4)))
    network.trains = ("heads",)
    return network
