"""Stages of Segment-Anything: patches with the first block, a block, the neck, and the head that makes masks and logits.

Kirillov et al., Segment Anything, ICCV 2023 (arXiv:2304.02643); what is ours is said in `sam.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from concilium.networks import Stack, Stage
from concilium.networks._layers import filled, frame_of
from concilium.networks._sam_adapt import Adaptation
from concilium.networks._sam_blocks import Block, OverChannels, Shape, passed, slices, together
from concilium.networks._sam_decoder import LARGER, MASKS
from concilium.networks._sam_names import placed
from concilium.networks._sam_pixels import COLOURS, Pixels, Scale


@dataclass(frozen=True)
class Sizes:
    """The encoder, all sizes settled."""

    width: int
    heads: int
    window: int
    whole: frozenset[int]
    """Blocks that look at the whole image."""
    patch: int
    grid: int
    """Side of the image that it is made for [patches]."""

    def block(self, i: int, adaptation: Adaptation) -> Block:
        window = None if i in self.whole else self.window
        return Block(Shape(self.width, self.heads, window, self.grid), adaptation)


class Through(Stage):
    """A stage that holds a block."""

    takes = 1

    def __init__(self, block: Block, again: bool) -> None:
        super().__init__()
        self.block, self.again = block, again

    def through(self, x: Tensor) -> Tensor:
        """A map (B, C, [D,] h, w) through the block."""
        flat = x.ndim == 4
        y = (x.unsqueeze(2) if flat else x).permute(0, 2, 3, 4, 1)
        y = passed(self.block, y, again=self.again and self.training).permute(0, 4, 1, 2, 3)
        return y.squeeze(2) if flat else y


class Embed(Through):
    """Pixels, patches, positions and the first block; beneath, a frame."""

    leaves = 2

    def __init__(self, scales: tuple[Scale, ...], sizes: Sizes, block: Block, again: bool) -> None:
        super().__init__(block, again)
        self.pixels = Pixels(scales)
        self.patches = nn.Conv2d(COLOURS, sizes.width, sizes.patch, sizes.patch)
        self.position = nn.Parameter(torch.empty(1, sizes.grid, sizes.grid, sizes.width))
        nn.init.normal_(self.position, std=0.02)
        self.patch = sizes.patch

    def forward(self, *maps: Tensor) -> Stack:
        (image,) = maps
        x = self.patches(filled(slices(self.pixels(image)), (self.patch, self.patch)))
        x = x + placed(self.position, (x.shape[2], x.shape[3])).permute(0, 3, 1, 2)
        return (frame_of(image), self.through(together(x, image)))


class OneBlock(Through):
    """A block."""

    leaves = 1

    def forward(self, *maps: Tensor) -> Stack:
        return (self.through(maps[0]),)


class Neck(Stage):
    """To the decoder's features, by two convolutions."""

    takes = 1
    leaves = 1

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, n, 1, bias=False),
            OverChannels(n),
            nn.Conv2d(n, n, 3, padding=1, bias=False),
            OverChannels(n),
        )

    def forward(self, *maps: Tensor) -> Stack:
        (x,) = maps
        return (together(self.layers(slices(x)), x),)


class Head(Stage):
    """Masks from maps and tokens, logits from masks, as large as the frame beneath."""

    takes = 3
    leaves = 1

    def __init__(self, n: int, n_labels: int, *, patch: int, background: bool) -> None:
        super().__init__()
        n_found = n_labels - background
        self.masks = nn.ModuleList(_three(n, n, n // 8) for _ in range(MASKS))
        self.quality = _three(n, n, MASKS)
        self.labels = None if n_found == 1 else nn.Conv2d(MASKS, n_found, 1)
        self.patch, self.background = patch, background

    def forward(self, *maps: Tensor) -> Stack:
        frame, large, tokens = maps
        masks = self.masks_of(slices(large), slices(tokens)[..., 0].transpose(1, 2))
        return (together(self.logits_of(masks, frame), frame),)

    def masks_of(self, large: Tensor, tokens: Tensor) -> Tensor:
        """The four masks (N, 4, 4h, 4w), of maps (N, f/8, 4h, 4w) and tokens (N, 5, f)."""
        makers = torch.stack([layers(tokens[:, 1 + i]) for i, layers in enumerate(self.masks)], dim=1)
        masks: Tensor = makers @ large.flatten(2)
        return masks.reshape(*masks.shape[:2], *large.shape[2:])

    def logits_of(self, masks: Tensor, frame: Tensor) -> Tensor:
        """Logits (N, L, H, W) of masks: what reaches beyond the image, because patches did, is cut off."""
        found = masks[:, :1] if self.labels is None else self.labels(masks)
        logits = self.enlarged(found, frame)
        return torch.cat((torch.zeros_like(logits[:, :1]), logits), dim=1) if self.background else logits

    def enlarged(self, masks: Tensor, frame: Tensor) -> Tensor:
        """Masks (N, n, 4h, 4w) as large as the image."""
        size = [n // LARGER * self.patch for n in masks.shape[2:]]
        if size != list(masks.shape[2:]):
            masks = functional.interpolate(masks, size, mode="bilinear", align_corners=False)
        return masks[..., : frame.shape[-2], : frame.shape[-1]]


def _three(n: int, middle: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, middle), nn.ReLU(), nn.Linear(middle, middle), nn.ReLU(), nn.Linear(middle, out))
