"""Shapes computed by hand. A box of n voxels has n + 1 corners along an axis; surface elements sit at corners."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from numpy.typing import NDArray

from concilium.metrics import Pair, dice, hd95, iou, nsd
from concilium.metrics._surfaces import measure


def box(shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> NDArray[np.bool_]:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = True
    return mask


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 3.1), (5.0, 0.4, 0.4)])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 3, 3), (2, 4, 5)])
def test_area_of_a_box(size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    a, b, c = spacing
    x, y, z = (n - 1 for n in size)
    faces = 2 * (x * y * a * b + x * z * a * c + y * z * b * c)
    # Marching cubes cuts off edges and corners half-way.
    edges = 4 * (x * a * sqrt(b * b + c * c) + y * b * sqrt(a * a + c * c) + z * c * sqrt(a * a + b * b)) / 2
    corners = sqrt((b * c) ** 2 + (a * c) ** 2 + (a * b) ** 2)
    mask = box((7, 8, 9), (2, 2, 2), size)
    surface = measure(mask, mask, spacing=spacing).reference
    assert surface.areas.sum() == pytest.approx(faces + edges + corners, rel=1e-12)
    assert not surface.distances.any()


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 3.1)])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (2, 5)])
def test_length_of_the_contour_of_a_rectangle(size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    (a, b), (x, y) = spacing, size
    mask = box((8, 9), (2, 2), size)
    expected = 2 * (x - 1) * a + 2 * (y - 1) * b + 2 * sqrt(a * a + b * b)
    assert measure(mask, mask, spacing=spacing).prediction.areas.sum() == pytest.approx(expected, rel=1e-12)


def test_cube_shifted_by_one_voxel() -> None:
    """4^3 corners: the 16 of the rear face and the inner 4 of the front face are one voxel off, all others coincide."""
    pair = Pair(box((8, 8, 8), (2, 2, 2), (3, 3, 3)), box((8, 8, 8), (3, 2, 2), (3, 3, 3)), None)
    total = 24 + 24 * sqrt(2) / 2 + sqrt(3)
    off = (4 + 8 * sqrt(2) / 2 + sqrt(3) / 2) + 4
    assert dice.metric(pair) == pytest.approx(2 * 18 / 54)
    assert iou.metric(pair) == pytest.approx(18 / 36)
    assert nsd.metric(pair, tolerance=0.5) == pytest.approx(1 - off / total, rel=1e-12)
    assert nsd.metric(pair) == 1.0  # a distance equal to the tolerance is within it
    assert hd95.metric(pair) == 1.0
    assert hd95.metric(pair, percent=60) == 0.0  # 66 % of the area coincide


@pytest.mark.parametrize(("axis", "expected"), [(0, 0.5), (1, 2.0), (2, 3.0)])
def test_shift_is_measured_in_mm_along_its_axis(axis: int, expected: float) -> None:
    """A cube of 6 moved by 1 voxel: from the middle of a face the side walls are 3 voxels or more away."""
    start = [2, 2, 2]
    reference = box((10, 10, 10), (2, 2, 2), (6, 6, 6))
    start[axis] += 1
    pair = Pair(box((10, 10, 10), (start[0], start[1], start[2]), (6, 6, 6)), reference, (0.5, 2.0, 3.0))
    assert hd95.metric(pair, percent=100) == expected


def test_two_single_voxels() -> None:
    """Corners at 1, 2 and at 6, 7 along the last axis: the near four are 4 steps of 2.5 mm away, the far four 5."""
    pair = Pair(box((4, 4, 9), (1, 1, 1), (1, 1, 1)), box((4, 4, 9), (1, 1, 6), (1, 1, 1)), (1.0, 1.0, 2.5))
    assert hd95.metric(pair) == 12.5
    assert hd95.metric(pair, percent=40) == 10.0
    assert nsd.metric(pair, tolerance=10.0) == pytest.approx(0.5)
    assert nsd.metric(pair, tolerance=9.99) == 0.0
    assert dice.metric(pair) == iou.metric(pair) == 0.0
    pixels = Pair(pair.prediction, pair.reference, None)
    assert hd95.metric(pixels) == 5.0
    assert (pair.unit, pixels.unit) == ("mm", "px")


def test_two_single_pixels_across_a_diagonal() -> None:
    """Corners at (1..2, 1..2) and (4..5, 5..6): the farthest is 3 by 4 steps off, one of four 2 by 3."""
    pair = Pair(box((8, 8), (1, 1), (1, 1)), box((8, 8), (4, 5), (1, 1)), (2.0, 1.0))
    assert hd95.metric(pair) == pytest.approx(sqrt((3 * 2) ** 2 + 4**2))
    assert nsd.metric(pair, tolerance=sqrt(4**2 + 3**2)) == pytest.approx(1 / 4)


def test_outlier_below_five_percent_of_the_area_is_ignored() -> None:
    """A stray voxel (area sqrt(3) of about 540 mm^2) does not move the 95th percentile, but the maximum."""
    reference = box((24, 12, 12), (1, 1, 1), (10, 10, 10))
    prediction = reference.copy()
    prediction[22, 5, 5] = True
    pair = Pair(prediction, reference, (1.0, 1.0, 1.0))
    assert hd95.metric(pair) == 0.0
    assert hd95.metric(pair, percent=100) == 12.0  # corner plane 23 to plane 11


def test_percentile_is_weighted_by_area_and_not_by_count() -> None:
    """A stray voxel has over 5 % of the elements and under 5 % of the area: it does not move the percentile."""
    reference = box((24, 24, 4), (1, 1, 1), (2, 20, 1))
    prediction = reference.copy()
    prediction[12, 10, 1] = True
    surface = measure(prediction, reference, spacing=(1.0, 10.0, 1.0)).prediction
    stray = surface.distances > 0
    assert stray.mean() > 0.05
    assert surface.areas[stray].sum() / surface.areas.sum() < 0.05
    assert hd95.metric(Pair(prediction, reference, (1.0, 10.0, 1.0))) == 0.0


def test_hole_is_a_surface_too() -> None:
    reference = box((9, 9, 9), (1, 1, 1), (7, 7, 7))
    prediction = reference.copy()
    prediction[4, 4, 4] = False
    pair = Pair(prediction, reference, None)
    assert hd95.metric(pair, percent=100) == 3.0  # corner plane 4 or 5 to the wall at 1 or 8
    whole = measure(reference, reference, spacing=(1.0, 1.0, 1.0)).reference.areas.sum()
    assert pair.surfaces.prediction.areas.sum() == pytest.approx(whole + sqrt(3), rel=1e-12)
