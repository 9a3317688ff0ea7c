"""DeepLabv3: ResNet-101 with dilation in place of its last stride, and atrous spatial pyramid pooling.

Chen, Papandreou, Schroff, Adam, Rethinking Atrous Convolution for Semantic Image Segmentation, 2017 (arXiv:1706.05587). Added
is one 3×3 convolution before the logits, as PyTorch's own model has, so that something besides the logits is done where the
labels are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from concilium.networks import Stages
from concilium.networks._layers import CONVOLUTIONS, Head, Norm, Through, convolved
from concilium.networks._pyramid import encoder_and_pyramid
from concilium.networks._resnet import EXPANSION, FULL


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
    stages = encoder_and_pyramid(
        "deeplabv3",
        n_channels=n_channels,
        plan=plan,
        base_features=base_features,
        blocks=blocks,
        norm=norm,
        output_stride=output_stride,
    )
    n = EXPANSION * base_features
    stages["decode4"] = Through(convolved(n, n, 2, norm))
    stages["head0"] = Head(CONVOLUTIONS[2](n, n_labels, 1), framed=True)
    return Stages(stages, cuts={"shallow": (("down1", "pyramid"),), "deep": (("down3", "pyramid"),)})
