"""NoPeek: the site adds to its loss how much the maps that it sends depend on the images: their distance correlation.

Vepakomma et al. 2020 (arXiv:2008.09161), eq. 1: weight times the distance correlation of images and activations over the batch,
here the mean over the float maps that leave. Distance correlation: Szekely et al. 2007 (doi:10.1214/009053607000000505), eq. 2.8
to 2.10, of the sample. Of two images it is always 1, and of three or four nearly so: it takes batches. It changes what the front
learns, and nothing when a map is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from concilium.defences import Defence
from concilium.errors import StudyError

LEAST = 4
"""Patches in a batch."""


def defend(*, n_channels: int, n_axes: int, weight: float = 0.1) -> Defence:
    """The defence of one map.

    Args:
        weight: of the distance correlation beside the loss; 0: none. Titcombe et al. 2021 (arXiv:2104.05743) try 0.1 to 1.
    """

    def penalty(image: Tensor, m: Tensor) -> Tensor:
        with torch.autocast(m.device.type, enabled=False):
            return weight * distance_correlation(image.float(), m.float())

    return Defence(nn.Identity(), n_channels, penalty=None if weight == 0 else penalty)


def check(*, batch_size: int, weight: float) -> None:
    """Refuse batches of which the distance correlation says nothing.

    Raises:
        StudyError: it is one.
    """
    if batch_size < LEAST:
        raise StudyError(
            f"[[defences]] name = 'nopeek' is not possible with batches of {batch_size}: of so few images the distance "
            f"correlation is 1, or nearly, whatever the maps. Allowed: {LEAST} or more. Set [training] batch_size, or choose "
            "another defence."
        )


def distance_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of two samples (B, ...), paired: from 0, independent, to 1. 0 where one of them does not vary."""
    x, y = _centred(a), _centred(b)
    covariance, variances = (x * y).mean(), (x * x).mean() * (y * y).mean()
    squared = covariance.clamp_min(0) / variances.clamp_min(1e-24).sqrt()
    return squared.clamp_min(1e-12).sqrt() if bool(squared > 0) else squared


def _centred(a: Tensor) -> Tensor:
    """Euclidean distances between the members of a sample, less the means of row and column (B, B)."""
    flat = a.flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distances - distances.mean(0, keepdim=True) - distances.mean(1, keepdim=True) + distances.mean()
