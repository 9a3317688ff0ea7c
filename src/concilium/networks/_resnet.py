"""ResNet with bottlenecks as stages: the encoder of the DeepLabs and of RefineNet.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016 (arXiv:1512.03385), table 1. The stride of a block is that
of its 3×3 convolution. In place of a stride, dilation (Chen et al., arXiv:1706.05587, section 3): a block's rates times the
multi-grid's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from concilium.errors import StudyError
from concilium.networks import Stage
from concilium.networks._layers import Framed, Through, convolution, convolved, norm_of, strides_of

EXPANSION = 4
"""Features that leave a bottleneck, times those within."""
FULL = (3, 4, 23, 3)
"""Bottlenecks at each resolution of ResNet-101."""


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions around which the input goes, projected where size or width changes."""

    def __init__(self, n_in: int, n: int, norm: str, *, stride: tuple[int, ...] = (1, 1), dilation: int = 1) -> None:
        super().__init__()
        n_out = EXPANSION * n
        self.reduce = convolved(n_in, n, 2, norm, 1)
        self.convolve = convolved(n, n, 2, norm, stride=stride, dilation=dilation)
        self.expand = nn.Sequential(convolution(n, n_out, 2, 1), norm_of(norm, n_out, 2))
        same = n_in == n_out and stride == (1, 1)
        projection = () if same else (convolution(n_in, n_out, 2, 1, stride=stride), norm_of(norm, n_out, 2))
        self.project = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.expand(self.convolve(self.reduce(x))) + self.project(x))


def halvings(plan: Mapping[str, Any], n: int) -> list[tuple[int, ...]]:
    """By how much each of `n` steps makes maps smaller: as the plan does, by nothing where it has no more levels."""
    strides = strides_of(plan)[1 : n + 1]
    return [*strides, *[(1, 1)] * (n - len(strides))]


def check_number(blocks: Sequence[int]) -> None:
    """Raise StudyError where blocks are not said for four resolutions."""
    if len(blocks) != len(FULL):
        raise StudyError(
            f"[network] blocks = {list(blocks)} is not allowed. Allowed: {len(FULL)} numbers, one for each resolution, such as "
            f"{list(FULL)}. Correct it."
        )


def encoder(
    *,
    n_channels: int,
    plan: Mapping[str, Any],
    base_features: int,
    blocks: Sequence[int],
    norm: str,
    skips: Sequence[int] = (),
    output_stride: int = 32,
    grid: Sequence[int] = (1,),
) -> dict[str, Stage]:
    """Stages `down1` (7×7), `down2` (pooling, one block), `encode2` (the others), `down3`, ..., named by halvings of the image.

    Args:
        n_channels: channels of the image.
        plan: one configuration of nnU-Net's plan.
        base_features: of the first convolution, and within the first blocks.
        blocks: at each resolution, two at least.
        norm: as in `norm_of`.
        skips: numbers of resolutions whose last map stays on the stack beneath the next `down`.
        output_stride: from which on dilation takes the place of strides.
        grid: times the dilation of the blocks at the last resolution.
    """
    strides = halvings(plan, 1 + len(blocks))
    first = convolved(n_channels, base_features, 2, norm, 7, stride=strides[0])
    stages: dict[str, Stage] = {"down1": Framed(first)}
    before, dilation = base_features, 1
    for i, n_blocks in enumerate(blocks):
        n, stride, last = base_features * 2**i, strides[i + 1], i == len(blocks) - 1
        dilations = [dilation] * n_blocks
        if 2 ** (i + 2) > output_stride:
            stride, dilation = (1, 1), 2 * dilation
            dilations = [dilation // 2, *[dilation] * (n_blocks - 1)]
        if last and len(grid) > 1:
            dilations = [dilation * grid[min(k, len(grid) - 1)] for k in range(n_blocks)]
        layers: list[nn.Module] = [] if i else [nn.MaxPool2d(3, stride, 1)]
        step = stride if i else (1, 1)
        layers.append(Bottleneck(before, n, norm, stride=step, dilation=dilations[0]))
        before = EXPANSION * n
        rest = [Bottleneck(before, n, norm, dilation=d) for d in dilations[1:]]
        stages[f"down{i + 2}"] = Through(*layers, skip=i + 1 in skips)
        stages[f"encode{i + 2}"] = Through(*rest)
    return stages
