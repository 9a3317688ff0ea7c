"""What is added to a frozen Segment-Anything to train it: adapters, or low-rank updates of attention; both begin as nothing.

Adapters: Wu et al., Medical SAM Adapter, 2023 (arXiv:2304.12620), as Liu et al., FedFMS, MICCAI 2024 (arXiv:2403.05408) have
them. Low rank: Hu et al., LoRA, 2021 (arXiv:2106.09685), on queries and values. The last layer of each is zero at first, so that
step 0 computes what the network computes without them; FedFMS draws it, which destroys what was learnt before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Adapt: TypeAlias = Literal["none", "adapters", "lora"]
SHARE = 0.5
"""Of the adapter beside the two linear layers, what is added to theirs."""
DOWN, UP = ".down.weight", ".up.weight"
PARTS: Mapping[str, int] = {".lora_q": 0, ".lora_v": 2}
"""Low-rank update -> third of the rows of `inputs` (queries, keys, values) that it is added to."""


@dataclass(frozen=True)
class Adaptation:
    """What a block has beside its own weights."""

    kind: Adapt = "none"
    rank: int = 4
    """Of low-rank updates."""
    features: int = 192
    """Between the two layers of an adapter."""
    through_plane: bool = False
    """Whether a third adapter looks at the neighbouring slices."""


class Adapter(nn.Module):
    """Two linear layers with a narrow middle, (..., n) to the same; zero at first."""

    def __init__(self, n: int, features: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(n, features), nn.Linear(features, n)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(nn.functional.gelu(self.down(x)))
        return y


class LowRank(nn.Module):
    """A linear map of low rank, (..., n) to the same; zero at first. Its scale is 1 (LoRA's alpha is the rank)."""

    def __init__(self, n: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(n, rank, bias=False), nn.Linear(rank, n, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y


def added(name: str) -> bool:
    """Whether the tensor of this name is one of those that are added."""
    return ".adapter" in name or ".lora" in name


def beside(x: Tensor) -> Tensor:
    """The mean of the slice before and the one after, (B, D, ...) to the same; beyond the ends there is 0."""
    edge = torch.zeros_like(x[:, :1])
    return (torch.cat((edge, x[:, :-1]), 1) + torch.cat((x[:, 1:], edge), 1)) / 2


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the same network without low-rank updates, in whose place the weights of attention have changed.

    Args:
        weights: by name, of a network with `adapt = "lora"`; others come back as they are. Nothing in it is changed.

    Returns:
        What a network with `adapt = "none"` takes. Sums are taken in float64 and rounded once.
    """
    plain = {name: tensor for name, tensor in weights.items() if not any(f"{part}." in name for part in PARTS)}
    sums: dict[str, Tensor] = {}
    for part, third in PARTS.items():
        for name in [n for n in weights if n.endswith(part + DOWN)]:
            owner = name.removesuffix(part + DOWN)
            down, up, key = weights[name], weights[owner + part + UP], f"{owner}.inputs.weight"
            rows = slice(third * up.shape[0], (third + 1) * up.shape[0])
            sums.setdefault(key, plain[key].to(torch.float64, copy=True))[rows] += up.double() @ down.double()
    return plain | {name: total.to(weights[name].dtype) for name, total in sums.items()}
