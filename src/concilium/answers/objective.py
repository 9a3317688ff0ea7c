"""What a step at a site minimises: the study's loss over all scales; and what the network said as the round began."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from concilium import catalog
from concilium.answers import Job
from concilium.data.augment import deep_supervision_weights
from concilium.data.labels import has_regions, ignored
from concilium.data.patches import Batch
from concilium.errors import ContractError
from concilium.local_updates import in_parts
from concilium.messages import Tensors


class Teacher:
    """A network as a round began, for local updates that ask what it says; built when it is first asked."""

    def __init__(
        self,
        build: Callable[..., nn.Module],
        weights: Tensors,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[object]],
        micro_batch: int | None = None,
    ) -> None:
        self._build, self._weights, self._device, self._precision = build, weights, device, precision
        self._micro_batch = micro_batch
        self._network: nn.Module | None = None

    def __call__(self, image: Tensor) -> Sequence[Tensor]:
        if self._network is None:
            self._network = self._build().to(self._device)
            self._network.load_state_dict(dict(self._weights))
            self._network.eval()
        with torch.no_grad(), self._precision():
            return in_parts(self._network, (image,), self._micro_batch)


def make_objective(job: Job) -> Callable[[Sequence[Tensor], Batch], Tensor]:
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

    def objective(logits: Sequence[Tensor], batch: Batch) -> Tensor:
        scales = weights if len(logits) > 1 else (1.0,)  # a network without deep supervision has one scale
        pairs = zip(scales, logits, batch.labels, strict=False)
        terms = [w * loss(_full(x), y, batch.annotated) for w, x, y in pairs if w]
        return cast(Tensor, sum(terms[1:], terms[0]))

    return objective


def _full(logits: Tensor) -> Tensor:
    """Logits in float32 at least: a loss sums over more voxels than the digits of half precision can tell."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
