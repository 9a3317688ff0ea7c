"""Pictures of cases: the slice, the place and the colours, on arrays made by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concilium.answers import pictures
from concilium.messages import Evaluate, Score


def drawn(*arguments: Any) -> np.ndarray:
    """The picture as (rows, columns, 3)."""
    return np.asarray(Image.open(io.BytesIO(pictures.draw(*arguments))).convert("RGB"))


def where(picture: np.ndarray, colour: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of this colour."""
    return np.nonzero((picture == colour).all(axis=-1))


def case(shape: tuple[int, ...] = (6, 40, 40)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grey ramp without foreground."""
    image = np.linspace(0, 0.6, int(np.prod(shape))).reshape(1, *shape)
    return image, np.zeros(shape, int), np.zeros(shape, int)


def test_the_slice_with_the_most_wrong_voxels_is_shown() -> None:
    """Slice 1 holds 16 wrong voxels, slice 4 holds 36, of a reference alone."""
    image, reference, prediction = case()
    prediction[1, 18:22, 18:22] = 1
    reference[4, 17:23, 17:23] = 1
    picture = drawn(image, reference, prediction, (3.0, 1.0, 1.0), [1])
    assert len(where(picture, pictures.REFERENCE[0])[0]) > 0
    assert len(where(picture, pictures.PREDICTION[0])[0]) == 0
    picture = drawn(image, reference[::-1], prediction[::-1], (3.0, 1.0, 1.0), [1])
    assert len(where(picture, pictures.REFERENCE[0])[0]) > 0


def test_error_counts_more_than_foreground() -> None:
    """A large structure that is right in slice 1, a small one that is missed in slice 4."""
    image, reference, prediction = case()
    reference[1, 5:35, 5:35] = prediction[1, 5:35, 5:35] = 1
    reference[4, 18:22, 18:22] = 1
    picture = drawn(image, reference, prediction, (3.0, 1.0, 1.0), [1])
    assert len(where(picture, pictures.REFERENCE[0])[0]) > 0
    assert len(where(picture, pictures.BOTH)[0]) == 0


def test_the_picture_is_cut_to_what_is_outlined() -> None:
    """Rows 5 to 9 and columns 30 to 44 of 60: 24 rows (two fifths) from 0 and 30 columns (twice 15) from 22."""
    image, reference, prediction = case((1, 60, 60))
    reference[0, 5:10, 30:45] = 1
    picture = drawn(image, reference, prediction, None, [1])
    assert picture.shape[:2] == pytest.approx((256 * 24 / 30, 256), abs=1)
    rows, columns = where(picture, pictures.REFERENCE[0])
    assert (rows.min(), rows.max() + 1) == pytest.approx((5 * 256 / 30, 10 * 256 / 30), abs=1)
    assert (columns.min(), columns.max() + 1) == pytest.approx((8 * 256 / 30, 23 * 256 / 30), abs=1)


def test_without_error_the_slice_with_the_most_foreground_is_shown() -> None:
    image, reference, _ = case()
    reference[2, 10:30, 10:30] = 1
    picture = drawn(image, reference, reference.copy(), None, [1])
    assert len(where(picture, pictures.BOTH)[0]) > 0
    assert len(where(picture, pictures.REFERENCE[0])[0]) == 0
    assert len(where(picture, pictures.PREDICTION[0])[0]) == 0


def test_outlines_stand_where_the_masks_are() -> None:
    """Whole slice in view (the masks are far apart): 40 voxels on 256 pixels; columns 4 to 11 and 28 to 35."""
    image, reference, prediction = case((1, 40, 40))
    reference[0, 4:36, 4:12] = 1
    prediction[0, 4:36, 28:36] = 1
    picture = drawn(image, reference, prediction, None, [1])
    assert picture.shape == (256, 256, 3)
    for colour, first, last in ((pictures.REFERENCE[0], 4, 12), (pictures.PREDICTION[0], 28, 36)):
        rows, columns = where(picture, colour)
        assert rows.min() == pytest.approx(4 * 6.4, abs=1)
        assert columns.min() == pytest.approx(first * 6.4, abs=1)
        assert columns.max() + 1 == pytest.approx(last * 6.4, abs=1)
        inside = (columns > first * 6.4 + 3) & (columns < last * 6.4 - 4) & (rows > 4 * 6.4 + 3) & (rows < 36 * 6.4 - 4)
        assert not inside.any()


def test_slices_are_cut_across_the_thickest_axis_and_keep_their_sides() -> None:
    """Spacing 1 x 5 x 2 mm: slices across the second axis, 20 x 60 mm; superior is up, so that row 0 is drawn at the bottom."""
    image, reference, prediction = case((20, 8, 30))
    reference[0:3, 5, :] = 1
    picture = drawn(image, reference, prediction, (1.0, 5.0, 2.0), [1])
    assert picture.shape[1] == 256
    rows, _ = where(picture, pictures.REFERENCE[0])
    assert rows.max() == picture.shape[0] - 1
    # rows: two fifths of 20 voxels (8 mm) at least; columns: all 30 (60 mm)
    assert picture.shape[0] == pytest.approx(256 * 8 / 60, abs=1)


def test_labels_have_colours_of_their_own() -> None:
    image, reference, prediction = case((1, 60, 60))
    reference[0, 10:20, 10:20] = 1
    reference[0, 40:50, 10:20] = 2
    prediction[0, 10:20, 40:50] = 1
    prediction[0, 40:50, 40:50] = 2
    picture = drawn(image, reference, prediction, None, [1, 2])
    for colour in (*pictures.REFERENCE[:2], *pictures.PREDICTION[:2]):
        assert len(where(picture, colour)[0]) > 20


def test_photographs_stay_in_colour() -> None:
    """Three channels without spacing: left red, right blue."""
    image = np.zeros((3, 1, 64, 64))
    image[0, 0, :, :32] = 255
    image[2, 0, :, 32:] = 255
    none = np.zeros((1, 64, 64), int)
    picture = drawn(image, none, none, None, [1])
    assert tuple(picture[108, 20]) == pytest.approx((255, 0, 0), abs=12)
    assert tuple(picture[108, 196]) == pytest.approx((0, 0, 255), abs=12)
    grey = drawn(image, none, none, (1.0, 1.0, 1.0), [1])
    assert (grey[..., 0] == grey[..., 2]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_small_whatever_they_show(channels: int) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (channels, 1, 600, 800))
    reference = np.zeros((1, 600, 800), int)
    reference[0, 10:590, 10:790] = 1
    assert len(pictures.draw(image, reference, reference, None, [1])) <= pictures.MAX_BYTES


# ------------------------------------------------------------------------------------------------------ at the site


def saved(folder: Path, image: np.ndarray, *, draws: bool = True) -> list[dict[str, Any]]:
    entry: Any = SimpleNamespace(number=7, case=SimpleNamespace(name="c", patient="p"))
    reference = np.ones((1, 9, 9), int)
    request = Evaluate("m", "validation", ())
    score = Score(7, 3, "organ", "ok", "mm", {"dice": 0.5}, 1.0, 2.0, 1, 0, 0)
    labels = {"background": 0, "organ": 1}
    rows = pictures.save_case(
        folder, request, entry, (image, reference, reference), (1.0, 1.0, 1.0), [score], labels=labels, pictures=draws
    )
    pictures.save_scores(folder, "north", request, rows, labels)
    table: dict[str, Any] = json.loads((folder / "scores" / "m.validation.json").read_text())
    assert (table["site"], table["model"], table["subset"]) == ("north", "m", "validation")
    assert list(table["colours"]) == ["organ"]
    found: list[dict[str, Any]] = table["cases"]
    return found


def test_a_site_keeps_picture_and_table(tmp_path: Path) -> None:
    (row,) = saved(tmp_path, np.full((2, 1, 9, 9), 5.0))
    assert (row["case"], row["patient"], row["number"], row["dice"], row["label"]) == ("c", "p", 7, 0.5, "organ")
    assert row["foreground_median"] == [5.0, 5.0]
    assert row["picture"] == "pictures/m/validation/7.png"
    assert (tmp_path / row["picture"]).read_bytes().startswith(b"\x89PNG")


def test_pictures_can_be_switched_off(tmp_path: Path) -> None:
    (row,) = saved(tmp_path, np.zeros((1, 1, 9, 9)), draws=False)
    assert row["picture"] is None
    assert row["dice"] == 0.5
    assert not (tmp_path / "pictures").exists()


def test_a_picture_that_fails_leaves_the_scores(tmp_path: Path) -> None:
    (row,) = saved(tmp_path, np.zeros((0, 1, 9, 9)))
    assert row["dice"] == 0.5
    assert row["picture"] is None
    assert row["note"].startswith("No picture: ")
