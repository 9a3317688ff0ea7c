"""Surfaces of two masks and the distances between them, by the definitions of Nikolov et al. 2018 (arXiv:1809.04430).

A surface element sits at each corner where 2x2x2 voxels (2x2 pixels) meet that are neither all inside nor all outside;
what is beyond the edge of the image is outside. Its area [mm^2] (length [mm] in 2D) is that of the marching cubes
surface through this neighbourhood, its distance the Euclidean one to the nearest element of the other mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

VOXELS_PER_QUERY = 10
"""A query of the tree takes about as long as a distance transform takes for this many voxels."""


@dataclass(frozen=True, eq=False)
class Surface:
    """The elements of one mask's surface, those nearest to the other mask's surface first."""

    distances: NDArray[np.float64]
    """(K,) [mm], ascending; infinite where the other mask is empty."""
    areas: NDArray[np.float64]
    """(K,) [mm^2], lengths [mm] in 2D; all positive."""


@dataclass(frozen=True, eq=False)
class Surfaces:
    """The surfaces of two masks, each with its distances to the other. An empty mask has no elements."""

    prediction: Surface
    reference: Surface


def measure(prediction: NDArray[np.bool_], reference: NDArray[np.bool_], *, spacing: tuple[float, ...]) -> Surfaces:
    """The surfaces of two masks (X, Y) or (X, Y, Z) of equal shape; `spacing` is in mm per axis.

    All of the arrays is read: cut them to where the masks are (`Pair.cropped`).
    Source: Nikolov et al. 2018, arXiv:1809.04430, as the authors' package `surface-distance` computes it.
    """
    areas = _element_areas(spacing)
    codes = _neighbour_codes(prediction), _neighbour_codes(reference)
    # Mixed: neither all outside nor all inside.
    mixed_p, mixed_r = ((c != 0) & (c != (1 << 2**c.ndim) - 1) for c in codes)
    return Surfaces(
        prediction=_towards(mixed_p, areas, codes[0], mixed_r, spacing),
        reference=_towards(mixed_r, areas, codes[1], mixed_p, spacing),
    )


def _towards(
    mixed: NDArray[np.bool_],
    areas: NDArray[np.float64],
    codes: NDArray[np.uint8],
    other: NDArray[np.bool_],
    spacing: tuple[float, ...],
) -> Surface:
    """The elements at the corners where `mixed` is true, with their distances to those where `other` is true."""
    at = np.flatnonzero(mixed)
    found = areas[codes.ravel()[at]]
    distances = np.zeros(at.size)
    apart = ~other.ravel()[at]  # an element that both surfaces have is no distance away
    distances[apart] = _nearest(at[apart], other, spacing)
    order = np.argsort(distances, kind="stable")
    return Surface(distances[order], found[order])


def _nearest(corners: NDArray[np.intp], other: NDArray[np.bool_], spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """(K,) [mm]: from each of K corners, counted through, to the nearest where `other` is true; infinite where none is.

    A tree of the other surface is asked for each corner. Where corners are many for the volume, as in noise, it is quicker
    to find the nearest one for every voxel (`distance_transform_edt`). Both tell which corner is nearest, so that
    distances are computed from whole steps, and one that equals a tolerance is not rounded beyond it.
    """
    others = np.flatnonzero(other)
    if not others.size or not corners.size:
        return np.full(corners.size, np.inf)
    points, targets = (np.stack(np.unravel_index(flat, other.shape), axis=-1) for flat in (corners, others))
    if corners.size * VOXELS_PER_QUERY > other.size:
        found = ndimage.distance_transform_edt(~other, sampling=spacing, return_distances=False, return_indices=True)
        nearest = found.reshape(other.ndim, -1)[:, corners].T
    else:
        import torch  # for its number of threads: that of the study, or of the machine

        # Cut in the middle of space instead of at the median: quicker to build, and for a surface seen from afar to ask.
        tree = cKDTree(targets * np.asarray(spacing), leafsize=32, balanced_tree=False, compact_nodes=False)
        nearest = targets[tree.query(points * np.asarray(spacing), workers=torch.get_num_threads())[1]]
    steps = (nearest - points) * np.asarray(spacing)
    distances: NDArray[np.float64] = np.sqrt(np.einsum("kd,kd->k", steps, steps))
    return distances


def _neighbour_codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """uint8, one longer than the mask along each axis: which voxels around each corner are inside, one bit each.

    The bit of the voxel at (x, y, z) of the 2x2x2 is 7 - 4x - 2y - z, at (x, y) of the 2x2 it is 3 - 2x - y.
    """
    codes: NDArray[np.uint8] = np.pad(mask, 1).view(np.uint8)
    for axis in reversed(range(mask.ndim)):
        before, after = (codes[(slice(None),) * axis + (part,)] for part in (slice(None, -1), slice(1, None)))
        codes = (before << np.uint8(1 << (mask.ndim - 1 - axis))) | after
    return codes


def _element_areas(spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """(256,) areas [mm^2] in 3D, (16,) lengths [mm] in 2D, by neighbourhood code; 0 where all voxels are equal."""
    from monai.metrics.utils import _get_neighbour_code_to_normals_table, create_table_neighbour_code_to_contour_length

    if len(spacing) == 2:
        lengths: NDArray[np.float64] = create_table_neighbour_code_to_contour_length(spacing)[0].numpy()
        return lengths
    # MONAI's public table of areas is rounded to float32, which shows in the seventh digit; the normals are multiples
    # of 1/8, exact in float32, and give the areas in float64.
    normals = _get_neighbour_code_to_normals_table().numpy().astype(np.float64)
    a, b, c = spacing
    areas: NDArray[np.float64] = np.linalg.norm(normals * np.array([b * c, a * c, a * b]), axis=-1).sum(axis=-1)
    return areas
