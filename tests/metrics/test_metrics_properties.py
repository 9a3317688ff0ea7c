"""What must hold for any two masks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from concilium.errors import ContractError, StudyError
from concilium.metrics import Pair, dice, hd95, iou, nsd, status

SEEDS = [(seed, dimensions) for dimensions in (2, 3) for seed in range(5)]
each_pair = pytest.mark.parametrize(("seed", "dimensions"), SEEDS)


def all_four(pair: Pair) -> tuple[float | None, ...]:
    return dice.metric(pair), iou.metric(pair), hd95.metric(pair), nsd.metric(pair)


@each_pair
def test_symmetric(seed: int, dimensions: int, blobs: Callable[..., Any]) -> None:
    prediction, reference, spacing = blobs(seed, dimensions)
    assert all_four(Pair(prediction, reference, spacing)) == all_four(Pair(reference, prediction, spacing))


@each_pair
def test_perfect(seed: int, dimensions: int, blobs: Callable[..., Any]) -> None:
    mask, _, spacing = blobs(seed, dimensions)
    assert all_four(Pair(mask, mask.copy(), spacing)) == (1.0, 1.0, 0.0, 1.0)


@each_pair
def test_monotone_and_consistent(seed: int, dimensions: int, blobs: Callable[..., Any]) -> None:
    pair = Pair(*blobs(seed, dimensions))
    distances = [hd95.metric(pair, percent=p) or 0.0 for p in (1, 25, 50, 75, 90, 95, 99, 100)]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1]
    shares = [nsd.metric(pair, tolerance=t) or 0.0 for t in (0, 0.5, 1, 2, 4, distances[-1])]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    overlap = dice.metric(pair)
    assert overlap is not None
    assert iou.metric(pair) == pytest.approx(overlap / (2 - overlap))


@each_pair
def test_scales_with_the_spacing(seed: int, dimensions: int, blobs: Callable[..., Any]) -> None:
    prediction, reference, spacing = blobs(seed, dimensions)
    pair = Pair(prediction, reference, spacing)
    tripled = Pair(prediction, reference, tuple(3 * s for s in spacing))
    assert hd95.metric(tripled) == pytest.approx(3 * (hd95.metric(pair) or 0.0))
    assert nsd.metric(tripled, tolerance=4.5) == pytest.approx(nsd.metric(pair, tolerance=1.5))


@each_pair
def test_the_edge_of_the_image_is_a_surface(seed: int, dimensions: int, blobs: Callable[..., Any]) -> None:
    prediction, reference, spacing = blobs(seed, dimensions)
    prediction[0], reference[..., -1] = True, True  # both touch an edge along its whole length
    padded = Pair(np.pad(prediction, 5), np.pad(reference, 5), spacing)
    assert all_four(Pair(prediction, reference, spacing)) == all_four(padded)


def test_mask_that_fills_the_image() -> None:
    mask = np.ones((4, 4, 4), bool)
    middle = np.zeros((4, 4, 4), bool)
    middle[1:3, 1:3, 1:3] = True
    assert hd95.metric(Pair(middle, mask, None), percent=100) == pytest.approx(3**0.5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("known", [True, False])
def test_single_slice_is_a_2d_image(axis: int, known: bool, blobs: Callable[..., Any]) -> None:
    prediction, reference, spacing = blobs(1, 2)
    flat = Pair(prediction, reference, spacing if known else None)
    deep = (*spacing[:axis], 999.0, *spacing[axis:]) if known else None
    slab = Pair(np.expand_dims(prediction, axis), np.expand_dims(reference, axis), deep)
    assert all_four(slab) == all_four(flat)
    assert slab.squeezed.spacing == flat.spacing
    assert slab.squeezed.reference.shape == reference.shape
    assert slab.unit == flat.unit == ("mm" if known else "px")


def test_unknown_spacing_counts_pixels(blobs: Callable[..., Any]) -> None:
    prediction, reference, _ = blobs(2, 3)
    assert all_four(Pair(prediction, reference, None)) == all_four(Pair(prediction, reference, (1.0, 1.0, 1.0)))


def test_memory_order_and_numpy_spacing_do_not_matter(blobs: Callable[..., Any]) -> None:
    prediction, reference, spacing = blobs(3, 3)
    fortran = Pair(np.asfortranarray(prediction), np.asfortranarray(reference), tuple(np.asarray(spacing)))
    assert all_four(fortran) == all_four(Pair(prediction, reference, spacing))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(
    ("predicted", "present", "word", "overlap", "distance"),
    [
        (True, True, "ok", 1.0, 0.0),
        (True, False, "empty_reference", 0.0, None),
        (False, True, "empty_prediction", 0.0, None),
        (False, False, "both_empty", None, None),
    ],
)
def test_rule_for_empty_masks(
    predicted: bool, present: bool, word: str, overlap: float | None, distance: float | None, dimensions: int
) -> None:
    prediction, reference = np.zeros((2, *(5,) * dimensions), bool)
    prediction[(2,) * dimensions], reference[(2,) * dimensions] = predicted, present
    pair = Pair(prediction, reference, (2.0,) * dimensions)
    assert status(pair) == word
    assert all_four(pair) == (overlap, overlap, distance, overlap)
    surfaces = pair.surfaces  # defined even where no metric asks for it
    assert (surfaces.prediction.areas.size > 0, surfaces.reference.areas.size > 0) == (predicted, present)
    assert bool(np.isinf(surfaces.prediction.distances).any()) == (predicted and not present)


def test_surfaces_are_computed_once(blobs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import concilium.metrics

    calls = []
    original = concilium.metrics.measure
    monkeypatch.setattr(concilium.metrics, "measure", lambda *a, **k: calls.append(1) or original(*a, **k))
    pair = Pair(*blobs(0, 2))
    all_four(pair)
    all_four(pair)
    assert len(calls) == 1


MASK = np.zeros((3, 4), bool)


@pytest.mark.parametrize(
    ("prediction", "reference", "spacing", "words"),
    [
        (MASK, MASK.T, None, r"\(3, 4\).*\(4, 3\)"),
        (MASK.astype(np.uint8), MASK, None, "prediction is 2D of uint8"),
        (MASK, MASK.astype(float), None, "reference is 2D of float64"),
        (MASK[0], MASK[0], None, "1D"),
        (MASK[None, None], MASK[None, None], None, "4D"),
        (MASK, MASK, (1.0, 1.0, 1.0), "spacing"),
        (MASK, MASK, (1.0, 0.0), "spacing"),
        (MASK, MASK, (1.0, float("nan")), "spacing"),
        (MASK, MASK, (1.0, float("inf")), "spacing"),
    ],
)
def test_refuses_what_it_cannot_compare(prediction: Any, reference: Any, spacing: Any, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        Pair(prediction, reference, spacing)


@pytest.mark.parametrize("percent", [0, -1, 101, float("nan")])
def test_refuses_a_wrong_percent(percent: float) -> None:
    with pytest.raises(StudyError, match="percent"):
        hd95.metric(Pair(MASK, MASK, None), percent=percent)


@pytest.mark.parametrize("tolerance", [-0.1, float("inf"), float("nan")])
def test_refuses_a_wrong_tolerance(tolerance: float) -> None:
    with pytest.raises(StudyError, match="tolerance"):
        nsd.metric(Pair(MASK, MASK, None), tolerance=tolerance)


def test_heavy_libraries_are_imported_only_when_a_surface_is_measured() -> None:
    code = "import sys, concilium.metrics.nsd; sys.exit('monai' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
