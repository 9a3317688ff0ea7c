"""DeepLabv3: ResNet-101 with dilation in place of its last stride, and atrous spatial pyramid pooling.

Chen, Papandreou, Schroff, Adam, Rethinking Atrous Convolution for Semantic Image Segmentation, 2017 (arXiv:1706.05587). Added
is one 3×3 convolution before the logits, as PyTorch's own model has, so that something besides the logits is done where the
labels are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from concilium.networks import Stages
from concilium.networks._layers import (
    CONVOLUTIONS,
    Convolve,
    Head,
    Norm,
    Through,
    check_sizes,
    convolution,
    norm_of,
    only_2d,
)
from concilium.networks._pyramid import GRID, RATES, Pyramid, check_batch
from concilium.networks._resnet import EXPANSION, FULL, check_number, encoder


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
    """A DeepLabv3 for pictures.

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
        Stages `down1`, `down2`, `encode2`, ..., `down5`, `encode5`, `pyramid`, `decode4`, `head0`, numbered by halvings.

    Raises:
        StudyError: the patches are volumes, a size is out of range, or batch normalisation has nothing to normalise.
    """
    only_2d("deeplabv3", plan)
    check_batch("deeplabv3", plan, norm)
    check_sizes({"blocks": 2}, base_features=base_features, blocks=blocks)
    check_number(blocks)
    stages = encoder(
        n_channels=n_channels,
        plan=plan,
        base_features=base_features,
        blocks=blocks,
        norm=norm,
        output_stride=output_stride,
        grid=GRID,
    )
    n = EXPANSION * base_features
    rates = [rate * 16 // output_stride for rate in RATES]
    stages["pyramid"] = Through(Pyramid(EXPANSION * base_features * 2 ** (len(blocks) - 1), n, rates, norm))
    stages["decode4"] = Through(Convolve(convolution(n, n, 2), norm_of(norm, n, 2)))
    stages["head0"] = Head(CONVOLUTIONS[2](n, n_labels, 1), framed=True)
    return Stages(stages, cuts={"shallow": (("down1", "pyramid"),), "deep": (("down3", "pyramid"),)})
