"""Layers in 2D and 3D, and the stages made of them that several networks have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from concilium.errors import StudyError
from concilium.networks import Stack, Stage

Layers = Mapping[int, Callable[..., nn.Module]]
"""Number of spatial axes -> layer."""
CONVOLUTIONS: Layers = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: Layers = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLINGS: Layers = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEANS: Layers = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
NORMS: Mapping[str, Layers] = {
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
Norm: TypeAlias = Literal["instance", "group", "batch"]
GROUP = 8
"""Channels in a group of group normalisation; narrower maps are one group."""
LINEAR = {2: "bilinear", 3: "trilinear"}
Size: TypeAlias = int | Sequence[int]


def convolution(
    n_in: int, n_out: int, dims: int, kernel: Size = 3, *, stride: Size = 1, dilation: int = 1, groups: int = 1
) -> nn.Module:
    """A convolution, padded so that it changes no size but by its stride; without bias, for the norm that follows has one."""
    sizes = [kernel] * dims if isinstance(kernel, int) else kernel
    padding = tuple(dilation * (size // 2) for size in sizes)
    step = stride if isinstance(stride, int) else tuple(stride)
    return CONVOLUTIONS[dims](n_in, n_out, tuple(sizes), step, padding, dilation=dilation, groups=groups, bias=False)


def norm_of(kind: str, n: int, dims: int) -> nn.Module:
    """Normalisation of `n` channels: over the image, over groups of channels, or over the batch."""
    if kind == "group":
        return nn.GroupNorm(max(1, n // GROUP) if n % GROUP == 0 else 1, n)
    if kind == "instance":
        return NORMS[kind][dims](n, affine=True)
    return NORMS[kind][dims](n)


class Convolve(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, convolution: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.convolution(x)))


def convolved(
    n_in: int, n_out: int, dims: int, norm: str, kernel: Size = 3, *, stride: Size = 1, dilation: int = 1
) -> Convolve:
    """A convolution as in `convolution`, its norm and ReLU."""
    layer = convolution(n_in, n_out, dims, kernel, stride=stride, dilation=dilation)
    return Convolve(layer, norm_of(norm, n_out, dims))


class Through(Stage):
    """Layers, one after the other, on the top map; where it is a skip, it stays beneath their output."""

    takes = 1

    def __init__(self, *layers: nn.Module, skip: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.leaves = 2 if skip else 1

    def forward(self, *maps: Tensor) -> Stack:
        (x,) = maps
        y: Tensor = self.layers(x)
        return (x, y) if self.leaves == 2 else (y,)


class Framed(Stage):
    """The first stage of a network whose finest map is coarser than the image: layers, with a frame beneath their output."""

    takes = 1
    leaves = 2

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, *maps: Tensor) -> Stack:
        (image,) = maps
        return (frame_of(image), self.layers(image))


class Head(Stage):
    """Logits from the top map, as large as the frame beneath it, where there is one."""

    leaves = 1

    def __init__(self, convolution: nn.Module, *, framed: bool = False) -> None:
        super().__init__()
        self.convolution = convolution
        self.takes = 2 if framed else 1

    def forward(self, *maps: Tensor) -> Stack:
        logits: Tensor = self.convolution(maps[-1])
        return (logits if self.takes == 1 else resized(logits, maps[0]),)


def frame_of(image: Tensor) -> Tensor:
    """A map without channels (B, 0, *spatial): it tells the image's size and nothing else."""
    return image.new_zeros(image.shape[0], 0, *image.shape[2:])


def resized(x: Tensor, like: Tensor) -> Tensor:
    """The map, interpolated linearly to the size of another."""
    size = like.shape[2:]
    return x if x.shape[2:] == size else functional.interpolate(x, size, mode=LINEAR[len(size)], align_corners=False)


def fitted(x: Tensor, like: Tensor) -> Tensor:
    """The map as large as another: what is too much at the far end of an axis cut off, what lacks filled with zeros."""
    lacking = [m - n for m, n in zip(reversed(like.shape[2:]), reversed(x.shape[2:]), strict=True)]
    return functional.pad(x, [n for far in lacking for n in (0, far)]) if any(lacking) else x


def filled(x: Tensor, multiple: Sequence[int], value: float = 0.0) -> Tensor:
    """The map, padded at the far ends until each axis is a multiple."""
    lacking = [-n % m for m, n in zip(reversed(multiple), reversed(x.shape[2:]), strict=True)]
    return functional.pad(x, [n for far in lacking for n in (0, far)], value=value) if any(lacking) else x


def strides_of(plan: Mapping[str, Any], levels: int | None = None) -> list[tuple[int, ...]]:
    """How much the plan makes smaller from each level to the next: that of the first is 1. Of so many levels, or as it has."""
    strides = [tuple(int(s) for s in stride) for stride in plan["architecture"]["arch_kwargs"]["strides"]]
    return strides[:levels]


def pools_of(plan: Mapping[str, Any], most: int) -> list[tuple[int, ...]]:
    """How much the plan makes smaller, step by step; `most` steps at most, one at least.

    Raises:
        StudyError: it makes nothing smaller.
    """
    strides = strides_of(plan)
    if len(strides) < 2:
        raise StudyError(f"The plan has {len(strides)} resolution. At least 2 are needed. Plan with larger patches.")
    return strides[1 : most + 1]


def only_2d(network: str, plan: Mapping[str, Any]) -> None:
    """Raise StudyError where the plan's patches are volumes."""
    if (dims := len(strides_of(plan)[0])) != 2:
        raise StudyError(
            f"[network] name = {network!r} is not possible with patches of {dims} axes. Allowed: 2 axes, for it was made for "
            "pictures. Set [plan] configuration = '2d', or choose unet, nnunet, attention_unet, segnet or sunet."
        )


def check_sizes(least: Mapping[str, int], **given: int | Sequence[int]) -> None:
    """Raise StudyError where an option is smaller than the least that is allowed; where not said, that is 1."""
    wrong = [
        name
        for name, value in given.items()
        if min([value] if isinstance(value, int) else value, default=0) < least.get(name, 1)
    ]
    if wrong:
        said = ", ".join(
            f"{name} = {value if isinstance(value, int) else list(value)}" for name, value in given.items()
        )
        most = ", ".join(f"{least.get(name, 1)} or more {name}" for name in given)
        raise StudyError(f"[network] {said} is not allowed. Allowed: {most}. Correct {', '.join(wrong)}.")
