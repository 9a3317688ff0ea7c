"""The plain U-Net: two convolutions at each resolution, maximum pooling, transposed convolutions, one skip per resolution.

Ronneberger, Fischer, Brox, U-Net, MICCAI 2015 (arXiv:1505.04597), with padded convolutions and normalisation. Each convolution
is a stage of its own, so that the split points of Shiranthika et al. 2026 (arXiv:2503.20830) exist: `shallow` leaves one
convolution at each end at the site, `deep` the whole finest resolution and one convolution of the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from concilium.errors import StudyError
from concilium.networks import Stack, Stage, Stages
from concilium.networks._layers import (
    CONVOLUTIONS,
    POOLINGS,
    TRANSPOSED,
    Head,
    Norm,
    convolution,
    fitted,
    norm_of,
    strides_of,
)


class _Convolve(Stage):
    """Convolution, normalisation, ReLU; after pooling, the map that was pooled stays as the skip."""

    takes = 1

    def __init__(self, convolution: nn.Module, norm: nn.Module, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.pool, self.convolution, self.norm = pool, convolution, norm
        self.leaves = 1 if pool is None else 2

    def forward(self, *maps: Tensor) -> Stack:
        (x,) = maps
        y = x if self.pool is None else self.pool(x)
        y = torch.relu(self.norm(self.convolution(y)))
        return (y,) if self.pool is None else (x, y)


class _Up(Stage):
    """Transposed convolution, the skip beside it, convolution, normalisation, ReLU."""

    takes = 2
    leaves = 1

    def __init__(self, upsample: nn.Module, convolution: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.upsample, self.convolution, self.norm = upsample, convolution, norm

    def forward(self, *maps: Tensor) -> Stack:
        skip, coarse = maps
        joined = torch.cat((fitted(self.upsample(coarse), skip), skip), dim=1)
        return (torch.relu(self.norm(self.convolution(joined))),)


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    deep_supervision: bool = True,
    base_features: int = 32,
    levels: int = 5,
    norm: Norm = "instance",
) -> Stages:
    """A U-Net in 2D or 3D, as the plan's patches are.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration of nnU-Net's plan; what is pooled from level to level is its `strides`.
        deep_supervision: without effect, there is one head.
        base_features: features at full resolution; each level below has twice as many.
        levels: resolutions, 2 at least; no more than the plan has.
        norm: `instance`, `group` (8 channels each) or `batch`, whose running statistics are averaged as weights are.

    Returns:
        Stages `down0`, `encode0`, `down1`, `encode1`, ..., `up1`, `decode1`, `up0`, `decode0`, `head0`.

    Raises:
        StudyError: the width or the number of levels is out of range.
    """
    if levels < 2 or base_features < 1:
        raise StudyError(
            f"[network] levels = {levels}, base_features = {base_features} is not allowed. Allowed: 2 or more levels, 1 or more "
            "features. Correct them."
        )
    strides = strides_of(plan, levels)
    features = [base_features * 2**level for level in range(len(strides))]
    dims = len(strides[0])
    stages: dict[str, Stage] = {}
    for level, (stride, n) in enumerate(zip(strides, features, strict=True)):
        pool = POOLINGS[dims](stride) if level else None
        before = features[level - 1] if level else n_channels
        stages[f"down{level}"] = _Convolve(convolution(before, n, dims), norm_of(norm, n, dims), pool)
        stages[f"encode{level}"] = _Convolve(convolution(n, n, dims), norm_of(norm, n, dims))
    for level in reversed(range(len(strides) - 1)):
        n, stride = features[level], strides[level + 1]
        upsample = TRANSPOSED[dims](2 * n, n, stride, stride)
        stages[f"up{level}"] = _Up(upsample, convolution(2 * n, n, dims), norm_of(norm, n, dims))
        stages[f"decode{level}"] = _Convolve(convolution(n, n, dims), norm_of(norm, n, dims))
    stages["head0"] = Head(CONVOLUTIONS[dims](features[0], n_labels, 1))
    return Stages(stages)
