"""Swin-Unet: a U-Net of transformer blocks, whose attention is within windows that every second block shifts.

Cao et al., Swin-Unet, ECCV workshops 2022 (arXiv:2105.05537), of the blocks of Liu et al., Swin Transformer, ICCV 2021
(arXiv:2103.14030), in the size of Swin-T. Maps whose size is no multiple of the window are filled with zeros for the
attention. Deviations: no weights are dropped at random (stochastic depth), so that a split network and a whole one do the
same. The norms are layer norms, as in the papers. The embedding of patches is a linear map of the image, which a layer norm
only scales: it runs at the site with the first block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from concilium.errors import StudyError
from concilium.networks import Stack, Stage, Stages
from concilium.networks._layers import CONVOLUTIONS, check_sizes, filled, fitted, frame_of, only_2d
from concilium.networks._windows import Block

PATCH = 4
"""Side of the squares that the image is cut into."""
MERGE = 2
"""Side of the squares of which one voxel is made from level to level."""


class _Last(nn.Module):
    """Layers on maps with their channels last, as layer norms and linear layers need them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class _Expand(nn.Module):
    """Each voxel becomes a square of voxels: (B, H, W, C) to (B, side H, side W, n)."""

    def __init__(self, n_in: int, n: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.linear = nn.Linear(n_in, side * side * n, bias=False)
        self.norm = nn.LayerNorm(n)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        s = self.side
        y = self.linear(x).reshape(b, h, w, s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, s * h, s * w, -1)
        z: Tensor = self.norm(y)
        return z


class _Merge(nn.Module):
    """Four neighbours become one voxel: (B, H, W, C) to (B, H/2, W/2, 2 C), sizes rounded up."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(MERGE * MERGE * n)
        self.linear = nn.Linear(MERGE * MERGE * n, 2 * n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = filled(x.permute(0, 3, 1, 2), (MERGE, MERGE)).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        squares = x.reshape(b, h // MERGE, MERGE, w // MERGE, MERGE, c).permute(0, 1, 3, 2, 4, 5)
        y: Tensor = self.linear(self.norm(squares.reshape(b, h // MERGE, w // MERGE, -1)))
        return y


class _First(Stage):
    """Patches embedded, the first block; beneath, a frame."""

    takes = 1
    leaves = 2

    def __init__(self, n_in: int, n: int, block: nn.Module) -> None:
        super().__init__()
        self.embed = CONVOLUTIONS[2](n_in, n, PATCH, PATCH)
        self.block = _Last(nn.LayerNorm(n), block)

    def forward(self, *maps: Tensor) -> Stack:
        (image,) = maps
        return (frame_of(image), self.block(self.embed(filled(image, (PATCH, PATCH)))))


class _Blocks(Stage):
    """Layers on the top map; where it is a skip, it stays beneath their output."""

    takes = 1

    def __init__(self, *layers: nn.Module, skip: bool = False) -> None:
        super().__init__()
        self.layers = _Last(*layers)
        self.leaves = 2 if skip else 1

    def forward(self, *maps: Tensor) -> Stack:
        (x,) = maps
        y: Tensor = self.layers(x)
        return (x, y) if self.leaves == 2 else (y,)


class _Up(Stage):
    """The coarse map expanded, the skip beside it, as wide as one of them; the first block."""

    takes = 2
    leaves = 1

    def __init__(self, n: int, block: nn.Module) -> None:
        super().__init__()
        self.expand = _Last(_Expand(2 * n, n, MERGE))
        self.block = _Last(nn.Linear(2 * n, n), block)

    def forward(self, *maps: Tensor) -> Stack:
        skip, coarse = maps
        return (self.block(torch.cat((fitted(self.expand(coarse), skip), skip), dim=1)),)


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


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    deep_supervision: bool = True,
    base_features: int = 96,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    head_features: int = 32,
    window: int = 7,
) -> Stages:
    """A Swin-Unet for pictures.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration of nnU-Net's plan; read for the number of axes only.
        deep_supervision: without effect, there is one head.
        base_features: features at a quarter of the resolution; each level below has twice as many.
        blocks: transformer blocks at each level on the way down, and as many on the way up, 2 at least; two levels or more.
        head_features: features of each attention head; what is narrower has one head.
        window: side of the windows [voxels of the level].

    Returns:
        Stages `down2`, `encode2`, `down3`, ..., the last `encode`, ..., `up2`, `decode2`, `up0`, `head0`, numbered by halvings.

    Raises:
        StudyError: the patches are volumes, or a size is out of range.
    """
    only_2d("swin_unet", plan)
    check_sizes({"blocks": 2}, base_features=base_features, blocks=blocks, head_features=head_features, window=window)
    widths = [base_features * 2**i for i in range(len(blocks))]
    if len(blocks) < 2 or any(n > head_features and n % head_features for n in widths):
        raise StudyError(
            f"[network] blocks = {list(blocks)}, base_features = {base_features} with head_features = {head_features} is not "
            "allowed. Allowed: two levels or more, and widths that are multiples of head_features, or narrower. Correct them."
        )
    made = [_level(n, depth, max(1, n // head_features), window) for n, depth in zip(widths, blocks, strict=True)]
    stages: dict[str, Stage] = {"down2": _First(n_channels, base_features, made[0][0])}
    for i, n in enumerate(widths):
        if i:
            stages[f"down{i + 2}"] = _Blocks(_Merge(n // 2), made[i][0], skip=True)
        bottom = [nn.LayerNorm(n)] if i == len(widths) - 1 else []
        stages[f"encode{i + 2}"] = _Blocks(*made[i][1:], *bottom)
    for i in reversed(range(len(widths) - 1)):
        n = widths[i]
        again = _level(n, blocks[i], max(1, n // head_features), window)
        stages[f"up{i + 2}"] = _Up(n, again[0])
        stages[f"decode{i + 2}"] = _Blocks(*again[1:], *([] if i else [nn.LayerNorm(n)]))
    stages["up0"] = _Blocks(_Expand(base_features, base_features, PATCH))
    stages["head0"] = _Head(CONVOLUTIONS[2](base_features, n_labels, 1, bias=False))
    return Stages(
        stages, cuts={"shallow": (("down2", "decode2"),), "deep": (("down3", "decode3"), ("down3", "encode3"))}
    )


def _level(n: int, depth: int, heads: int, window: int) -> Sequence[nn.Module]:
    """Blocks of one level: every second one has its windows shifted by half."""
    return [Block(n, heads, window, window // 2 if i % 2 else 0) for i in range(depth)]
