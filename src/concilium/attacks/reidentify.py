"""Whose image is behind the maps: the candidate in a gallery whose own maps are most alike.

The gallery holds other patches of the patients' images, drawn anew; an image that is known from elsewhere, say. Maps are made
small, each channel is brought to mean 0 and deviation 1 over the gallery, and the angle between them decides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from concilium.attacks import Auxiliary, Guess, Known, Transcript, stacked
from concilium.errors import ContractError
from concilium.networks import Stack

SEES, GUESSES = "maps", "patients"
REVEALS = "a receiver of maps that may run the front, and holds images of patients of whom it asks who took part"

POOLS = {2: functional.adaptive_avg_pool2d, 3: functional.adaptive_avg_pool3d}


def attack(transcript: Transcript, network: Known, auxiliary: Auxiliary, *, seed: int, grid: int = 8) -> Guess:
    """How alike each patch is to each candidate.

    Args:
        grid: points along each axis that a map is made small to.
    """
    if auxiliary.candidates is None:
        raise ContractError("No gallery was given. Re-identification needs candidates. Give some.")
    gallery, maps = (_described(stacked(of), grid) for of in (auxiliary.candidates.sent, transcript))
    mean, deviation = gallery.mean(0), gallery.std(0).clamp_min(1e-6)
    a, b = (functional.normalize((x - mean) / deviation, dim=1) for x in (maps, gallery))
    return Guess(patients=a @ b.T)


def _described(maps: Stack, grid: int) -> Tensor:
    """A row for each patch."""
    return torch.cat([_small(m.float(), grid).flatten(1) for m in maps if m.shape[1]], 1)


def _small(m: Tensor, grid: int) -> Tensor:
    size = [min(grid, n) for n in m.shape[2:]]
    pooled: Tensor = POOLS[len(size)](m, size)  # type: ignore[arg-type]
    return pooled
