"""Images from the maps that were sent, with neither a weight nor a pair: what the channels of the maps have most in common.

Channels of a first layer are filters of one image. Their first principal component (Pearson 1901, doi:10.1080/14786440109462720)
over all voxels is much of that image, but for scale and sign, which are taken from images of the same kind. So it needs nothing
that a secret front would hide, and costs next to nothing. Of several channels of an image it says the same for each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from concilium.attacks import Auxiliary, Guess, Known, Transcript, stacked
from concilium.attacks._decoder import LINEAR
from concilium.errors import ContractError

SEES, GUESSES = "maps", "images"
REVEALS = "a receiver of maps that knows no weight and no image with its maps, but images of the same kind"


def attack(transcript: Transcript, network: Known, auxiliary: Auxiliary, *, seed: int) -> Guess:
    """An image for each patch.

    Raises:
        ContractError: no map has a channel.
    """
    images = auxiliary.own.images
    size, axes = tuple(images.shape[2:]), (0, *range(2, images.ndim))
    sent = stacked(transcript)
    maps = [functional.interpolate(m.float(), size, mode=LINEAR[len(size)]) for m in sent if m.shape[1]]
    if not maps:
        raise ContractError(
            f"Maps of shapes {', '.join(str(tuple(m.shape)) for m in sent) or 'none'} came, none with a channel. A component "
            "needs one. Attack maps that have channels."
        )
    seen = torch.cat(maps, 1)
    channels = seen.transpose(0, 1).flatten(1).double()
    channels = channels - channels.mean(1, keepdim=True)
    channels = channels / channels.std(1, keepdim=True).clamp_min(1e-6)
    most = torch.linalg.eigh(channels @ channels.T / channels.shape[1])[1][:, -1]
    common = most @ channels
    common = (common / common.std().clamp_min(1e-6)).float().view(len(seen), 1, *size)
    mean, deviation = images.mean(axes, keepdim=True), images.std(axes, keepdim=True).clamp_min(1e-6)
    alike = _skew((images - mean) / deviation, axes) * _skew(common, axes)
    return Guess(images=torch.where(alike < 0, -common, common) * deviation + mean)


def _skew(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Of each channel, of mean 0: whether its large values lie above (positive) or below."""
    return x.pow(3).mean(axes, keepdim=True)
