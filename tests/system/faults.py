"""Plug-ins that are wrong on purpose: what they break must be noticed."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from concilium.aggregation import Sum
from concilium.local_updates import Local
from concilium.local_updates.plain import step as plain
from concilium.messages import Tensors

SECRET = "PATIENT-4711-ON-/mnt/secret"


def burns(fuse: str) -> bool:
    """True once: the file is there, and now gone."""
    if not Path(fuse).exists():
        return False
    Path(fuse).unlink(missing_ok=True)
    return True


def raises(local: Local, image: Tensor, labels: Sequence[Tensor], *, fuse: str) -> Tensor:
    """A step that fails once."""
    loss = plain(local, image, labels)
    if burns(fuse):
        raise RuntimeError(SECRET)
    return loss


def never(local: Local, image: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """A step that always fails."""
    raise RuntimeError(SECRET)


def diverges(local: Local, image: Tensor, labels: Sequence[Tensor], *, fuse: str) -> Tensor:
    """A step whose loss is once not finite."""
    loss = plain(local, image, labels)
    return loss * float("nan") if burns(fuse) else loss


def dies(local: Local, image: Tensor, labels: Sequence[Tensor], *, fuse: str) -> Tensor:
    """A step in which the process is once killed."""
    loss = plain(local, image, labels)
    if burns(fuse):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


def sleeps(local: Local, image: Tensor, labels: Sequence[Tensor], *, fuse: str, seconds: float) -> Tensor:
    """A step that once takes long."""
    loss = plain(local, image, labels)
    if burns(fuse):
        time.sleep(seconds)
    return loss


def nothing(total: Sum, state: Tensors) -> tuple[Tensors, Tensors]:
    """An aggregation that does nothing: it gives back zeros of what it was given."""
    return {name: tensor * 0 for name, tensor in total.mean().items()}, state


def swapped(total: Sum, state: Tensors) -> tuple[Tensors, Tensors]:
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


def ruins(local: Local, image: Tensor, labels: Sequence[Tensor], *, fuse: str) -> Tensor:
    """A step that once leaves a weight that is no number, after a loss that is one."""
    loss = plain(local, image, labels)
    if burns(fuse):
        next(local.network.parameters()).data.view(-1)[0] = float("nan")
    return loss
