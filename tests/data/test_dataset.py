"""nnU-Net raw folders, good and bad, and nnU-Net's readers and split as oracles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io
from sklearn.model_selection import KFold

from concilium.data._description import READERS
from concilium.data.dataset import content_key, folds, open_dataset, read_case, reader
from concilium.data.images import images_as, list_images
from concilium.errors import DataError, StudyError

Write = Callable[..., Path]
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
SHAPE = (4, 5, 6)


def case(value: float = 1.0, channels: int = 1, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Voxel values tell their place; channels are 1000 apart."""
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + np.float32(value)
    image = image + 1000 * np.arange(channels, dtype=np.float32).reshape(-1, 1, 1, 1)
    label = np.zeros(shape, np.uint8)
    label[1:3] = 1
    return image, label


def rewrite(folder: Path, **changes: Any) -> None:
    """Change `dataset.json`; None removes a key."""
    path = folder / "dataset.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def save(array: np.ndarray, path: Path, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> None:
    image = sitk.GetImageFromArray(array, isVector=False)
    image.SetSpacing((*spacing[::-1], 1.0)[: array.ndim])
    sitk.WriteImage(image, str(path))


@pytest.fixture
def site(tmp_path: Path, write_site: Write) -> Path:
    """Cases b and a of two channels; spacing 3 x 0.7 x 0.5 mm (z, y, x)."""
    cases = {"b": case(2.0, 2), "a": case(1.0, 2)}
    return write_site(tmp_path / "site", cases, spacing=(3.0, 0.7, 0.5), channels=("T1", "T2"))


