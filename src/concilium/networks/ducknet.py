"""DUCK-Net: a U-Net that adds where others join, of blocks with six parallel paths, and with the image on every way down.

Dumitru, Peteleaza, Craciun, Using DUCK-Net for polyp image segmentation, Scientific Reports 13 (2023) 9803
(arXiv:2311.02239), 17 features. Convolutions with stride take the image itself down to the coarsest level, where they are
last added to the maps: a linear map of the image, which must not leave a site. The way down therefore runs at the site, and a
split leaves the server the way up. Deviation: instance normalisation by default, where the paper has batch normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from concilium.networks import Stack, Stage, Stages
from concilium.networks._layers import (
    CONVOLUTIONS,
    Head,
    Norm,
    Through,
    check_sizes,
    filled,
    fitted,
    norm_of,
    only_2d,
    pools_of,
)

SEPARATED = 6
"""Length of the separated kernels."""


class _Convolve(nn.Module):
    """Convolution, ReLU, norm, in this order."""

    def __init__(self, n_in: int, n: int, norm: str, dilation: int = 1) -> None:
        super().__init__()
        self.convolution = CONVOLUTIONS[2](n_in, n, 3, padding=dilation, dilation=dilation)
        self.norm = norm_of(norm, n, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(torch.relu(self.convolution(x)))
        return y


class _Residual(nn.Module):
    """Two convolutions beside one of a single voxel."""

    def __init__(self, n_in: int, n: int, norm: str) -> None:
        super().__init__()
        self.around = CONVOLUTIONS[2](n_in, n, 1)
        self.convolve = nn.Sequential(_Convolve(n_in, n, norm), _Convolve(n, n, norm))
        self.norm = norm_of(norm, n, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.convolve(x) + torch.relu(self.around(x)))
        return y


class _Separated(nn.Module):
    """A row and a column in place of a large kernel; an even length, so one more voxel is filled in at the far end."""

    def __init__(self, n_in: int, n: int, norm: str) -> None:
        super().__init__()
        self.row = CONVOLUTIONS[2](n_in, n, (1, SEPARATED))
        self.column = CONVOLUTIONS[2](n, n, (SEPARATED, 1))
        self.norm_row, self.norm_column = norm_of(norm, n, 2), norm_of(norm, n, 2)

    def forward(self, x: Tensor) -> Tensor:
        near, far = (SEPARATED - 1) // 2, SEPARATED // 2
        y = self.norm_row(torch.relu(self.row(functional.pad(x, (near, far, 0, 0)))))
        z: Tensor = self.norm_column(torch.relu(self.column(functional.pad(y, (0, 0, near, far)))))
        return z


class _Duck(nn.Module):
    """The block of figure 2: wide and mid scope, one, two and three residual blocks, separated kernels; their sum."""

    def __init__(self, n_in: int, n: int, norm: str) -> None:
        super().__init__()
        self.norm_before, self.norm = norm_of(norm, n_in, 2), norm_of(norm, n, 2)
        scopes = [
            nn.Sequential(*(_Convolve(n if i else n_in, n, norm, i + 1) for i in range(length))) for length in (3, 2)
        ]
        residual = [
            nn.Sequential(*(_Residual(n if i else n_in, n, norm) for i in range(length))) for length in (1, 2, 3)
        ]
        self.paths = nn.ModuleList([*scopes, *residual, _Separated(n_in, n, norm)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_before(x)
        total: Tensor = self.paths[0](x)
        for path in self.paths[1:]:
            total = total + path(x)
        y: Tensor = self.norm(total)
        return y


class _First(Stage):
    """A block; the image stays beneath."""

    takes = 1
    leaves = 2
    kinds = ("image", "features")

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *maps: Tensor) -> Stack:
        (image,) = maps
        return (image[:], self.block(image))


class _Down(Stage):
    """Image and map, each made smaller by a convolution, added; a block. The map stays as the skip, and the image goes on."""

    takes = 2

    def __init__(
        self, n_image: int, n_in: int, n: int, stride: tuple[int, ...], block: nn.Module, *, last: bool
    ) -> None:
        super().__init__()
        self.stride = stride
        self.shrink_image = CONVOLUTIONS[2](n_image, n, stride, stride)
        self.shrink = CONVOLUTIONS[2](n_in, n, stride, stride)
        self.block = block
        self.leaves = 2 if last else 3
        self.kinds = ("features", "features") if last else ("features", "image", "features")

    def forward(self, *maps: Tensor) -> Stack:
        image, x = maps
        image = self.shrink_image(filled(image, self.stride))
        y = self.block(self.shrink(filled(x, self.stride)) + image)
        return (x, y) if self.leaves == 2 else (x, image, y)


class _Up(Stage):
    """Each voxel of the coarse map repeated, added to the skip; a block."""

    takes = 2
    leaves = 1

    def __init__(self, stride: tuple[int, ...], block: nn.Module) -> None:
        super().__init__()
        self.repeat = nn.Upsample(scale_factor=tuple(float(s) for s in stride), mode="nearest")
        self.block = block

    def forward(self, *maps: Tensor) -> Stack:
        skip, coarse = maps
        return (self.block(fitted(self.repeat(coarse), skip) + skip),)


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    deep_supervision: bool = True,
    base_features: int = 17,
    levels: int = 5,
    norm: Norm = "instance",
) -> Stages:
    """A DUCK-Net for pictures.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration of nnU-Net's plan; its `strides` say how maps are made smaller.
        deep_supervision: without effect, there is one head.
        base_features: features at full resolution, each level below has twice as many; the paper has 17 and 34.
        levels: how many times maps are made smaller, 2 at least; no more than the plan does.
        norm: `instance`, `group` (8 channels each) or `batch`, whose running statistics are averaged as weights are.

    Returns:
        Stages `down0`, `down1`, ..., the last `down`, `encode` of the same number, `up` of one less, ..., `up0`, `head0`.

    Raises:
        StudyError: the patches are volumes, or a size is out of range.
    """
    only_2d("ducknet", plan)
    check_sizes({"levels": 2}, levels=levels, base_features=base_features)
    strides = pools_of(plan, levels)
    n, deepest = base_features, len(strides)
    stages: dict[str, Stage] = {"down0": _First(_Duck(n_channels, n, norm))}
    before = n_channels
    for level, stride in enumerate(strides, start=1):
        width, last = n * 2**level, level == deepest
        block = nn.Sequential(*(_Residual(width, width, norm) for _ in range(2))) if last else _Duck(width, width, norm)
        stages[f"down{level}"] = _Down(before, width // 2, width, stride, block, last=last)
        before = width
    wide, half = n * 2**deepest, n * 2 ** (deepest - 1)
    stages[f"encode{deepest}"] = Through(_Residual(wide, half, norm), _Residual(half, half, norm))
    for level in reversed(range(deepest)):
        width = n * 2**level
        stages[f"up{level}"] = _Up(strides[level], _Duck(width, max(n, width // 2), norm))
    stages["head0"] = Head(CONVOLUTIONS[2](n, n_labels, 1))
    down, encode = f"down{deepest}", f"encode{deepest}"
    return Stages(stages, cuts={"shallow": ((down, "up1"),), "deep": ((encode, "up2"), (encode, "up1"))})
