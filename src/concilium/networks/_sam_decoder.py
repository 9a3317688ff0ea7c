"""Segment-Anything's prompt encoder and mask decoder, up to the maps that masks are made of.

Kirillov et al., Segment Anything, ICCV 2023 (arXiv:2304.02643), appendix A. Tokens (one for the quality, one for each mask, one
for each prompt) and the image's embedding attend to each other twice; then the embedding is enlarged fourfold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from concilium.networks import Stack, Stage
from concilium.networks._sam_blocks import OverChannels, slices, together

LAYERS, HEADS = 2, 8
"""Of the transformer."""
NARROWER = 2
"""How much narrower cross-attention is than the tokens."""
WIDER = 8
"""How much wider the layer between two linear ones is than the tokens: 2048 at 256."""
MASKS = 4
"""Masks: one for prompts that leave no doubt, three for those that do."""
LARGER = 4
"""How much larger the maps of the masks are than the embedding."""
FEATURES_OF_MASKS = 16
"""Of the layers that a mask as prompt passes."""
NEGATIVE, POSITIVE, FIRST_CORNER, LAST_CORNER = range(4)
"""What a point may be; both corners are those of a box."""


class Attend(nn.Module):
    """Attention of queries (B, N, f) to keys and values (B, M, f)."""

    def __init__(self, n: int, narrower: int = 1) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(n, n // narrower) for _ in range(3))
        self.output = nn.Linear(n // narrower, n)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (
            t.reshape(*t.shape[:2], HEADS, -1).transpose(1, 2)
            for t in (self.query(queries), self.key(keys), self.value(values))
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        y: Tensor = self.output((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        return y


class Layer(nn.Module):
    """Tokens to tokens, tokens to image, two linear layers on the tokens, image to tokens; each added, and normed."""

    def __init__(self, n: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.tokens = Attend(n)
        self.to_image, self.to_tokens = Attend(n, NARROWER), Attend(n, NARROWER)
        self.linear = nn.Sequential(nn.Linear(n, WIDER * n), nn.ReLU(), nn.Linear(WIDER * n, n))
        self.norm_tokens, self.norm_to_image, self.norm_linear, self.norm_to_tokens = (
            nn.LayerNorm(n) for _ in range(4)
        )

    def forward(self, tokens: Tensor, image: Tensor, at: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, f) and image (B, M, f); `at`, `where`: what tells the places of either."""
        if self.first:  # the tokens are as yet nothing but what tells their places
            tokens = self.norm_tokens(self.tokens(tokens, tokens, tokens))
        else:
            tokens = self.norm_tokens(tokens + self.tokens(tokens + at, tokens + at, tokens))
        tokens = self.norm_to_image(tokens + self.to_image(tokens + at, image + where, image))
        tokens = self.norm_linear(tokens + self.linear(tokens))
        image = self.norm_to_tokens(image + self.to_tokens(image + where, tokens + at, tokens))
        return tokens, image


class Prompts(nn.Module):
    """Points, boxes and places of the image as vectors: sines and cosines of random frequencies, and what the point is."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.randn(2, n // 2))
        self.kinds = nn.ParameterList(torch.randn(1, n) for _ in range(4))
        self.no_point, self.no_mask = (nn.Parameter(torch.randn(1, n)) for _ in range(2))
        m = FEATURES_OF_MASKS
        self.masks = nn.Sequential(
            nn.Conv2d(1, m // 4, 2, 2), OverChannels(m // 4), nn.GELU(),
            nn.Conv2d(m // 4, m, 2, 2), OverChannels(m), nn.GELU(),
            nn.Conv2d(m, n, 1),
        )  # fmt: skip

    def places(self, h: int, w: int) -> Tensor:
        """Vectors (h * w, f) of the middles of h × w patches."""
        like = self.frequencies
        rows, columns = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (h, w))
        return self._at(torch.stack((columns.expand(h, w), rows[:, None].expand(h, w)), dim=-1)).flatten(0, 1)

    def points(self, at: Tensor, kinds: Tensor, size: tuple[int, int]) -> Tensor:
        """Vectors (N, P, f) of points (N, P, 2), each (column, row) [voxels] in an image of this size (rows, columns).

        `kinds` (N, P): `POSITIVE`, `NEGATIVE`, a corner of a box, or -1 for no point.
        """
        rows, columns = size
        there = (at.to(self.frequencies) + 0.5) / self.frequencies.new_tensor([columns, rows])
        vectors = self._at(there)
        for kind, vector in enumerate(self.kinds):
            vectors = torch.where((kinds == kind)[..., None], vectors + vector, vectors)
        return torch.where((kinds < 0)[..., None], self.no_point.expand_as(vectors), vectors)

    def _at(self, places: Tensor) -> Tensor:
        kind = "cpu" if places.is_meta else places.device.type
        with torch.autocast(kind, enabled=False):  # a pixel of a thousand is less than bfloat16 can tell
            angles = 2 * math.pi * ((2 * places.to(self.frequencies) - 1) @ self.frequencies)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Decoder(Stage):
    """Leaves the maps that masks are made of, four times as large as the image's embedding, and the tokens that make them.

    As a stage it has no prompt. Tokens are a map (B, f, [D,] 5, 1): that of the quality, and those of the masks.
    """

    takes = 1
    leaves = 2

    def __init__(self, n: int) -> None:
        super().__init__()
        self.prompts = Prompts(n)
        self.quality, self.masks = nn.Parameter(torch.randn(1, n)), nn.Parameter(torch.randn(MASKS, n))
        self.layers = nn.ModuleList(Layer(n, first=i == 0) for i in range(LAYERS))
        self.to_image, self.norm_to_image = Attend(n, NARROWER), nn.LayerNorm(n)
        self.enlarge = nn.Sequential(
            nn.ConvTranspose2d(n, n // 4, 2, 2), OverChannels(n // 4), nn.GELU(),
            nn.ConvTranspose2d(n // 4, n // 8, 2, 2), nn.GELU(),
        )  # fmt: skip

    def forward(self, *maps: Tensor) -> Stack:
        (x,) = maps
        large, tokens = self.decode(slices(x))
        return together(large, x), together(tokens.transpose(1, 2)[..., None], x)

    def decode(self, embedding: Tensor, points: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of an embedding (B, f, h, w) the maps (B, f/8, 4h, 4w) and tokens (B, 1 + 4, f).

        With `points` (B, P, f) as the authors do with prompts; without, as FedFMS: no prompt, and no vector for none.
        """
        b, _, h, w = embedding.shape
        at = torch.cat((self.quality, self.masks)).expand(b, -1, -1)
        if points is not None:
            at = torch.cat((at, points), dim=1)
            embedding = embedding + self.prompts.no_mask[..., None, None]
        where = self.prompts.places(h, w)[None]
        tokens, image = at, embedding.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens, image = layer(tokens, image, at, where)
        tokens = self.norm_to_image(tokens + self.to_image(tokens + at, image + where, image))
        maps: Tensor = self.enlarge(image.transpose(1, 2).reshape(b, -1, h, w))
        return maps, tokens[:, : 1 + MASKS]
