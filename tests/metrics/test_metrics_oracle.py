"""The distance metrics against `surface-distance`, the package of the definitions' authors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import surface_distance

from concilium.metrics import Pair, _surfaces, dice, hd95, nsd

pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
SEEDS = [(seed, dimensions) for dimensions in (2, 3) for seed in range(40)]


@pytest.mark.parametrize("way", ["tree", "transform"])
@pytest.mark.parametrize(("seed", "dimensions"), SEEDS)
def test_equal_to_surface_distance(
    seed: int, dimensions: int, way: str, blobs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to find the nearest element, of which the size of the masks decides."""
    monkeypatch.setattr(_surfaces, "VOXELS_PER_QUERY", 0 if way == "tree" else 10**9)
    prediction, reference, spacing = blobs(seed, dimensions)
    pair = Pair(prediction, reference, spacing)
    expected = surface_distance.compute_surface_distances(reference, prediction, spacing)
    for surface, name, other in (
        (pair.surfaces.reference, "gt", "pred"),
        (pair.surfaces.prediction, "pred", "gt"),
    ):
        np.testing.assert_allclose(surface.distances, expected[f"distances_{name}_to_{other}"], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(surface.areas.sum(), expected[f"surfel_areas_{name}"].sum(), rtol=1e-12)
    for percent in (50.0, 95.0, 100.0):
        theirs = surface_distance.compute_robust_hausdorff(expected, percent)
        assert hd95.metric(pair, percent=percent) == pytest.approx(theirs, abs=1e-9)
    for tolerance in (0.0, 0.9, 2.0):
        theirs = surface_distance.compute_surface_dice_at_tolerance(expected, tolerance)
        assert nsd.metric(pair, tolerance=tolerance) == pytest.approx(theirs, abs=1e-9)
    assert dice.metric(pair) == pytest.approx(
        surface_distance.compute_dice_coefficient(reference, prediction), abs=1e-12
    )


def test_every_neighbourhood_has_the_area_of_surface_distance() -> None:
    """All 256 codes at once: white noise holds each of them many times."""
    random = np.random.default_rng(0)
    prediction, reference = random.random((2, 30, 30, 30)) > 0.5
    spacing = (0.7, 1.3, 3.1)
    expected = surface_distance.compute_surface_distances(reference, prediction, spacing)
    ours = Pair(prediction, reference, spacing).surfaces.reference
    np.testing.assert_allclose(np.sort(ours.areas), np.sort(expected["surfel_areas_gt"]), rtol=1e-12)


def test_both_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is looked up voxel by voxel, a large smooth surface in a tree."""
    ways: list[str] = []
    for name in ("cKDTree", "ndimage"):
        module = getattr(_surfaces, name)

        def spy(*a: Any, name: str = name, module: Any = module, **k: Any) -> Any:
            ways.append(name)
            return getattr(module, "distance_transform_edt", module)(*a, **k)

        monkeypatch.setattr(_surfaces, name, SimpleNamespace(distance_transform_edt=spy) if name == "ndimage" else spy)
    x, y, z = np.ogrid[:60, :60, :60]
    reference = (x - 30) ** 2 + (y - 30) ** 2 + (z - 30) ** 2 < 25**2
    assert Pair(np.roll(reference, 2, 0), reference, None).surfaces.reference.areas.size > 1000
    assert ways == ["cKDTree", "cKDTree"]
    noise = np.random.default_rng(0).random((20, 20, 20)) > 0.5
    sparse = np.random.default_rng(1).random((20, 20, 20)) > 0.99
    assert Pair(sparse, noise, None).surfaces.reference.areas.size > 1000
    assert ways[-1] == "ndimage"
