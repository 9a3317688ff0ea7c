"""The block of the Swin Transformer: attention within windows, with a bias for each relative position.

Liu et al., Swin Transformer, ICCV 2021 (arXiv:2103.14030), section 3.2. Maps (B, H, W, C) of any size: filled with zeros at
the far ends until they are a multiple of the window; windows are shifted only where a map is larger than one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDER = 4
"""How much wider the layer between two linear ones is."""


class Block(nn.Module):
    """Layer norm and attention, layer norm and two linear layers; the input of each is added to its output."""

    def __init__(self, n: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_linear = nn.LayerNorm(n), nn.LayerNorm(n)
        self.attention = Attention(n, heads, window)
        self.linear = nn.Sequential(nn.Linear(n, WIDER * n), nn.GELU(), nn.Linear(WIDER * n, n))
        self.window, self.shift = window, shift

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attended(self.norm_attention(x))
        y: Tensor = x + self.linear(self.norm_linear(x))
        return y

    def _attended(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        side = self.window
        x = functional.pad(x, (0, 0, 0, -w % side, 0, -h % side))
        rows, columns = x.shape[1:3]
        steps = tuple(self.shift if size > side else 0 for size in (rows, columns))
        x = torch.roll(x, tuple(-s for s in steps), (1, 2))
        windows = x.reshape(b, rows // side, side, columns // side, side, c).permute(0, 1, 3, 2, 4, 5)
        windows = self.attention(windows.reshape(b, -1, side * side, c), self._apart(rows, columns, steps, x.device))
        windows = windows.reshape(b, rows // side, columns // side, side, side, c).permute(0, 1, 3, 2, 4, 5)
        y = torch.roll(windows.reshape(b, rows, columns, c), steps, (1, 2))
        return y[:, :h, :w]

    def _apart(self, rows: int, columns: int, steps: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Which voxels of a window (W, S, S) came together only because the map was rolled; `None` where it was not."""
        if not any(steps):
            return None
        side = self.window
        of_rows, of_columns = (_regions(n, side, s, device) for n, s in zip((rows, columns), steps, strict=True))
        regions = of_rows[:, None] * 3 + of_columns[None, :]
        windows = (
            regions.reshape(rows // side, side, columns // side, side).permute(0, 2, 1, 3).reshape(-1, side * side)
        )
        return windows[:, :, None] != windows[:, None, :]


def _regions(size: int, side: int, step: int, device: torch.device) -> Tensor:
    """Number of the stretch that each of `size` voxels in a row belongs to, after rolling by `step`."""
    places = torch.arange(size, device=device)
    return (places >= size - side).long() + ((places >= size - step).long() if step else 0)


class Attention(nn.Module):
    """Self-attention of the voxels of each window, (B, W, S, C) to the same."""

    def __init__(self, n: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs, self.output = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.normal_(self.bias, std=0.02)
        places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = places[:, None] - places[None, :] + window - 1
        relative = apart[..., 0] * (2 * window - 1) + apart[..., 1]
        self.relative: Tensor
        self.register_buffer("relative", relative, persistent=False)

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        b, w, s, c = x.shape
        q, k, v = self.inputs(x).reshape(b, w, s, 3, self.heads, c // self.heads).permute(3, 0, 1, 4, 2, 5)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.bias[self.relative].permute(2, 0, 1)
        if apart is not None:
            scores = scores.masked_fill(apart[:, None], float("-inf"))
        y: Tensor = self.output((scores.softmax(dim=-1) @ v).transpose(2, 3).reshape(b, w, s, c))
        return y
