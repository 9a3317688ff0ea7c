"""RefineNet: ResNet-101, and at each of its resolutions a block that refines the coarser result with the maps found there.

Lin, Milan, Shen, Reid, RefineNet, CVPR 2017 (arXiv:1611.06612), section 3, figures 2 and 3: residual convolution units
without norms, fusion by sums, chained residual pooling (here two poolings), 512 features in the coarsest block and 256 in the
others, two more units before the logits. The norms that can be chosen are those of the encoder, the only ones there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from concilium.networks import Stack, Stage, Stages
from concilium.networks._layers import CONVOLUTIONS, Head, Norm, Through, check_sizes, convolution, only_2d, resized
from concilium.networks._resnet import EXPANSION, FULL, check_number, encoder


class _Unit(nn.Module):
    """Two times ReLU and convolution, around which the input goes."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first = CONVOLUTIONS[2](n, n, 3, padding=1)
        self.second = CONVOLUTIONS[2](n, n, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(torch.relu(self.first(torch.relu(x))))
        return y


class _Chain(nn.Module):
    """ReLU, then two times pooling and convolution, each of what the one before left; the sum of all."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.links = nn.ModuleList(nn.Sequential(nn.MaxPool2d(5, 1, 2), convolution(n, n, 2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        total = link_of = torch.relu(x)
        for link in self.links:
            link_of = link(link_of)
            total = total + link_of
        return total


def _adapted(n_in: int, n: int) -> nn.Module:
    """A map of the encoder at the width of the decoder, and two units."""
    return nn.Sequential(convolution(n_in, n, 2), _Unit(n), _Unit(n))


class _Refine(Stage):
    """RefineNet's block of two paths: the encoder's map, and the coarser block's."""

    takes = 2
    leaves = 1

    def __init__(self, n_skip: int, n_coarse: int, n: int) -> None:
        super().__init__()
        self.adapt = _adapted(n_skip, n)
        self.adapt_coarse = nn.Sequential(_Unit(n_coarse), _Unit(n_coarse))
        self.fuse, self.fuse_coarse = convolution(n, n, 2), convolution(n_coarse, n, 2)
        self.pool = _Chain(n)
        self.output = _Unit(n)

    def forward(self, *maps: Tensor) -> Stack:
        skip, coarse = maps
        fine: Tensor = self.fuse(self.adapt(skip))
        fused = fine + resized(self.fuse_coarse(self.adapt_coarse(coarse)), fine)
        return (self.output(self.pool(fused)),)


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    deep_supervision: bool = True,
    base_features: int = 64,
    blocks: tuple[int, ...] = FULL,
    refine_features: int = 256,
    norm: Norm = "instance",
) -> Stages:
    """A RefineNet for pictures.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration of nnU-Net's plan; its `strides` say how maps are made smaller.
        deep_supervision: without effect, there is one head.
        base_features: features of the encoder's first convolution; all others of the encoder grow with them.
        blocks: bottlenecks at each of four resolutions, 2 or more each; ResNet-50 has [3, 4, 6, 3].
        refine_features: of the decoder's blocks; the coarsest has twice as many.
        norm: `instance`, `group` (8 channels each) or `batch`, whose running statistics are averaged as weights are.

    Returns:
        Stages `down1`, `down2`, `encode2`, ..., `down5`, `encode5`, `up5`, ..., `up2`, `decode2`, `head0`, numbered by halvings.

    Raises:
        StudyError: the patches are volumes, or a size is out of range.
    """
    only_2d("refinenet", plan)
    check_sizes({"blocks": 2}, base_features=base_features, blocks=blocks, refine_features=refine_features)
    check_number(blocks)
    stages = encoder(
        n_channels=n_channels, plan=plan, base_features=base_features, blocks=blocks, norm=norm, skips=(2, 3, 4)
    )
    n, widths = refine_features, [EXPANSION * base_features * 2**i for i in range(len(blocks))]
    stages |= _decoder(widths, n)
    stages["head0"] = Head(CONVOLUTIONS[2](n, n_labels, 3, padding=1), framed=True)
    return Stages(stages, cuts={"shallow": (("down1", "up2"),), "deep": (("down3", "up3"),)})


def _decoder(widths: Sequence[int], n: int) -> dict[str, Stage]:
    """The blocks, coarsest first, for maps of these widths at 4, 8, 16 and 32 times smaller than the image."""
    stages: dict[str, Stage] = {"up5": Through(_adapted(widths[3], 2 * n), _Chain(2 * n), _Unit(2 * n))}
    for i in (2, 1, 0):
        stages[f"up{i + 2}"] = _Refine(widths[i], 2 * n if i == 2 else n, n)
    stages["decode2"] = Through(_Unit(n), _Unit(n))
    return stages