@pytest.fixture
def own_pictures(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the colour pictures, to be changed."""
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


# --------------------------------------------------------------------------------------------------------------- opening


def test_cases_channels_and_labels_are_found_in_order(site: Path) -> None:
    rewrite(site, channel_names={"1": "T2", "0": "T1"}, labels={"tumour": 1, "background": 0}, numTraining=999)
    (site / "imagesTr" / "._a_0000.nii.gz").write_bytes(b"")  # macOS leaves these behind
    dataset = open_dataset(site)
    assert [c.name for c in dataset.cases] == ["a", "b"]
    assert [p.name for p in dataset.cases[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert dataset.cases[0].label == site / "labelsTr" / "a.nii.gz"
    assert dataset.channels == ("T1", "T2")
    assert list(dataset.labels.items()) == [("background", 0), ("tumour", 1)]
    assert dataset.missing == ()


def test_a_case_is_its_own_patient_unless_the_table_says_otherwise(site: Path) -> None:
    assert [c.patient for c in open_dataset(site).cases] == ["a", "b"]
    assert not open_dataset(site).patients_known
    rewrite(site, patient={"a": 17, "elsewhere": "p"})
    assert [c.patient for c in open_dataset(site).cases] == ["17", "b"]
    assert not open_dataset(site).patients_known
    rewrite(site, patient={"a": 17, "b": "b"})
    assert open_dataset(site).patients_known


def test_cases_that_lack_a_file_are_set_aside(tmp_path: Path, write_site: Write) -> None:
    cases = {name: case(1.0, 2) for name in ("whole", "no_label", "no_channel", "no_image")}
    site = write_site(tmp_path / "site", cases, channels=("T1", "T2"))
    for path in ("labelsTr/no_label", "imagesTr/no_channel_0001", "imagesTr/no_image_0000", "imagesTr/no_image_0001"):
        (site / f"{path}.nii.gz").unlink()
    dataset = open_dataset(site)
    assert [c.name for c in dataset.cases] == ["whole"]
    assert dataset.missing == (
        ("no_channel", "missing_channel"),
        ("no_image", "missing_channel"),
        ("no_label", "missing_label"),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channel_names": None}, "modality"),
        ({"channel_names": {}}, "channel_names"),
        ({"channel_names": ["T1", "T2"]}, "channel_names"),
        ({"channel_names": {"T1": "0", "T2": "1"}}, "Number the channels"),
        ({"channel_names": {"0": "T1", "2": "T2"}}, "without a gap"),
        ({"labels": None}, "labels"),
        ({"labels": {"background": 0}}, "labels"),
        ({"labels": {"0": "background", "1": "tumour"}}, "Number the labels"),
        ({"labels": {"background": 0, "tumour": 2}}, "Number the labels"),
        ({"labels": {"background": 0, "tumour": True}}, "Number the labels"),
        ({"labels": {"healthy": 0, "tumour": 1}}, "background"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "Number the labels"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "one id for each of whole, core: add it"),
        ({"labels": REGIONS, "regions_class_order": [1]}, "one id for each of whole, core: add it"),
        ({"labels": REGIONS, "regions_class_order": [3, 2]}, "3 is no id of whole"),
        (
            {"labels": {"background": 0, "core": 2, "whole": [1, 2]}, "regions_class_order": [2, 1]},
            "Name whole before core",
        ),
        ({"labels": {"background": 0, "whole": [1, 3], "core": 3}, "regions_class_order": [1, 3]}, "Number the labels"),
        ({"labels": {"background": 0, "whole": [0, 1], "core": 1}, "regions_class_order": [1, 1]}, "Take 0 out"),
        (
            {"labels": {"background": 0, "whole": [1, "2"], "core": 1}, "regions_class_order": [1, 1]},
            "Number the labels",
        ),
        (
            {"labels": {"background": 0, "whole": [], "core": 1}, "regions_class_order": [1, 1]},
            "Correct regions_class_order",
        ),
        ({"labels": {"background": [0], "ignore": 1}}, "beside background and ignore"),
        ({"labels": {"background": 0, "ignore": 1, "tumour": 2}}, "Give ignore one id, above all others"),
        (
            {"labels": {"background": 0, "tumour": 1, "ignore": [2, 3]}, "regions_class_order": [1]},
            "Give ignore one id",
        ),
        ({"overwrite_image_reader_writer": "NibabelIOWithReorient"}, "images are read as they lie"),
        ({"file_ending": ".jpg"}, r"\.nii\.gz"),
        ({"file_ending": None}, "file_ending"),
        ({"file_ending": ".nrrd"}, "no complete case"),
        ({"patient": ["a"]}, "patient"),
        ({"channel_names": {"0": "T1"}}, "no channel of a case"),
        ({"channel_names": {"0": "T1", "1": "T2", "2": "CT"}}, "no complete case"),
    ],
)
def test_what_is_wrong_with_dataset_json_is_said(site: Path, changes: dict[str, Any], words: str) -> None:
    rewrite(site, **changes)
    with pytest.raises(DataError, match=words):
        open_dataset(site)


@pytest.mark.parametrize(("text", "words"), [("{", "JSON"), ("[1]", "list"), ("[" * 10**6, "JSON"), ("\udcff", "JSON")])
def test_a_broken_dataset_json_is_said(site: Path, text: str, words: str) -> None:
    (site / "dataset.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=words):
        open_dataset(site)


def test_folders_and_names_that_are_wrong_are_said(site: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset\.json"):
        open_dataset(tmp_path / "nowhere")
    (site / "labelsTr").rename(site / "labels")
    with pytest.raises(DataError, match="no folder labelsTr"):
        open_dataset(site)
    (site / "labels").rename(site / "labelsTr")
    (site / "imagesTr" / "a_0000.nii.gz").rename(site / "imagesTr" / "a.nii.gz")
    with pytest.raises(DataError, match="Rename the file"):
        open_dataset(site)


def test_images_alone_are_listed_for_prediction(site: Path) -> None:
    found = list_images(site / "imagesTr", ("T1", "T2"), ".nii.gz")
    assert [(c.name, len(c.images), c.label, c.patient) for c in found] == [("a", 2, None, "a"), ("b", 2, None, "b")]
    (site / "imagesTr" / "b_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 of 2 cases .* \(b\)"):
        list_images(site / "imagesTr", ("T1", "T2"), ".nii.gz")
    with pytest.raises(DataError, match="has no image"):
        list_images(site / "imagesTr", ("T1", "T2"), ".nrrd")
    with pytest.raises(DataError, match="is no folder"):
        list_images(site / "nowhere", ("T1",), ".nii.gz")


@pytest.mark.parametrize("place", ["in the folder", "above it"])
def test_images_to_segment_are_matched_by_name_where_their_order_is_told(
    place: str, site: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "imagesTs"
    shutil.copytree(site / "imagesTr", folder)
    labels = {"background": 0, "tumour": 1}
    as_stored, *_ = read_case((there := images_as(folder, ("T2", "T1"), labels, ".nii.gz")).cases[0], there)
    described = folder if place == "in the folder" else folder.parent
    (described / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}}))
    by_name, *_ = read_case((there := images_as(folder, ("T2", "T1"), labels, ".nii.gz")).cases[0], there)
    assert not np.array_equal(as_stored[0], as_stored[1])
    assert np.array_equal(by_name, as_stored[::-1])
    with pytest.raises(DataError, match=r"has channels T1, T2. The model needs T1, CT") as error:
        images_as(folder, ("T1", "CT"), labels, ".nii.gz")
    assert error.value.code == "channel_mismatch"


# --------------------------------------------------------------------------------------------------------------- reading


def test_readers_are_those_of_nnunet() -> None:
    assert all(reader(ending) is SimpleITKIO for ending in (".nii", *SimpleITKIO.supported_file_endings))
    assert all(reader(ending) is NaturalImage2DIO for ending in (".png", ".bmp"))
    assert reader(".tiff") is Tiff3DIO
    known = {ending for kind in LIST_OF_IO_CLASSES for ending in kind.supported_file_endings}
    assert known == set(READERS)
    with pytest.raises(DataError, match=r"\.jpg.*\.png"):
        reader(".jpg")


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl"])
def test_arrays_and_spacing_are_read_in_the_same_order(site: Path, ending: str) -> None:
    """The value at a voxel tells its place: 0, 1, 2, ... along the last axis first, above the offsets of channel and case."""
    for path in site.glob("*/*.nii.gz"):
        if ending != ".nii.gz":
            sitk.WriteImage(sitk.ReadImage(str(path)), str(path).replace(".nii.gz", ending))
    rewrite(site, file_ending=ending)
    dataset = open_dataset(site)
    image, label, about = read_case(dataset.cases[1], dataset)
    assert label is not None
    assert (image.dtype, image.shape, label.shape) == (np.float32, (2, *SHAPE), (1, *SHAPE))
    assert image[1, 1, 2, 3] == 1000 + 2 + 1 * 30 + 2 * 6 + 3
    assert about["spacing"] == pytest.approx([3.0, 0.7, 0.5], rel=1e-6)
    assert set(np.unique(label)) == {0, 1}
    assert label[0, 1].all()


def test_a_case_without_label_has_none(site: Path) -> None:
    dataset = open_dataset(site)
    _, label, _ = read_case(list_images(site / "imagesTr", ("T1", "T2"), ".nii.gz")[0], dataset)
    assert label is None


def test_one_colour_file_holds_three_channels(pictures: Path) -> None:
    dataset = open_dataset(pictures)
    assert [len(c.images) for c in dataset.cases] == [1, 1]
    image, label, about = read_case(dataset.cases[0], dataset)
    assert label is not None
    assert (image.shape, label.shape, tuple(about["spacing"])) == ((3, 1, 50, 44), (1, 1, 50, 44), (999, 1, 1))
    assert (image[:, 0] == np.moveaxis(io.imread(dataset.cases[0].images[0]), -1, 0)).all()


def test_grey_pictures_stay_one_file_per_channel(own_pictures: Path) -> None:
    """A third of the files being there does not make them colour own_pictures."""
    grey = np.zeros((50, 44), np.uint8)
    for name in ("p0_0000", "p0_0001", "p0_0002", "p1_0000"):
        io.imsave(own_pictures / "imagesTr" / f"{name}.png", grey, check_contrast=False)
    dataset = open_dataset(own_pictures)
    assert [(c.name, len(c.images)) for c in dataset.cases] == [("p0", 3)]
    assert dataset.missing == (("p1", "missing_channel"),)


def damage(site: Path, how: str) -> None:
    """Make case a of the fixture `site` unusable."""
    (first, second), label = case(1.0, 2)
    files = [site / path for path in ("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")]
    spacing = (3.0, 0.7, 0.5)
    arrays: dict[str, tuple[int, np.ndarray, tuple[float, float, float]]] = {
        "channel of another shape": (1, second[:3], spacing),
        "channel of another spacing": (1, second, (3.0, 0.7, 0.6)),
        "label map of another shape": (2, label[:, 1:], spacing),
        "unknown label": (2, label * 7, spacing),
        "negative label": (2, -label.astype(np.int16), spacing),
        "half a label": (2, label * np.float32(0.5), spacing),
    }
    if how in arrays:
        i, array, spacing = arrays[how]
        save(array, files[i], spacing)
    elif how == "two channels in each file":
        for path in files[:2]:
            save(np.stack([first, second]), path)
    elif how == "a folder":
        files[0].unlink()
        files[0].mkdir()
    else:
        files[0 if how == "empty file" else 2].write_bytes(b"" if how == "empty file" else b"not an image")


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("empty file", "unreadable", "cannot be read"),
        ("text", "unreadable", "cannot be read"),
        ("a folder", "unreadable", "cannot be read"),
        ("channel of another shape", "shape_mismatch", r"\(3, 5, 6\)"),
        ("channel of another spacing", "geometry_mismatch", "spacings"),
        ("two channels in each file", "channel_mismatch", "4 channels"),
        ("label map of another shape", "geometry_mismatch", r"\(4, 4, 6\)"),
        ("unknown label", "unknown_label", "holds 7.*tumour = 1"),
        ("negative label", "unknown_label", "holds -1"),
        ("half a label", "unknown_label", r"holds 0\.5"),
    ],
)
def test_a_case_that_cannot_be_used_says_why(
    site: Path, how: str, code: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(site, how)
    dataset = open_dataset(site)
    with pytest.raises(DataError, match=words) as caught:
        read_case(dataset.cases[0], dataset)
    assert caught.value.code == code
    assert "Case a" in str(caught.value) or "case a" in str(caught.value)
    assert capfd.readouterr().out == ""
    read_case(dataset.cases[1], dataset)


@pytest.mark.parametrize(("which", "bad"), [(0, np.inf), (1, np.nan), (2, np.nan)], ids=["image", "image", "label map"])
def test_voxels_that_are_no_numbers_are_said(site: Path, which: int, bad: float) -> None:
    """In NRRD; the NIfTI library underneath replaces them by 0 before anyone sees them."""
    for path in site.glob("*/*.nii.gz"):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path).replace(".nii.gz", ".nrrd"))
    path = site / ("imagesTr/a_0000.nrrd", "imagesTr/a_0001.nrrd", "labelsTr/a.nrrd")[which]
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)
    array[2, 3, 4] = bad
    save(array, path, (3.0, 0.7, 0.5))
    rewrite(site, file_ending=".nrrd")
    dataset = open_dataset(site)
    with pytest.raises(DataError, match="finite") as caught:
        read_case(dataset.cases[0], dataset)
    assert caught.value.code == "not_finite"
    read_case(dataset.cases[1], dataset)


def test_a_file_that_went_away_is_said(site: Path) -> None:
    dataset = open_dataset(site)
    (site / "labelsTr/a.nii.gz").unlink()
    for use in (read_case, content_key):
        with pytest.raises(DataError, match="cannot be read") as caught:
            use(dataset.cases[0], dataset)
        assert caught.value.code == "unreadable"


def test_a_coloured_label_map_is_said(pictures: Path, tmp_path: Path) -> None:
    dataset = open_dataset(pictures)
    coloured = tmp_path / "p.png"
    io.imsave(coloured, np.zeros((50, 44, 3), np.uint8), check_contrast=False)
    broken = type(dataset.cases[0])("p", dataset.cases[0].images, coloured, "p")
    with pytest.raises(DataError, match="ids, not as colours") as caught:
        read_case(broken, dataset)
    assert caught.value.code == "channel_mismatch"


def test_a_picture_with_transparency_is_said(own_pictures: Path) -> None:
    io.imsave(own_pictures / "imagesTr/p1_0000.png", np.zeros((54, 44, 4), np.uint8), check_contrast=False)
    dataset = open_dataset(own_pictures)
    with pytest.raises(DataError, match="4 channels") as caught:
        read_case(dataset.cases[1], dataset)
    assert caught.value.code == "channel_mismatch"


@pytest.mark.skipif("CONCILIUM_DATA" not in os.environ, reason="needs real data: set CONCILIUM_DATA")
def test_every_real_case_can_be_read() -> None:
    for folder in sorted(p.parent for p in Path(os.environ["CONCILIUM_DATA"]).glob("*/*/dataset.json")):
        dataset = open_dataset(folder, labelled=(folder / "labelsTr").is_dir())  # one sequence of several has none
        stated = json.loads((folder / "dataset.json").read_text())["numTraining"]
        assert (len(dataset.cases), dataset.missing) == (stated, ()), folder
        for found in (dataset.cases[0], dataset.cases[-1]):
            read_case(found, dataset)


# ----------------------------------------------------------------------------------------------------------------- folds


@pytest.mark.parametrize("n", [5, 7, 23])
def test_folds_are_nnunets_and_cover_every_patient_once(n: int) -> None:
    patients = [f"p{i:02d}" for i in range(n)]
    found = [folds([*patients[::-1], *patients], 5, fold) for fold in range(5)]  # several cases of each, in any order
    oracle = KFold(5, shuffle=True, random_state=12345)
    assert found == [{patients[i] for i in held_out} for _, held_out in oracle.split(patients)]
    assert sum(len(f) for f in found) == len(set().union(*found)) == n
    assert all(type(p) is str for f in found for p in f)


def test_few_patients_give_fewer_folds() -> None:
    found = [folds(["x", "y", "z"], 5, fold) for fold in range(5)]
    assert sorted(map(sorted, found[:3])) == [["x"], ["y"], ["z"]]
    assert found[3:] == found[:2]
    assert folds(["x", "x"], 5, 3) == folds([], 5, 0) == set()


@pytest.mark.parametrize(("n_folds", "fold"), [(1, 0), (0, 0), (5, 5), (5, -1)])
def test_folds_that_do_not_exist_are_refused(n_folds: int, fold: int) -> None:
    with pytest.raises(StudyError, match=r"\[validation\]"):
        folds(["a", "b"], n_folds, fold)


# -------------------------------------------------------------------------------------------------------------- contents


def test_the_key_follows_the_content_and_not_the_name(site: Path, tmp_path: Path, write_site: Write) -> None:
    dataset = open_dataset(site)
    first, second = (content_key(c, dataset) for c in dataset.cases)
    assert first != second
    assert len(first) == 64
    moved = tmp_path / "moved"
    site.rename(moved)
    for path in moved.glob("*/a*"):
        path.rename(path.with_name(path.name.replace("a", "renamed", 1)))
    again = open_dataset(moved)
    assert content_key(again.cases[-1], again) == first
    unlabelled = list_images(moved / "imagesTr", again.channels, ".nii.gz")[-1]
    keys = {first, second, content_key(unlabelled, again)}
    swapped = type(unlabelled)("x", unlabelled.images[::-1], again.cases[-1].label, "x")
    one, other = unlabelled.images
    keys |= {content_key(c, again) for c in (swapped, type(unlabelled)("x", (one,), other, "x"))}
    with again.cases[-1].images[0].open("ab") as file:
        file.write(b"\0")
    keys.add(content_key(again.cases[-1], again))
    for change in ({"labels": {"background": 0, "lesion": 1}}, {"channel_names": {"0": "T1", "1": "CT"}}):
        rewrite(moved, **change)
        changed = open_dataset(moved)
        keys.add(content_key(changed.cases[-1], changed))
    assert len(keys) == 8
