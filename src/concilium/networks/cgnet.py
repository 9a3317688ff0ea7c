"""CGNet: a small network whose every block joins a voxel, what surrounds it, and what the whole image holds.

Wu, Tang, Zhang, Cao, Zhang, CGNet, IEEE TIP 30 (2021) 1169-1179 (arXiv:1811.08201), M = 3 and N = 21 blocks at a quarter and
an eighth of the resolution. The image, pooled, is joined to the maps twice ("input injection"), the second time before the
third down-sampling: everything up to `down3` therefore runs at the site.
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
    MEANS,
    Head,
    Norm,
    Through,
    check_sizes,
    convolution,
    frame_of,
    norm_of,
    only_2d,
)
from concilium.networks._resnet import halvings

DILATIONS = {2: 2, 3: 4}
"""Level -> dilation of what surrounds a voxel."""
REDUCTIONS = {2: 8, 3: 16}
"""Level -> how much narrower the layer is that weighs the channels."""


class _Normed(nn.Module):
    """Perhaps a convolution; norm; PReLU."""

    def __init__(self, n: int, norm: str, convolution: nn.Module | None = None) -> None:
        super().__init__()
        self.convolution = convolution if convolution is not None else nn.Identity()
        self.norm, self.activation = norm_of(norm, n, 2), nn.PReLU(n)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.convolution(x)))
        return y


class _Weigh(nn.Module):
    """Each channel times a weight that depends on the mean of all channels over the image."""

    def __init__(self, n: int, reduction: int) -> None:
        super().__init__()
        few = max(1, n // reduction)
        self.weigh = nn.Sequential(nn.Linear(n, few), nn.ReLU(), nn.Linear(few, n), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.weigh(x.mean((2, 3)))
        return x * weights[:, :, None, None]


class _Block(nn.Module):
    """Context guided block; without a change of size its input is added to its output (section 3.1)."""

    def __init__(self, n_in: int, n: int, level: int, norm: str, stride: tuple[int, ...] | None = None) -> None:
        super().__init__()
        half = n if stride else n // 2
        first = convolution(n_in, half, 2, 3, stride=stride) if stride else convolution(n_in, half, 2, 1)
        self.down = stride is not None
        self.reduce = _Normed(half, norm, first)
        self.here = convolution(half, half, 2, groups=half)
        self.around = convolution(half, half, 2, dilation=DILATIONS[level], groups=half)
        self.join = _Normed(2 * half, norm)
        self.narrow = convolution(2 * half, n, 2, 1) if self.down else nn.Identity()
        self.weigh = _Weigh(n, REDUCTIONS[level])

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        y = self.join(torch.cat((self.here(y), self.around(y)), dim=1))
        z: Tensor = self.weigh(self.narrow(y))
        return z if self.down else x + z


class _First(Stage):
    """Three convolutions, the first of which makes smaller; beneath, a frame and the image made as small."""

    takes = 1
    leaves = 3
    kinds = ("features", "image", "features")

    def __init__(self, n_in: int, n: int, norm: str, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.inject = MEANS[2](3, stride, 1)
        convolutions = (convolution(n_in, n, 2, stride=stride), convolution(n, n, 2), convolution(n, n, 2))
        self.layers = nn.Sequential(*(_Normed(n, norm, c) for c in convolutions))

    def forward(self, *maps: Tensor) -> Stack:
        (image,) = maps
        return (frame_of(image), self.inject(image), self.layers(image))


class _Second(Stage):
    """The image beside the map, a block that makes smaller; beneath, the image made as small."""

    takes = 2
    leaves = 2
    kinds = ("image", "features")

    def __init__(self, n_in: int, n: int, n_image: int, norm: str, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.inject = MEANS[2](3, stride, 1)
        self.join = _Normed(n_in + n_image, norm)
        self.block = _Block(n_in + n_image, n, 2, norm, stride)

    def forward(self, *maps: Tensor) -> Stack:
        image, x = maps
        return (self.inject(image), self.block(self.join(torch.cat((x, image), dim=1))))


class _Third(Stage):
    """The image, the input and the output of the second level's blocks side by side; a block that makes smaller."""

    takes = 3
    leaves = 1

    def __init__(self, n_in: int, n: int, n_image: int, norm: str, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.join = _Normed(2 * n_in + n_image, norm)
        self.block = _Block(2 * n_in + n_image, n, 3, norm, stride)

    def forward(self, *maps: Tensor) -> Stack:
        image, first, last = maps
        return (self.block(self.join(torch.cat((last, first, image), dim=1))),)


class _Last(Stage):
    """The last block; its output beside the input of the level's first block."""

    takes = 2
    leaves = 1

    def __init__(self, n: int, norm: str) -> None:
        super().__init__()
        self.block = _Block(n, n, 3, norm)
        self.join = _Normed(2 * n, norm)

    def forward(self, *maps: Tensor) -> Stack:
        first, x = maps
        return (self.join(torch.cat((first, self.block(x)), dim=1)),)


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    deep_supervision: bool = True,
    base_features: int = 32,
    blocks: tuple[int, ...] = (3, 21),
    norm: Norm = "instance",
) -> Stages:
    """A CGNet for pictures.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration of nnU-Net's plan; its `strides` say how maps are made smaller.
        deep_supervision: without effect, there is one head.
        base_features: features at half the resolution; twice and four times as many follow.
        blocks: at a quarter of the resolution, 2 at least, and at an eighth, 4 at least: the paper's M and N.
        norm: `instance`, `group` (8 channels each) or `batch`, whose running statistics are averaged as weights are.

    Returns:
        Stages `down1`, `down2`, `encode2`, `down3`, `encode3`, `context3`, `decode3`, `head0`, numbered by halvings.

    Raises:
        StudyError: the patches are volumes, or a size is out of range.
    """
    only_2d("cgnet", plan)
    check_sizes({}, base_features=base_features)
    if len(blocks) != 2 or blocks[0] < 2 or blocks[1] < 4:
        raise StudyError(
            f"[network] blocks = {list(blocks)} is not allowed. Allowed: two numbers, the first 2 or more and the second 4 or "
            "more, such as [3, 21]. Correct it."
        )
    strides = halvings(plan, 3)
    n1, n2, n3 = (base_features * 2**i for i in range(3))
    stages: dict[str, Stage] = {
        "down1": _First(n_channels, n1, norm, strides[0]),
        "down2": _Second(n1, n2, n_channels, norm, strides[1]),
        "encode2": Through(*(_Block(n2, n2, 2, norm) for _ in range(blocks[0] - 1)), skip=True),
        "down3": _Third(n2, n3, n_channels, norm, strides[2]),
        "encode3": Through(_Block(n3, n3, 3, norm), skip=True),
        "context3": Through(*(_Block(n3, n3, 3, norm) for _ in range(blocks[1] - 3))),
        "decode3": _Last(n3, norm),
        "head0": Head(CONVOLUTIONS[2](2 * n3, n_labels, 1), framed=True),
    }
    return Stages(stages, cuts={"shallow": (("down3", "context3"),), "deep": (("encode3", "context3"),)})
