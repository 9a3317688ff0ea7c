"""How near a guess is to the truth: inside the body, with a fixed window and range; each beside a guess without looking.

SSIM after Wang et al. 2004 (doi:10.1109/TIP.2003.819861) with its Gaussian window (deviation 1.5), by scikit-image, as the mean
of its map over the body. Images are clipped to the range of the attacker's own cases first: one range for all patches, so that no
figure depends on the brightest voxel of a patch. Background dominates medical images, and would flatter every attack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import pdist, squareform
from scipy.stats import rankdata
from skimage.metrics import structural_similarity

Array: TypeAlias = NDArray[Any]
AIR = 0.1
"""Share of the range above its lower end that counts as air."""
WINDOW = 11
"""Voxels that the Gaussian window of SSIM spans; along a shorter axis it is computed slice by slice."""
SIGMA = 1.5
FALSE_POSITIVES = 0.01
"""At which the true-positive rate of membership inference is told (Carlini et al. 2022, arXiv:2112.03570)."""


@dataclass(frozen=True)
class Range:
    """Lower and upper end of each channel, (C,)."""

    low: Array
    high: Array


def range_of(images: Array) -> Range:
    """The 0.5th and 99.5th percentile of each channel of images (N, C, *spatial)."""
    flat = np.moveaxis(images, 1, 0).reshape(images.shape[1], -1)
    low, high = np.percentile(flat, [0.5, 99.5], axis=1)
    return Range(low, np.maximum(high, low + 1e-6))


def body_of(image: Array, within: Range) -> Array:
    """bool (*spatial): where some channel of the image (C, *spatial) is above air, holes filled; never empty.

    A value that more than a hundredth of the voxels share exactly, and where all channels have such a value, is no body either:
    so is padding, and what normalisation set to 0 outside a mask.
    """
    shape = (-1, *[1] * (image.ndim - 1))
    low, high = within.low.reshape(shape), within.high.reshape(shape)
    body = ((image - low) / (high - low) > AIR).any(axis=0)
    constant = np.ones(image.shape[1:], bool)
    for channel in image:
        values, counts = np.unique(channel, return_counts=True)
        most = counts.argmax()
        constant &= (channel == values[most]) & (counts[most] > 0.01 * channel.size)
    filled: Array = ndimage.binary_fill_holes(body & ~constant)
    return filled if filled.any() else np.ones_like(filled)


def ssim(truth: Array, guess: Array, low: float, high: float, body: Array) -> float:
    """Structural similarity of one channel (*spatial), mean over the body."""
    a, b = (np.clip(x.astype(np.float64), low, high) for x in (truth, guess))
    return float(_ssim_map(a, b, high - low)[body].mean())


def _ssim_map(a: Array, b: Array, data_range: float) -> Array:
    short = int(np.argmin(a.shape))
    if a.shape[short] < WINDOW and a.ndim == 3:
        slices = zip(np.moveaxis(a, short, 0), np.moveaxis(b, short, 0), strict=True)
        return np.moveaxis(np.stack([_ssim_map(x, y, data_range) for x, y in slices]), 0, short)
    _, found = structural_similarity(
        a, b, data_range=data_range, gaussian_weights=True, sigma=SIGMA, use_sample_covariance=False, full=True
    )
    whole: Array = found
    return whole


def psnr(truth: Array, guess: Array, low: float, high: float, body: Array) -> float:
    """Peak signal-to-noise ratio [dB] over the body, of the same range; at most 100."""
    a, b = (np.clip(x.astype(np.float64), low, high)[body] for x in (truth, guess))
    error = max(float(np.mean((a - b) ** 2)), 1e-10 * (high - low) ** 2)
    return float(10 * np.log10((high - low) ** 2 / error))


def dice(truth: Array, guess: Array) -> float:
    """Of two masks; 1 where both are empty."""
    both, size = int((truth & guess).sum()), int(truth.sum() + guess.sum())
    return 2 * both / size if size else 1.0


def best_threshold(chance: Array, truth: Array) -> float:
    """The threshold at which chances give the best mean Dice over patches (N, *spatial): how an attacker sets it on its own."""
    steps = np.unique(np.quantile(chance, np.linspace(0, 0.99, 25)))
    found = [float(np.mean([dice(t, c > at) for t, c in zip(truth, chance, strict=True)])) for at in steps]
    return float(steps[int(np.argmax(found))])


def distance_correlation(a: Array, b: Array) -> float:
    """Bias-corrected squared distance correlation of patches (N, ...) with patches (N, ...), -1 to 1; independent ones give 0.

    Székely & Rizzo 2013 (doi:10.1016/j.jmva.2013.02.012), eq. 3.4: the plain one tends to 1 with many values per patch.
    """
    u, v = (_centred(x.reshape(len(x), -1).astype(np.float64)) for x in (a, b))
    spread = float(np.sqrt((u * u).sum() * (v * v).sum()))
    return float((u * v).sum()) / spread if spread > 0 else 0.0


def _centred(x: Array) -> Array:
    """U-centred distances, 0 on the diagonal."""
    d = squareform(pdist(x))
    n = len(d)
    rows = d.sum(axis=1)
    centred: Array = d - rows[:, None] / (n - 2) - rows[None] / (n - 2) + d.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0)
    return centred


def auc_of(scores: Array, members: Array) -> tuple[float, float]:
    """Area under the ROC curve, and the share of members found where a hundredth of the others is taken for members.

    Of the second, ties at the threshold count as not found.
    """
    ranks, inside = rankdata(scores), int(members.sum())
    outside = len(members) - inside
    area = (float(ranks[members].sum()) - inside * (inside + 1) / 2) / (inside * outside)
    allowed = int(FALSE_POSITIVES * outside)
    threshold = np.sort(scores[~members])[::-1][allowed]
    return area, float((scores[members] > threshold).mean())
