"""SUNet, "Strong U-Net": a residual U-Net whose blocks weigh their channels.

One of the ten networks of MedSegNet10 (Shiranthika et al. 2026, arXiv:2503.20830), which names it "Strong UNet". The paper
that it goes back to could not be found, nor its structure: only the name is sure. What stands here are the parts that
strengthen a U-Net (Ronneberger et al., arXiv:1505.04597) in most of its successors, each taken from where it was first
described: residual units with the norm before the convolution (Zhang, Liu, Wang, Deep Residual U-Net, arXiv:1711.10684; He et
al., arXiv:1603.05027), convolutions with stride in place of pooling (Springenberg et al., arXiv:1412.6806), channels weighed
by what the whole image holds (Hu et al., Squeeze-and-Excitation, arXiv:1709.01507). It is as wide as MedSegNet10's U-Net.
Numbers of it must not be compared with MedSegNet10's SUNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from concilium.networks import Stack, Stage, Stages
from concilium.networks._layers import (
    CONVOLUTIONS,
    TRANSPOSED,
    Head,
    Norm,
    Through,
    check_sizes,
    convolution,
    filled,
    fitted,
    norm_of,
    strides_of,
)

REDUCTION = 16
"""How much narrower the layer is that weighs the channels (Hu et al., section 6.1)."""


class _Unit(nn.Module):
    """Two times norm, ReLU, convolution; channels weighed; the input, projected where the width changes, added."""

    def __init__(self, n_in: int, n: int, dims: int, norm: str) -> None:
        super().__init__()
        self.norm_first, self.first = norm_of(norm, n_in, dims), convolution(n_in, n, dims)
        self.norm_second, self.second = norm_of(norm, n, dims), convolution(n, n, dims)
        few = max(1, n // REDUCTION)
        self.weigh = nn.Sequential(nn.Linear(n, few), nn.ReLU(), nn.Linear(few, n), nn.Sigmoid())
        self.project = nn.Identity() if n_in == n else convolution(n_in, n, dims, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(torch.relu(self.norm_first(x)))
        y = self.second(torch.relu(self.norm_second(y)))
        weights = self.weigh(y.mean(tuple(range(2, y.ndim))))
        total: Tensor = self.project(x) + y * weights.reshape(*weights.shape, *[1] * (y.ndim - 2))
        return total


class _Down(Stage):
    """A convolution with stride, and a unit; the map before stays as the skip."""

    takes = 1
    leaves = 2

    def __init__(self, n_in: int, n: int, stride: tuple[int, ...], norm: str) -> None:
        super().__init__()
        self.stride = stride
        self.shrink = CONVOLUTIONS[len(stride)](n_in, n, stride, stride, bias=False)
        self.unit = _Unit(n, n, len(stride), norm)

    def forward(self, *maps: Tensor) -> Stack:
        (x,) = maps
        return (x, self.unit(self.shrink(filled(x, self.stride))))


class _Up(Stage):
    """Transposed convolution, the skip beside it, a unit."""

    takes = 2
    leaves = 1

    def __init__(self, n: int, stride: tuple[int, ...], norm: str) -> None:
        super().__init__()
        dims = len(stride)
        self.upsample = TRANSPOSED[dims](2 * n, n, stride, stride, bias=False)
        self.unit = _Unit(2 * n, n, dims, norm)

    def forward(self, *maps: Tensor) -> Stack:
        skip, coarse = maps
        return (self.unit(torch.cat((fitted(self.upsample(coarse), skip), skip), dim=1)),)


class _First(nn.Module):
    """Two convolutions beside a linear one; the image itself has no norm before it."""

    def __init__(self, n_in: int, n: int, dims: int, norm: str) -> None:
        super().__init__()
        self.first, self.norm = convolution(n_in, n, dims), norm_of(norm, n, dims)
        self.second, self.project = convolution(n, n, dims), convolution(n_in, n, dims, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.norm(self.first(x)))) + self.project(x)
        return y


class _Finish(nn.Module):
    """Norm and ReLU of what residual units have summed up."""

    def __init__(self, n: int, dims: int, norm: str) -> None:
        super().__init__()
        self.norm = norm_of(norm, n, dims)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


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
    """A strong U-Net in 2D or 3D, as the plan's patches are.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration of nnU-Net's plan; its `strides` say how maps are made smaller.
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
    dims = len(strides[0])
    stages: dict[str, Stage] = {"down0": Through(_First(n_channels, base_features, dims, norm))}
    for level, stride in enumerate(strides):
        n = base_features * 2**level
        if level:
            stages[f"down{level}"] = _Down(n // 2, n, stride, norm)
        stages[f"encode{level}"] = Through(_Unit(n, n, dims, norm))
    for level in reversed(range(len(strides) - 1)):
        n = base_features * 2**level
        stages[f"up{level}"] = _Up(n, strides[level + 1], norm)
        stages[f"decode{level}"] = Through(_Unit(n, n, dims, norm), *([] if level else [_Finish(n, dims, norm)]))
    stages["head0"] = Head(CONVOLUTIONS[dims](base_features, n_labels, 1))
    return Stages(stages)
