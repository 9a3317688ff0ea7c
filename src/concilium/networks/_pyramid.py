"""Atrous spatial pyramid pooling, of DeepLabv3 and DeepLabv3+.

Chen et al., Rethinking Atrous Convolution, 2017 (arXiv:1706.05587), section 3.3. Deviation: a norm over a single voxel, which
the mean over the image is, has nothing to normalise but channels: where the network has instance norms, that one is a group
norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from concilium.errors import StudyError
from concilium.networks import Stage
from concilium.networks._layers import Through, check_sizes, convolved, only_2d
from concilium.networks._resnet import EXPANSION, check_number, encoder

RATES = (6, 12, 18)
"""Of the 3×3 convolutions at an output stride of 16; at 8, twice these."""
GRID = (1, 2, 4)
"""Multi-grid at the last resolution of the encoder (section 3.2)."""


class Pyramid(nn.Module):
    """One 1×1 and three dilated 3×3 convolutions and the mean over the image, side by side; a 1×1 convolution of all."""

    def __init__(self, n_in: int, n: int, rates: Sequence[int], norm: str) -> None:
        super().__init__()
        pointwise = convolved(n_in, n, 2, norm, 1)
        dilated = (convolved(n_in, n, 2, norm, dilation=r) for r in rates)
        self.branches = nn.ModuleList([pointwise, *dilated])
        self.mean = convolved(n_in, n, 2, "group" if norm == "instance" else norm, 1)
        self.project = convolved((2 + len(rates)) * n, n, 2, norm, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        joined: Tensor = self.project(torch.cat([*(branch(x) for branch in self.branches), mean], dim=1))
        return joined


def encoder_and_pyramid(
    network: str,
    *,
    n_channels: int,
    plan: Mapping[str, Any],
    base_features: int,
    blocks: Sequence[int],
    norm: str,
    output_stride: int,
    skips: Sequence[int] = (),
) -> dict[str, Stage]:
    """Stages of a ResNet with dilated last resolutions, and `pyramid`, which leaves `EXPANSION * base_features` features.

    Raises:
        StudyError: the patches are volumes, a size is out of range, or batch normalisation has nothing to normalise.
    """
    only_2d(network, plan)
    _check_batch(network, plan, norm)
    check_sizes({"blocks": 2}, base_features=base_features, blocks=blocks)
    check_number(blocks)
    stages = encoder(
        n_channels=n_channels,
        plan=plan,
        base_features=base_features,
        blocks=blocks,
        norm=norm,
        skips=skips,
        output_stride=output_stride,
        grid=GRID,
    )
    n = EXPANSION * base_features
    rates = [rate * 16 // output_stride for rate in RATES]
    stages["pyramid"] = Through(Pyramid(n * 2 ** (len(blocks) - 1), n, rates, norm))
    return stages


def _check_batch(network: str, plan: Mapping[str, Any], norm: str) -> None:
    """Raise StudyError where the mean over the image would be normalised over a batch of one: it would be 0."""
    if norm == "batch" and plan.get("batch_size") == 1:
        raise StudyError(
            f"[network] norm = 'batch' is not possible for {network!r} with a batch of 1: the mean over an image is one value, "
            "which has no variance. Allowed: 'instance', 'group', or a larger batch. Choose one of these."
        )
