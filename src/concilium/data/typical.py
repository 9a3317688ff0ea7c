"""What is typical of a site's cases, from its fingerprint alone: median shape and spacing, and the range of each channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from concilium.data.fingerprint import percentile
from concilium.messages import Fingerprint

AXES = ("z", "y", "x")
"""Names of the file's axes, its last first, as arrays have them."""


def medians(fingerprint: Fingerprint, axes: Sequence[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Median shape [voxels] and spacing [mm] of a site's cases, along these axes."""
    shapes = np.array([g.shape for g in fingerprint.geometry for _ in range(g.count)], float)
    spacings = np.array([g.spacing for g in fingerprint.geometry for _ in range(g.count)], float)
    order = [AXES.index(axis) for axis in axes]
    shape, spacing = (np.median(values, axis=0)[order] for values in (shapes, spacings))
    return tuple(map(float, shape)), tuple(map(float, spacing))


def ranges(fingerprint: Fingerprint, held: Sequence[int] | None = None) -> tuple[tuple[float, float] | None, ...]:
    """From 0.5 to 99.5 % of the foreground of each channel; of a party, of those that it holds."""
    return tuple(
        (percentile(c, 0.5), percentile(c, 99.5)) if len(c.keys) and (held is None or i in held) else None
        for i, c in enumerate(fingerprint.channels)
    )
