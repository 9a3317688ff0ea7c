"""Attention U-Net: a U-Net whose skips pass an additive attention gate, which the coarser level of the decoder steers.

Oktay et al., Attention U-Net: Learning Where to Look for the Pancreas, MIDL 2018 (arXiv:1804.03999). The gate (section 2.2,
grid attention) compares skip and gating map on the coarser grid, and its coefficients, one a voxel, are interpolated to the
skip's. Deviations: the width and the normalised double convolutions are those of the U-Net (arXiv:1505.04597), where the
paper's networks are as narrow as its volumes require; one head, without the paper's deep supervision; every skip has a gate, the
first one too, which the paper leaves without.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from concilium.networks import Stack, Stage, Stages
from concilium.networks._layers import (
    CONVOLUTIONS,
    POOLINGS,
    Head,
    Norm,
    check_sizes,
    convolved,
    filled,
    norm_of,
    resized,
    strides_of,
)


class _Down(Stage):
    """Maximum pooling, convolution; the map that was pooled stays as the skip."""

    takes = 1
    leaves = 2

    def __init__(self, pool: nn.Module, convolve: nn.Module) -> None:
        super().__init__()
        self.pool, self.convolve = pool, convolve

    def forward(self, *maps: Tensor) -> Stack:
        (x,) = maps
        return (x, self.convolve(self.pool(x)))


class _Convolve(Stage):
    """One convolution."""

    takes = 1
    leaves = 1

    def __init__(self, convolve: nn.Module) -> None:
        super().__init__()
        self.convolve = convolve

    def forward(self, *maps: Tensor) -> Stack:
        return (self.convolve(*maps),)


class _Gate(nn.Module):
    """The skip (B, C, *spatial) times its attention coefficients (B, 1, *spatial), between 0 and 1."""

    def __init__(self, n_skip: int, n_gating: int, n: int, stride: tuple[int, ...], norm: str) -> None:
        super().__init__()
        dims = len(stride)
        self.stride = stride
        self.of_skip = CONVOLUTIONS[dims](n_skip, n, stride, stride, bias=False)  # onto the grid of the gating map
        self.of_gating = CONVOLUTIONS[dims](n_gating, n, 1)
        self.coefficient = CONVOLUTIONS[dims](n, 1, 1)
        self.output = CONVOLUTIONS[dims](n_skip, n_skip, 1, bias=False)
        self.norm = norm_of(norm, n_skip, dims)

    def forward(self, skip: Tensor, gating: Tensor) -> Tensor:
        on_grid = self.of_skip(filled(skip, self.stride))
        added = torch.relu(on_grid + resized(self.of_gating(gating), on_grid))
        coefficients = torch.sigmoid(self.coefficient(added))
        gated: Tensor = self.norm(self.output(skip * resized(coefficients, skip)))
        return gated


class _Up(Stage):
    """The gated skip beside the coarser map, which is interpolated and convolved; convolution."""

    takes = 2
    leaves = 1

    def __init__(self, gate: _Gate, upsample: nn.Module, convolve: nn.Module) -> None:
        super().__init__()
        self.gate, self.upsample, self.convolve = gate, upsample, convolve

    def forward(self, *maps: Tensor) -> Stack:
        skip, coarse = maps
        gated = self.gate(skip, coarse)
        return (self.convolve(torch.cat((gated, self.upsample(resized(coarse, skip))), dim=1)),)


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    deep_supervision: bool = True,
    base_features: int = 64,
    levels: int = 5,
    norm: Norm = "instance",
) -> Stages:
    """An Attention U-Net in 2D or 3D, as the plan's patches are.

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
    check_sizes({"levels": 2}, levels=levels, base_features=base_features)
    strides = strides_of(plan, levels)
    features = [base_features * 2**level for level in range(len(strides))]
    dims = len(strides[0])

    convolve = partial(convolved, dims=dims, norm=norm)
    stages: dict[str, Stage] = {"down0": _Convolve(convolve(n_channels, base_features))}
    for level, n in enumerate(features):
        if level:
            stages[f"down{level}"] = _Down(POOLINGS[dims](strides[level], ceil_mode=True), convolve(n // 2, n))
        stages[f"encode{level}"] = _Convolve(convolve(n, n))
    for level in reversed(range(len(strides) - 1)):
        n = features[level]
        gate = _Gate(n, 2 * n, max(1, n // 2), strides[level + 1], norm)
        stages[f"up{level}"] = _Up(gate, convolve(2 * n, n), convolve(2 * n, n))
        stages[f"decode{level}"] = _Convolve(convolve(n, n))
    stages["head0"] = Head(CONVOLUTIONS[dims](features[0], n_labels, 1))
    return Stages(stages)
