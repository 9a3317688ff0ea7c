"""Every kind of file that nnU-Net reads, as it reads it; and what readers make up for files that do not tell their spacing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io

from concilium.answers.evaluate import score_labels
from concilium.data.dataset import Dataset, content_key, open_dataset, pixel_size, read_case, reader
from concilium.data.fingerprint import fingerprint_of_case, merge
from concilium.data.plan import make_plans
from concilium.errors import DataError
from concilium.messages import PlugIn

VOLUME = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
LABEL = (VOLUME > 60).astype(np.uint8)


def tiffs(folder: Path, ending: str, *, spacing: list[float] | None, depth: int = 4) -> Dataset:
    """A case of two channels in 3D TIFF."""
    volume, label = (np.repeat(a, 2, 0)[:depth] for a in (VOLUME, LABEL))
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for channel in range(2):
        tifffile.imwrite(folder / "imagesTr" / f"a_000{channel}{ending}", volume + channel)
    tifffile.imwrite(folder / "labelsTr" / f"a{ending}", label)
    if spacing is not None:
        (folder / "imagesTr" / "a.json").write_text(json.dumps({"spacing": spacing}))
    about = {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "t": 1}, "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(about))
    return open_dataset(folder)


@pytest.mark.parametrize("ending", [".tif", ".tiff"])
def test_tiff_volumes_are_read_and_written_as_nnunet_does(ending: str, tmp_path: Path) -> None:
    dataset = tiffs(tmp_path / "site", ending, spacing=[3.0, 0.5, 0.7])
    case = dataset.cases[0]
    image, label, properties = read_case(case, dataset)
    expected, about = Tiff3DIO().read_images([str(p) for p in case.images])
    assert np.array_equal(image, expected)
    assert label is not None
    assert np.array_equal(label[0], np.repeat(LABEL, 2, 0)[:4])
    assert list(properties["spacing"]) == list(about["spacing"]) == [3.0, 0.5, 0.7]
    assert pixel_size(case, dataset, properties) == (3.0, 0.5, 0.7)
    reader(ending)().write_seg(LABEL, str(tmp_path / f"out{ending}"), properties)
    assert np.array_equal(tifffile.imread(tmp_path / f"out{ending}"), LABEL)
    assert json.loads((tmp_path / "out.json").read_text()) == {"spacing": [3.0, 0.5, 0.7]}


def test_the_spacing_beside_a_tiff_decides_and_its_lack_is_told_as_pixels(tmp_path: Path) -> None:
    one, two = (tiffs(tmp_path / str(i), ".tif", spacing=[s, 1, 1]) for i, s in enumerate((1.0, 2.0)))
    assert content_key(one.cases[0], one) != content_key(two.cases[0], two)
    none = tiffs(tmp_path / "none", ".tif", spacing=None, depth=6)
    stock = determine_reader_writer_from_file_ending(".tif", str(none.cases[0].images[0]), verbose=False)
    assert stock is Tiff3DIO
    image, label, properties = read_case(none.cases[0], none)
    assert tuple(properties["spacing"]) == (1, 1, 1)
    assert pixel_size(none.cases[0], none, properties) is None
    bad = tiffs(tmp_path / "bad", ".tif", spacing=[0, 1, 1])
    with pytest.raises(DataError, match="spacing"):
        read_case(bad.cases[0], bad)
    assert label is not None
    fingerprint = merge([fingerprint_of_case(image, label, properties["spacing"], exact_geometry=False)] * 20)
    about: dict[str, Any] = {"channels": none.channels, "labels": none.labels, "configuration": "2d"}
    plans = json.loads(make_plans(fingerprint, file_ending=".tif", **about))
    assert plans["image_reader_writer"] == "Tiff3DIO"


def test_tiff_pictures_stay_pictures(tmp_path: Path) -> None:
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    colour = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    io.imsave(tmp_path / "imagesTr" / "a_0000.tif", colour, check_contrast=False)
    io.imsave(tmp_path / "labelsTr" / "a.tif", colour[..., 0] // 128, check_contrast=False)
    about = {
        "channel_names": {"0": "r", "1": "g", "2": "b"},
        "labels": {"background": 0, "t": 1},
        "file_ending": ".tif",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    dataset = open_dataset(tmp_path)
    image, label, properties = read_case(dataset.cases[0], dataset)
    assert np.array_equal(image[:, 0], np.moveaxis(colour, -1, 0))
    assert label is not None
    assert pixel_size(dataset.cases[0], dataset, properties) is None
    reader(".tif")().write_seg(label[0], str(tmp_path / "out.tif"), properties)
    assert np.array_equal(io.imread(tmp_path / "out.tif"), colour[..., 0] // 128)
    assert not (tmp_path / "out.json").exists()


def nifti(
    folder: Path, write_site: Callable[..., Path], array: np.ndarray, spacing: tuple[float, ...], **about: Any
) -> Dataset:
    site = write_site(folder, {}, **about)
    for path, values in (
        ("imagesTr/a_0000.nii.gz", array.astype(np.float32)),
        ("labelsTr/a.nii.gz", (array > 5).astype(np.uint8)),
    ):
        image = sitk.GetImageFromArray(values)
        image.SetSpacing(spacing)
        sitk.WriteImage(image, str(site / path))
    return open_dataset(site)


def test_uncompressed_nifti_is_the_same_as_by_nnunets_other_reader(
    write_site: Callable[..., Path], tmp_path: Path
) -> None:
    site = write_site(tmp_path / "site", {"a": (VOLUME[None].astype(np.float32), LABEL)}, spacing=(3.0, 0.5, 0.7))
    source = site / "imagesTr" / "a_0000.nii.gz"
    for ending in (".nii", ".nii.gz"):
        path = tmp_path / f"x{ending}"
        sitk.WriteImage(sitk.ReadImage(str(source)), str(path))
        ours, a = reader(ending)().read_images([str(path)])
        theirs, b = NibabelIO().read_images([str(path)])
        assert np.array_equal(ours, theirs)
        assert a["spacing"] == pytest.approx(b["spacing"])


def test_a_flat_nifti_is_measured_in_its_plane(write_site: Callable[..., Path], tmp_path: Path) -> None:
    """nnU-Net's reader gives it a thickness of 999 pixels, from which volumes came out as litres."""
    plane = np.zeros((20, 30))
    plane[5:15, 5:15] = 9
    dataset = nifti(tmp_path / "site", write_site, plane, (0.5, 2.0))
    case = dataset.cases[0]
    image, label, properties = read_case(case, dataset)
    assert (image.shape, tuple(properties["spacing"])) == ((1, 1, 20, 30), pytest.approx((1998.0, 2.0, 0.5)))
    size = pixel_size(case, dataset, properties)
    assert size == (1.0, 2.0, 0.5)
    assert label is not None
    moved = np.roll(label[0], 1, axis=2)
    (score,) = score_labels(moved, label[0], size, dataset.labels, [PlugIn("hd95")], case=0, patient=0)
    assert (score.unit, score.values["hd95"]) == ("mm", 0.5)
    assert score.reference_volume == pytest.approx(100 * 1.0 / 1000)  # 100 pixels of 1 mm^2, 1 mm thick
    reader(".nii.gz")().write_seg(label[0], str(tmp_path / "out.nii.gz"), properties)
    assert sitk.ReadImage(str(tmp_path / "out.nii.gz")).GetSize() == (30, 20)


@pytest.mark.parametrize(("shape", "spacing"), [((40, 36, 1), (2.5, 1.5, 0.5)), ((1, 40, 36), (1.0, 1.5, 1.5))])
def test_images_that_are_flat_along_another_axis_than_nnunet_takes_are_refused(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    image = np.random.default_rng(0).normal(100, 9, (1, *shape)).astype(np.float32)
    label = (image > 100).astype(np.float32)
    about: dict[str, Any] = {"channels": ("MRI",), "labels": {"background": 0, "t": 1}, "file_ending": ".nii.gz"}
    made = merge([fingerprint_of_case(image, label, spacing, exact_geometry=True)] * 20)
    with pytest.raises(DataError, match="single voxel thick"):
        make_plans(made, configuration="2d", **about)
