"""The transformer block of Segment-Anything's image encoder, and its layers over channels.

Kirillov et al., Segment Anything, ICCV 2023 (arXiv:2304.02643), whose encoder is the plain vision transformer of Li et al.,
ECCV 2022 (arXiv:2203.16527): attention within windows, in some blocks over the whole image; to each score is added what the query
makes of the distance to the key, in rows and in columns. A map (B, D, h, w, C) is D slices, each looked at for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from concilium.networks._sam_adapt import SHARE, Adaptation, Adapter, LowRank, beside

WIDER = 4
"""How much wider the layer between two linear ones is."""
EPS = 1e-6
"""Of the norms of the encoder and of those over channels."""


@dataclass(frozen=True)
class Shape:
    """Size of a block."""

    width: int
    heads: int
    window: int | None
    """Side of the windows [patches]; `None`: the whole image."""
    grid: int
    """Side of the image that its tables of distances are made for [patches]."""


def slices(x: Tensor) -> Tensor:
    """A map (B, C, [D,] h, w) as pictures (N, C, h, w)."""
    return x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1)


def together(y: Tensor, like: Tensor) -> Tensor:
    """Pictures (N, C, h, w) as a map of as many images and slices as another."""
    return y if like.ndim == 4 else y.reshape(*like.shape[:1], like.shape[2], *y.shape[1:]).transpose(1, 2)


class OverChannels(nn.Module):
    """Layer norm over the channels of a map (B, C, h, w)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention of all places of a map (B, h, w, C) to the same."""

    def __init__(self, shape: Shape, adaptation: Adaptation) -> None:
        super().__init__()
        n, self.heads = shape.width, shape.heads
        self.inputs, self.output = nn.Linear(n, 3 * n), nn.Linear(n, n)
        side = shape.grid if shape.window is None else shape.window
        self.relative_rows = nn.Parameter(torch.zeros(2 * side - 1, n // shape.heads))
        self.relative_columns = nn.Parameter(torch.zeros(2 * side - 1, n // shape.heads))
        self.lora_q = LowRank(n, adaptation.rank) if adaptation.kind == "lora" else None
        self.lora_v = LowRank(n, adaptation.rank) if adaptation.kind == "lora" else None

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, n = x.shape
        q, k, v = self.inputs(x).chunk(3, dim=-1)
        if self.lora_q is not None and self.lora_v is not None:
            q, v = q + self.lora_q(x), v + self.lora_v(x)
        q, k, v = (t.reshape(b, h * w, self.heads, -1).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        rows, columns = self._distances(q.reshape(-1, h, w, q.shape[-1]))
        scores = (
            scores.reshape(-1, h, w, h, w) + rows[..., None] + columns[:, :, :, None]
        )  # one by one: half the memory
        y = scores.reshape(-1, h * w, h * w).softmax(dim=-1) @ v
        z: Tensor = self.output(y.reshape(b, self.heads, h, w, -1).permute(0, 2, 3, 1, 4).reshape(b, h, w, n))
        return z

    def _distances(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """What each query (N, h, w, c) adds for the row of a key, (N, h, w, h), and for its column, (N, h, w, w)."""
        rows, columns = (
            _by_distance(table, size)
            for table, size in zip((self.relative_rows, self.relative_columns), q.shape[1:3], strict=True)
        )
        of_rows = q @ rows.transpose(1, 2)  # (N, h, w, c) @ (h, c, h)
        of_columns = (q.transpose(1, 2) @ columns.transpose(1, 2)).transpose(1, 2)
        return of_rows, of_columns


def _by_distance(table: Tensor, size: int) -> Tensor:
    """The row of the table (L, c) for each pair of `size` places, (size, size, c); a table for another size is stretched."""
    table = stretched(table, 2 * size - 1)
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places[None, :] + size - 1]


def stretched(table: Tensor, length: int) -> Tensor:
    """A table of distances (L, c), interpolated linearly to (length, c)."""
    if len(table) == length:
        return table
    return functional.interpolate(table.t()[None], length, mode="linear", align_corners=False)[0].t()


class Block(nn.Module):
    """Layer norm and attention, layer norm and two linear layers; the input of each is added to its output."""

    def __init__(self, shape: Shape, adaptation: Adaptation) -> None:
        super().__init__()
        n, self.window = shape.width, shape.window
        self.norm_attention, self.norm_linear = nn.LayerNorm(n, eps=EPS), nn.LayerNorm(n, eps=EPS)
        self.attention = Attention(shape, adaptation)
        self.linear = nn.Sequential(nn.Linear(n, WIDER * n), nn.GELU(), nn.Linear(WIDER * n, n))
        adapters = adaptation.kind == "adapters"
        self.adapter_space = Adapter(n, adaptation.features) if adapters else None
        self.adapter_linear = Adapter(n, adaptation.features) if adapters else None
        self.adapter_depth = Adapter(n, adaptation.features) if adapters and adaptation.through_plane else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_attention(x)
        z = self._attended(y.flatten(0, 1)).reshape(x.shape)
        if self.adapter_space is not None:
            z = z + self.adapter_space(z)
        if self.adapter_depth is not None:
            z = z + self.adapter_depth(beside(y))
        x = x + z
        y = self.norm_linear(x)
        z = self.linear(y)
        if self.adapter_linear is not None:
            z = z + SHARE * self.adapter_linear(y)
        out: Tensor = x + z
        return out

    def _attended(self, x: Tensor) -> Tensor:
        """Attention of maps (N, h, w, C); where windows do not divide them, zeros are filled in, and attended to, as theirs."""
        if self.window is None:
            whole: Tensor = self.attention(x)
            return whole
        n, h, w, c = x.shape
        side = self.window
        x = functional.pad(x, (0, 0, 0, -w % side, 0, -h % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(n, rows, side, columns, side, c).transpose(2, 3).reshape(-1, side, side, c)
        attended: Tensor = self.attention(x)
        y = attended.reshape(n, rows, columns, side, side, c).transpose(2, 3)
        windows: Tensor = y.reshape(n, rows * side, columns * side, c)[:, :h, :w]
        return windows


def passed(block: nn.Module, x: Tensor, *, again: bool) -> Tensor:
    """The block's output. With `again` its inner values are not kept for the way back, but computed once more."""
    if again and torch.is_grad_enabled():
        y: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return y
    z: Tensor = block(x)
    return z
