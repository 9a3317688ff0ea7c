"""DeepLabv3+: the encoder of DeepLabv3, and a small decoder that joins its maps of a quarter of the resolution.

Chen, Zhu, Papandreou, Schroff, Adam, Encoder-Decoder with Atrous Separable Convolution, ECCV 2018 (arXiv:1802.02611), with
its ResNet-101 encoder (the paper has an Xception as well) and plain convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from concilium.networks import Stack, Stage, Stages
from concilium.networks._layers import CONVOLUTIONS, Head, Norm, Through, convolved, resized
from concilium.networks._pyramid import encoder_and_pyramid
from concilium.networks._resnet import EXPANSION, FULL


class _Up(Stage):
    """The coarse map interpolated to the size of the skip, whose channels are reduced; convolution of both."""

    takes = 2
    leaves = 1

    def __init__(self, reduce: nn.Module, convolve: nn.Module) -> None:
        super().__init__()
        self.reduce, self.convolve = reduce, convolve

    def forward(self, *maps: Tensor) -> Stack:
        skip, coarse = maps
        return (self.convolve(torch.cat((resized(coarse, skip), self.reduce(skip)), dim=1)),)


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    deep_supervision: bool = True,
    base_features: int = 64,
    blocks: tuple[int, ...] = FULL,
    output_stride: Literal[8, 16] = 16,
    norm: Norm = "instance",
) -> Stages:
    """A DeepLabv3+ for pictures.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration of nnU-Net's plan; its `strides` say how maps are made smaller.
        deep_supervision: without effect, there is one head.
        base_features: features of the first convolution; all others grow with them.
        blocks: bottlenecks at each of four resolutions, 2 or more each; ResNet-50 has [3, 4, 6, 3].
        output_stride: how much smaller the coarsest map is; below, dilation widens what a voxel sees.
        norm: `instance`, `group` (8 channels each) or `batch`, whose running statistics are averaged as weights are.

    Returns:
        Stages `down1`, `down2`, `encode2`, ..., `down5`, `encode5`, `pyramid`, `up2`, `decode2`, `head0`, numbered by halvings.

    Raises:
        StudyError: the patches are volumes, a size is out of range, or batch normalisation has nothing to normalise.
    """
    stages = encoder_and_pyramid(
        "deeplabv3plus",
        n_channels=n_channels,
        plan=plan,
        base_features=base_features,
        blocks=blocks,
        norm=norm,
        output_stride=output_stride,
        skips=(2,),
    )
    n, n_skip = EXPANSION * base_features, max(1, 3 * base_features // 4)
    reduce = convolved(n, n_skip, 2, norm, 1)
    stages["up2"] = _Up(reduce, convolved(n + n_skip, n, 2, norm))
    stages["decode2"] = Through(convolved(n, n, 2, norm))
    stages["head0"] = Head(CONVOLUTIONS[2](n, n_labels, 1), framed=True)
    return Stages(stages, cuts={"shallow": (("down1", "up2"),), "deep": (("down3", "pyramid"),)})
