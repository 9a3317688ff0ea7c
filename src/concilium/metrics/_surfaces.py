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

    Source: Nikolov et al. 2018, arXiv:1809.04430, as the authors' package `surface-distance` computes it.
    """
    box = ndimage.find_objects((prediction | reference).view(np.uint8))
    if not box:
        nothing = Surface(np.empty(0), np.empty(0))
        return Surfaces(nothing, nothing)
    areas = _element_areas(spacing)
    area_p = areas[_neighbour_codes(prediction[box[0]])]
    area_r = areas[_neighbour_codes(reference[box[0]])]
    return Surfaces(
        prediction=_towards(area_p, area_r > 0, spacing),
        reference=_towards(area_r, area_p > 0, spacing),
    )


def _towards(areas: NDArray[np.float64], other: NDArray[np.bool_], spacing: tuple[float, ...]) -> Surface:
    """The elements where `areas` is positive, with their distances to those where `other` is true."""
    points = np.nonzero(areas)
    if not other.any():
        return Surface(np.full(points[0].size, np.inf), areas[points])
    # The nearest points instead of the distances: those are needed at the surface only, not in the whole volume.
    nearest = ndimage.distance_transform_edt(~other, sampling=spacing, return_distances=False, return_indices=True)
    squares = np.zeros(points[0].size)
    for axis, step in enumerate(spacing):
        squares += ((nearest[axis][points] - points[axis]) * step) ** 2
    distances = np.sqrt(squares)
    order = np.lexsort((areas[points], distances))
    return Surface(distances[order], areas[points][order])


def _neighbour_codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """uint8, one longer than the mask along each axis: which voxels around each corner are inside, one bit each."""
    from monai.metrics.utils import ENCODING_KERNEL

    padded = np.pad(mask, 1).view(np.uint8)
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for start, bit in np.ndenumerate(np.asarray(ENCODING_KERNEL[mask.ndim], np.uint8)):
        codes += bit * padded[tuple(slice(s, s + n) for s, n in zip(start, codes.shape, strict=True))]
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
