"""Pairs cut out of label maps score as masks of the whole maps do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from concilium.errors import ContractError
from concilium.metrics import Pair, dice, hd95, iou, nsd, status
from concilium.metrics._boxes import bounding_box
from concilium.metrics._lesions import Lesions, count_lesions
from concilium.metrics._pairs import pairs

LABELS: dict[str, int | tuple[int, ...]] = {
    "background": 0,
    "a": 1,
    "b": 2,
    "none": 3,
    "d": 300,
    "both": (1, 2),
    "far": 900,
}


def scores(pair: Pair) -> tuple[Any, ...]:
    volumes = int(pair.prediction.sum()), int(pair.reference.sum())
    values = dice.metric(pair), iou.metric(pair), hd95.metric(pair), nsd.metric(pair)
    return status(pair), pair.unit, *volumes, *values, count_lesions(pair)


def maps(shape: tuple[int, ...]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Two label maps with labels at every edge, one label in one map only, and one thin as a voxel."""
    random = np.random.default_rng(list(shape))
    prediction, reference = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for label in (1, 2, 300):
        start = [int(random.integers(0, max(1, n - 3))) for n in shape]
        for label_map, offset in ((prediction, 0), (reference, 1)):
            label_map[tuple(slice(s + offset, s + offset + 5) for s in start)] = label
    prediction[(0,) * len(shape)] = prediction[(-1,) * len(shape)] = 2
    reference[tuple(slice(0, 1) if a == 0 else slice(None) for a in range(len(shape)))] = 1
    prediction[(slice(None), *(0,) * (len(shape) - 1))] = 3
    return prediction, reference


SHAPES = [(13, 17, 11), (2, 9, 9), (13, 17), (1, 13, 17), (13, 1, 17), (13, 17, 1), (1, 1, 9)]


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint16])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_score_as_whole_masks_do(shape: tuple[int, ...], order: Any, dtype: Any) -> None:
    prediction, reference = (np.asarray(m, dtype, order=order) for m in maps(shape))
    for spacing in (None, (0.7, 1.3, 3.1)[: len(shape)]):
        found = dict(pairs(prediction, reference, LABELS, spacing))
        assert list(found) == ["a", "b", "none", "d", "both", "far"]
        for label, pair in found.items():
            ids = LABELS[label]
            whole = Pair(np.isin(prediction, ids), np.isin(reference, ids), spacing)
            assert scores(pair) == scores(whole), label


def test_a_pair_holds_its_label_and_one_voxel_around() -> None:
    label_map = np.zeros((40, 50, 60), np.uint8)
    label_map[10:12, 20:23, 59] = 1
    label_map[30:34, 0, 0] = 2
    found = dict(pairs(label_map, label_map, {"a": 1, "b": 2, "both": (1, 2)}, None))
    assert {k: p.reference.shape for k, p in found.items()} == {"a": (4, 5, 2), "b": (6, 2, 2), "both": (26, 24, 60)}


def test_voxels_that_do_not_count_are_in_neither_mask() -> None:
    prediction, reference = maps((13, 17, 11))
    counted = np.random.default_rng(0).random((13, 17, 11)) > 0.3
    for label, pair in pairs(prediction, reference, LABELS, None, counted=counted):
        ids = LABELS[label]
        whole = Pair(np.isin(prediction, ids) & counted, np.isin(reference, ids) & counted, None)
        assert scores(pair) == scores(whole), label


def test_the_maps_are_not_changed() -> None:
    prediction, reference = maps((13, 17, 11))
    before = prediction.tobytes(), reference.tobytes()
    prediction.flags.writeable = reference.flags.writeable = False
    assert len(list(pairs(prediction, reference, LABELS, None, counted=reference > 0))) == 6
    assert (prediction.tobytes(), reference.tobytes()) == before


@pytest.mark.parametrize("wrong", [0.5, -1.0, float("nan"), float("inf"), 65536.0, 1e9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_what_is_no_id_is_refused(wrong: float, dtype: Any) -> None:
    if dtype == np.int64 and wrong not in (-1.0, 65536.0, 1e9):
        return
    good = np.zeros((3, 3, 3), dtype)
    bad = good.copy()
    bad[1, 1, 1] = wrong
    for two in ((good, bad), (bad, good)):
        with pytest.raises(ContractError, match="whole numbers from 0 to 65535"):
            pairs(*two, {"a": 1}, None)


def test_maps_of_different_shape_are_refused() -> None:
    one, other = np.zeros((3, 4, 5)), np.zeros((3, 5, 4))
    with pytest.raises(ContractError, match=r"prediction is \(3, 4, 5\), the reference \(3, 5, 4\)"):
        pairs(one, other, {"a": 1}, None)
    with pytest.raises(ContractError, match=r"mask of voxels that count is \(3, 5, 4\)"):
        pairs(one, one, {"a": 1}, None, counted=other > 0)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_bounding_box(dimensions: int, order: Any) -> None:
    random = np.random.default_rng(dimensions)
    for _ in range(100):
        mask = np.asarray(random.random((9, 8, 7)[:dimensions]) > random.choice([0.6, 0.97, 0.995, 1.0]), order=order)
        where = np.argwhere(mask)
        expected = (
            tuple(slice(a, b + 1) for a, b in zip(where.min(0), where.max(0), strict=True)) if len(where) else None
        )
        assert bounding_box(mask) == expected


# ------------------------------------------------------------------------------------------------------------- lesions


def drawing(text: str) -> NDArray[np.bool_]:
    return np.array([[c == "#" for c in line] for line in text.split()])


def test_lesions_by_hand() -> None:
    """Of four lesions one is hit in full, one in 1 of 10 pixels, two in none; two of the four predicted ones hit nothing."""
    reference = drawing("""
        ##..........
        ..#.....##..
        ........##..
        #####.......
        #####....#..
    """)
    prediction = drawing("""
        ##.....#....
        ..#.........
        .....#......
        ....#.......
        ............
    """)
    prediction[0, 11] = True
    assert count_lesions(Pair(prediction, reference, None)) == Lesions(found=2, missed=2, false=2)
    reference[2, 4] = True  # the second lesion has 11 pixels now
    assert count_lesions(Pair(prediction, reference, None)) == Lesions(found=1, missed=3, false=2)
    prediction[4, 0] = True  # 2 of 11, in two components
    assert count_lesions(Pair(prediction, reference, None)) == Lesions(found=2, missed=2, false=2)


def test_lesions_touch_at_corners() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    nothing = np.zeros_like(mask)
    assert count_lesions(Pair(mask, mask, None)) == Lesions(2, 0, 0)
    assert count_lesions(Pair(nothing, mask, None)) == Lesions(0, 2, 0)
    assert count_lesions(Pair(mask, nothing, None)) == Lesions(0, 0, 2)
    assert count_lesions(Pair(nothing, nothing, None)) == Lesions(0, 0, 0)


def test_one_prediction_may_find_several_lesions(blobs: Callable[..., Any]) -> None:
    reference = drawing("#.#.#")
    assert count_lesions(Pair(drawing("#####"), reference, None)) == Lesions(3, 0, 0)
    mask, _, spacing = blobs(2, 3)
    same = count_lesions(Pair(mask, mask, spacing))
    assert (same.missed, same.false) == (0, 0)
    assert same.found > 0
