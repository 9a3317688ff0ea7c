"""SegNet: VGG's 13 convolutions and their mirror image; the decoder puts each value where the encoder found its maximum.

Badrinarayanan, Kendall, Cipolla, SegNet, IEEE TPAMI 39 (2017) 2481-2495 (arXiv:1511.00561). What the encoder hands to the
decoder is the place of each maximum, a whole number within the pooling window (two bits, sent as one byte), not the place in
the plane. Deviation: instance normalisation by default, where the paper has batch normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from concilium.networks import WHOLE, Stack, Stage, Stages
from concilium.networks._layers import (
    CONVOLUTIONS,
    Norm,
    Through,
    check_sizes,
    convolved,
    filled,
    fitted,
    frame_of,
    pools_of,
)

CONVOLUTIONS_OF_VGG = (2, 2, 3, 3, 3)
"""At each resolution (Simonyan and Zisserman, arXiv:1409.1556, configuration D)."""
WIDEST = 8
"""Times the features at full resolution."""


class _First(Stage):
    """The first convolution, above a frame: the decoder needs the image's size."""

    takes = 1
    leaves = 2

    def __init__(self, convolve: nn.Module) -> None:
        super().__init__()
        self.convolve = convolve

    def forward(self, *maps: Tensor) -> Stack:
        (image,) = maps
        return (frame_of(image), self.convolve(image))


class _Down(Stage):
    """Maximum pooling, which leaves the places of the maxima, and one convolution (none below the last pooling)."""

    takes = 1
    leaves = 2
    kinds = ("places", "features")

    def __init__(self, stride: tuple[int, ...], convolve: nn.Module) -> None:
        super().__init__()
        self.stride, self.convolve = stride, convolve

    def forward(self, *maps: Tensor) -> Stack:
        (x,) = maps
        values, places = pooled(x, self.stride)
        return (places, self.convolve(values))


class _Up(Stage):
    """Unpooling, and one convolution."""

    takes = 2
    leaves = 1

    def __init__(self, stride: tuple[int, ...], convolve: nn.Module) -> None:
        super().__init__()
        self.stride, self.convolve = stride, convolve

    def forward(self, *maps: Tensor) -> Stack:
        places, x = maps
        return (self.convolve(unpooled(fitted(x, places), places, self.stride)),)


class _Head(Stage):
    """Logits as large as the frame beneath."""

    takes = 2
    leaves = 1

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, *maps: Tensor) -> Stack:
        frame, x = maps
        return (self.convolution(fitted(x, frame)),)


def pooled(x: Tensor, stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Maxima of windows (B, C, *smaller), and where in its window each is, counted along the axes in order; both of one shape."""
    values, places = _windows(filled(x, stride, float("-inf")), stride).max(dim=-1)
    return values, places.to(WHOLE)


def unpooled(x: Tensor, places: Tensor, stride: Sequence[int]) -> Tensor:
    """Each value at its place in its window, zeros elsewhere; a place that no window has leaves zeros only."""
    k = torch.arange(prod(stride), device=x.device)
    windows = torch.where(places.unsqueeze(-1) == k, x.unsqueeze(-1), 0.0)
    shape, dims = x.shape, len(stride)
    split = windows.reshape(*shape, *stride)
    order = [n for axis in range(dims) for n in (2 + axis, 2 + dims + axis)]
    return split.permute(0, 1, *order).reshape(*shape[:2], *(n * s for n, s in zip(shape[2:], stride, strict=True)))


def _windows(x: Tensor, stride: Sequence[int]) -> Tensor:
    """(B, C, *spatial) -> (B, C, *smaller, voxels of a window)."""
    dims = len(stride)
    small = [n // s for n, s in zip(x.shape[2:], stride, strict=True)]
    split = x.reshape(*x.shape[:2], *(n for pair in zip(small, stride, strict=True) for n in pair))
    outer, inner = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return split.permute(0, 1, *outer, *inner).reshape(*x.shape[:2], *small, prod(stride))


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
    """A SegNet in 2D or 3D, as the plan's patches are.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration of nnU-Net's plan; what is pooled from level to level is its `strides`.
        deep_supervision: without effect, there is one head.
        base_features: features at full resolution; each level below has twice as many, eight times at most.
        levels: resolutions with convolutions, 1 to 5, each pooled; no more than the plan can pool.
        norm: `instance`, `group` (8 channels each) or `batch`, whose running statistics are averaged as weights are.

    Returns:
        Stages `down0`, `encode0`, `down1`, ..., `up1`, `decode1`, `up0`, `head0`. The last `down` only pools.

    Raises:
        StudyError: the width or the number of levels is out of range.
    """
    check_sizes({}, levels=levels, base_features=base_features)
    pools = pools_of(plan, min(levels, len(CONVOLUTIONS_OF_VGG)))
    dims = len(pools[0])
    features = [base_features * min(2**level, WIDEST) for level in range(len(pools))]

    convolve = partial(convolved, dims=dims, norm=norm)
    stages: dict[str, Stage] = {"down0": _First(convolve(n_channels, base_features))}
    for level, n in enumerate(features):
        if level:
            stages[f"down{level}"] = _Down(pools[level - 1], convolve(features[level - 1], n))
        stages[f"encode{level}"] = Through(*(convolve(n, n) for _ in range(CONVOLUTIONS_OF_VGG[level] - 1)))
    stages[f"down{len(pools)}"] = _Down(pools[-1], nn.Identity())
    for level in reversed(range(len(pools))):
        n = features[level]
        stages[f"up{level}"] = _Up(pools[level], convolve(n, n))
        if level:
            finer = [convolve(n, n) for _ in range(CONVOLUTIONS_OF_VGG[level] - 2)]
            stages[f"decode{level}"] = Through(*finer, convolve(n, features[level - 1]))
    stages["head0"] = _Head(CONVOLUTIONS[dims](base_features, n_labels, 3, padding=1))
    return Stages(
        stages,
        cuts={
            "shallow": (("down0", "decode1"), ("down0", "down1")),
            "deep": (("down1", "decode1"), ("encode0", "down1")),
        },
    )
