"""Local updates: one optimisation step at a site. One file here: one way to take it.

    step(local: Local, image: Tensor, labels: Sequence[Tensor], *, ...options) -> Tensor

`image` is (B, C, *patch), `labels` holds (B, 1, *patch) at each scale of deep supervision, finest first. The result is the
loss as a tensor of one element. `Local` lends what a step needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from concilium.messages import Tensors
from concilium.optimization import clip_and_step


@dataclass(frozen=True)
class Local:
    """What a site's optimisation step works on."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    """Loss of the network's logits against the labels, over all scales."""
    autocast: Callable[[], AbstractContextManager[object]]
    """The precision that the forward pass computes in."""
    received: Tensors
    """The weights that this round started from."""
    clip_norm: float
    scaler: torch.amp.GradScaler | None = None
    """Scales the loss in float16 only."""


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
