"""A convolutional decoder from maps of any sizes to something at the image's size, in 2D and 3D, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from concilium.errors import ContractError
from concilium.networks import Stack

LINEAR = {2: "bilinear", 3: "trilinear"}
CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
CHUNK = 16
"""Patches that are decoded at a time."""
Size = tuple[int, ...]


class Decoder(nn.Module):
    """From the coarsest map up, twice the size at each level, each map joined where it fits, to `n_out` channels at `size`.

    Maps are brought to mean 0 and deviation 1 per channel of those it is trained on; with `alone`, each patch's map by its own
    deviation besides (gradients of different batches have different scales). Without normalisation in between: what the image's
    brightness was must come through.
    """

    def __init__(self, maps: Stack, size: Size, n_out: int, *, width: int, alone: bool = False) -> None:
        super().__init__()
        self.alone = alone
        self.used = [i for i, m in enumerate(maps) if m.shape[1]]
        if not self.used:
            raise ContractError(
                f"{len(maps)} maps with values came. A decoder needs one. Attack maps that have channels."
            )
        dims = len(size)
        self.trail = _trail([tuple(maps[i].shape[2:]) for i in self.used], size)
        self.level = [_level(tuple(maps[i].shape[2:]), self.trail) for i in self.used]
        self.means, self.deviations = [], []
        for i in self.used:
            m = _alone(maps[i].float()) if alone else maps[i].float()
            axes = (0, *range(2, m.ndim))
            self.means.append(m.mean(axes, keepdim=True))
            self.deviations.append(m.std(axes, keepdim=True).clamp_min(1e-6))
        convolve = CONVOLUTIONS[dims]
        self.first, self.second = nn.ModuleList(), nn.ModuleList()
        for level in range(len(self.trail)):
            joined = sum(maps[i].shape[1] for i, at in zip(self.used, self.level, strict=True) if at == level)
            self.first.append(convolve(joined + (width if level else 0), width, 3, padding=1))
            self.second.append(convolve(width, width, 3, padding=1))
        self.last = convolve(width, n_out, 3, padding=1)

    def forward(self, maps: Stack) -> Tensor:
        x = maps[self.used[0]]
        for level, size in enumerate(self.trail):
            here = [_resized(x, size)] if level else []
            here += [
                _resized((self._scaled(maps[i]) - mean) / deviation, size)
                for i, at, mean, deviation in zip(self.used, self.level, self.means, self.deviations, strict=True)
                if at == level
            ]
            x = functional.leaky_relu(self.first[level](torch.cat(here, 1)), 0.1)
            x = x + functional.leaky_relu(self.second[level](x), 0.1)
        out: Tensor = self.last(x)
        return out

    def _scaled(self, m: Tensor) -> Tensor:
        return _alone(m.float()) if self.alone else m.float()


def train(
    decoder: Decoder,
    maps: Stack,
    target: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Fit the decoder on pairs by Adam, with a learning rate that falls to 0 as half a cosine. Draws from torch's generator."""
    optimizer = torch.optim.Adam(decoder.parameters(), learning_rate)
    order: list[int] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        while len(order) < batch_size:
            order += torch.randperm(len(target)).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad(set_to_none=True)
        loss(decoder(tuple(m[chosen] for m in maps)), target[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def fit_mask(
    maps: Stack, labels: Tensor, *, alone: bool, steps: int, width: int, batch_size: int, learning_rate: float
) -> Decoder:
    """A decoder of the logit of foreground, trained on maps and label maps (N, *spatial). Draws from torch's generator."""
    mask = (labels > 0).float().unsqueeze(1)
    decoder = Decoder(maps, tuple(mask.shape[2:]), 1, width=width, alone=alone)
    train(decoder, maps, mask, _mask_loss, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    return decoder


def _mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy and soft Dice: foreground is rare."""
    p = torch.sigmoid(logits)
    overlap = (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
    return functional.binary_cross_entropy_with_logits(logits, mask) - overlap


def decoded(decoder: Decoder, maps: Stack) -> Tensor:
    """What the decoder says of all patches."""
    with torch.no_grad():
        parts = [decoder(tuple(m[i : i + CHUNK] for m in maps)) for i in range(0, len(maps[0]), CHUNK)]
    return torch.cat(parts)


def _trail(sizes: Sequence[Size], target: Size) -> list[Size]:
    """Sizes from the coarsest map's, doubled along each axis until it is the target's."""
    smallest = min(sizes, key=math.prod)
    trail = [tuple(min(a, b) for a, b in zip(smallest, target, strict=True))]
    while trail[-1] != target:
        trail.append(tuple(min(2 * a, b) for a, b in zip(trail[-1], target, strict=True)))
    return trail


def _level(size: Size, trail: Sequence[Size]) -> int:
    """The first level at which nothing of a map of this size is lost, or the last."""
    fits = [i for i, at in enumerate(trail) if all(a >= b for a, b in zip(at, size, strict=True))]
    return fits[0] if fits else len(trail) - 1


def _resized(m: Tensor, size: Size) -> Tensor:
    if tuple(m.shape[2:]) == size:
        return m
    return functional.interpolate(m, size, mode=LINEAR[len(size)], align_corners=False)


def _alone(m: Tensor) -> Tensor:
    """Each patch's map divided by its own root mean square."""
    axes = tuple(range(1, m.ndim))
    return m / m.pow(2).mean(axes, keepdim=True).sqrt().clamp_min(1e-20)
