"""Shifts against values worked out by hand, and against themselves: reproducible, in place, of the same type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from skimage import io

from concilium.data.shifts import Shift, check_dimensions, shift_case, shift_image
from concilium.errors import StudyError

KEY = (7, "south", "case")


def image(array: np.ndarray, spacing: tuple[float, ...] | None = None) -> sitk.Image:
    made = sitk.GetImageFromArray(array, isVector=array.ndim == 3 and array.shape[-1] == 3)
    if spacing:
        made.SetSpacing(spacing)
    return made


def shifted(array: np.ndarray, shift: Shift, spacing: tuple[float, ...] | None = None, **more: object) -> np.ndarray:
    return sitk.GetArrayFromImage(shift_image(image(array, spacing), shift, **({"key": KEY} | more)))


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, (6, 10, 8)).astype(np.float32)


def test_without_a_shift_nothing_changes(volume: np.ndarray) -> None:
    np.testing.assert_array_equal(shifted(volume, Shift()), volume)


def test_gamma_bends_the_range_between_the_ends() -> None:
    array = np.array([[[-100.0, 0.0, 100.0, 300.0]]], np.float32)  # 0, 1/4, 1/2, 1 of the range
    np.testing.assert_allclose(shifted(array, Shift(gamma=2.0)), [[[-100, -75, 0, 300]]], rtol=1e-6)


def test_eight_bits_are_bent_between_0_and_255_and_rounded() -> None:
    array = np.array([[0, 51, 102, 200]], np.uint8)
    bent = shifted(array, Shift(gamma=2.0))
    assert bent.dtype == np.uint8
    np.testing.assert_array_equal(bent, [[0, 10, 41, 157]])  # 51²/255 = 10.2, 102²/255 = 40.8, 200²/255 = 156.9


def test_noise_is_a_share_of_the_images_deviation(volume: np.ndarray) -> None:
    volume = np.tile(volume, (4, 4, 4))
    added = shifted(volume, Shift(noise=0.5)) - volume
    assert added.std() / volume.std() == pytest.approx(0.5, rel=0.02)
    assert abs(added.mean()) < 0.2


def test_whole_numbers_stay_within_their_type() -> None:
    array = np.random.default_rng(0).choice([0, 255], (40, 40, 3)).astype(np.uint8)
    noisy = shifted(array, Shift(noise=1.0))
    assert noisy.dtype == np.uint8
    assert noisy.shape == array.shape
    assert (noisy[array == 255] > 0).mean() > 0.9  # clipped, not wrapped around
    assert (noisy[array == 0] == 0).mean() == pytest.approx(0.5, abs=0.05)


def test_blur_is_in_millimetres() -> None:
    """A point becomes a Gaussian whose variance is sigma² along every axis, whatever the spacing."""
    array = np.zeros((41, 41, 41), np.float32)
    array[20, 20, 20] = 1000
    blurred = shifted(array, Shift(blur=3.0), (1.0, 1.0, 2.0))
    assert blurred.sum() == pytest.approx(1000, rel=1e-4)
    for axis, spacing in enumerate((2.0, 1.0, 1.0)):
        line = blurred.sum(axis=tuple(i for i in range(3) if i != axis))
        variance = (line * ((np.arange(41) - 20) * spacing) ** 2).sum() / line.sum()
        assert variance == pytest.approx(9.0, rel=0.02)


def test_colours_are_not_blurred_into_each_other() -> None:
    array = np.zeros((20, 20, 3), np.uint8)
    array[..., 0] = 200
    np.testing.assert_array_equal(shifted(array, Shift(blur=2.0)), array)


def test_bias_is_smooth_and_no_larger_than_asked() -> None:
    array = np.full((8, 30, 30), 100, np.float32)
    array[0, 0, 0] = 0  # brightness is counted from the darkest voxel
    field = shifted(array, Shift(bias=0.4)) / 100 - 1
    field[0, 0, 0] = field[0, 0, 1]
    assert 0.3 < np.abs(field).max() <= 0.4 + 1e-6
    assert np.abs(np.diff(field, axis=1)).max() < 0.08


def test_spacing_keeps_the_field_of_view_and_the_place_of_things() -> None:
    """Along x intensity is 10 times the position [mm]: a linear function is resampled exactly, but at the edge."""
    x = 1.5 + 0.5 * np.arange(40)
    made = image(np.broadcast_to((10 * x).astype(np.float32), (6, 10, 40)), (0.5, 1.0, 2.0))
    made.SetOrigin((1.5, 0.0, 0.0))
    coarse = shift_image(made, Shift(spacing=(2.0, 1.0, 2.0)), key=KEY)
    assert coarse.GetSize() == (10, 10, 6)
    assert coarse.GetSpacing() == (2.0, 1.0, 2.0)
    assert coarse.GetOrigin() == (2.25, 0.0, 0.0)  # the outer edge stays at 1.25 mm
    np.testing.assert_allclose(sitk.GetArrayFromImage(coarse)[2, 3], 10 * (2.25 + 2.0 * np.arange(10)), rtol=1e-6)
    fine = shift_image(made, Shift(spacing=(0.25, 1.0, 2.0)), key=KEY)
    assert fine.GetSize() == (80, 10, 6)
    assert sitk.GetArrayFromImage(fine).min() == 15.0  # beyond the first voxel's middle nothing is made up


def test_another_seed_site_case_or_channel_gives_other_noise_and_the_same_gives_the_same(volume: np.ndarray) -> None:
    shift = Shift(noise=0.1, bias=0.1)
    first = shifted(volume, shift)
    np.testing.assert_array_equal(first, shifted(volume, shift))
    keys = [(8, "south", "case"), (7, "north", "case"), (7, "south", "other")]
    others = [shifted(volume, shift, key=key) for key in keys]
    others.append(shifted(volume, shift, channel=1))
    assert all(not np.array_equal(first, other) for other in others)


def test_noise_is_known_to_the_bit() -> None:
    """The numbers are part of the contract: a study repeated next year is the same study."""
    drawn = shifted(np.array([[0.0, 2.0]]), Shift(noise=1.0)) - [[0.0, 2.0]]
    np.testing.assert_allclose(drawn, [[0.21563739255535588, -0.6370832597732587]], rtol=0, atol=1e-15)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_pictures_are_written_as_nnunet_reads_them(ending: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    colours = rng.integers(0, 255, (24, 33, 3), dtype=np.uint8)
    label = (colours[..., 0] > 120).astype(np.uint8)
    io.imsave(tmp_path / f"i{ending}", colours, check_contrast=False)
    io.imsave(tmp_path / f"l{ending}", label, check_contrast=False)
    pairs = [(tmp_path / f"{name}{ending}", tmp_path / f"{name}_out{ending}") for name in ("i", "l")]
    shift_case(pairs[:1], pairs[1], Shift(gamma=2.0), key=KEY)
    np.testing.assert_array_equal(io.imread(pairs[0][1]), np.rint(colours.astype(float) ** 2 / 255))
    assert not pairs[1][1].exists()  # it is linked
    shift_case(pairs[:1], pairs[1], Shift(spacing=(3.0, 2.0)), key=KEY)
    assert io.imread(pairs[0][1]).shape == (12, 11, 3)
    assert set(np.unique(io.imread(pairs[1][1]))) <= {0, 1}
    np.testing.assert_array_equal(io.imread(pairs[1][1])[:, 0], label[1::2, 1])  # the middle of three, the later of two


def test_a_label_map_lies_on_its_image_whatever_its_own_header_says(tmp_path: Path) -> None:
    made = image(np.random.default_rng(0).normal(size=(12, 14, 16)).astype(np.float32), (1.0, 1.0, 1.0))
    label = image(np.ones((12, 14, 16), np.uint8), (1.0, 1.0, 1.1))
    pairs = [(tmp_path / f"{n}.nii.gz", tmp_path / f"{n}_out.nii.gz") for n in "il"]
    sitk.WriteImage(made, str(pairs[0][0]))
    sitk.WriteImage(label, str(pairs[1][0]))
    shift_case(pairs[:1], pairs[1], Shift(spacing=(2.0, 2.0, 3.0)), key=KEY)
    read = [sitk.ReadImage(str(to)) for _, to in pairs]
    assert read[0].GetSize() == read[1].GetSize() == (8, 7, 4)
    assert read[0].GetSpacing() == read[1].GetSpacing()
    assert sitk.GetArrayFromImage(read[1]).all()


def test_spacing_must_have_a_number_for_each_axis(tmp_path: Path) -> None:
    path = tmp_path / "i.nii.gz"
    sitk.WriteImage(image(np.zeros((4, 4, 4), np.float32)), str(path))
    check_dimensions(Shift(spacing=(1, 1, 1)), path, "[sites.a.shift]")
    with pytest.raises(
        StudyError, match=r"^\[sites.a.shift\] spacing = \[1, 1\] has 2 numbers. The images have 3 axes."
    ):
        check_dimensions(Shift(spacing=(1, 1)), path, "[sites.a.shift]")
    sitk.WriteImage(sitk.JoinSeries([image(np.zeros((4, 4, 4), np.float32))] * 2), str(path))
    with pytest.raises(StudyError, match=r"is for images of 2 or 3 axes\. i\.nii\.gz has 4\."):
        check_dimensions(Shift(gamma=2), path, "[sites.a.shift]")
