"""`check` on pictures (PNG, BMP, TIFF) and on volumes in TIFF: fixtures after what users reported (threads beside each)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from check_sites import found, rewrite, site, write
from PIL import Image
from skimage import io

from concilium.data.check import Finding, check
from concilium.data.dataset import open_dataset, read_case
from concilium.errors import DataError

SHAPE = (5, 5, 6)
"""Of volumes; 3 or 4 slices without a spacing beside them are read as a picture in colour."""
Change = Callable[[Path], Any]
each_ending = pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])


# ------------------------------------------------------------------------------------------------------------ pictures


def pictures(folder: Path, ending: str, sizes: list[tuple[int, int]]) -> Path:
    """Colour pictures of so many rows and columns."""
    site(folder, n=0)
    rng = np.random.default_rng(0)
    for i, (rows, columns) in enumerate(sizes):
        save(folder / f"imagesTr/p{i}_0000{ending}", rng.integers(0, 255, (rows, columns, 3), np.uint8))
        label = np.zeros((rows, columns), np.uint8)
        label[2:5, 2:5] = 1
        save(folder / f"labelsTr/p{i}{ending}", label)
    table = {f"p{i}": f"patient {i}" for i in range(len(sizes))}
    rewrite(
        folder, channel_names={"0": "R", "1": "G", "2": "B"}, file_ending=ending, numTraining=len(sizes), patient=table
    )
    return folder


def save(path: Path, array: np.ndarray) -> None:
    io.imsave(path, array, check_contrast=False)


@each_ending
def test_a_picture_on_its_side(tmp_path: Path, ending: str) -> None:
    """FLIP #821, #820: radiographs were fed sideways and nobody noticed but for the scores."""
    folder = pictures(tmp_path / "a", ending, [(20, 30)] * 10 + [(30, 20), (22, 22)])
    findings = [f for f in check({"a": folder}).findings if f.code != "pixels"]
    assert [(f.severity, f.code, f.case) for f in findings] == [("warning", "sideways", "p10")]
    assert findings[0].text == (
        "20 x 30 pixels: upright, where 10 of 11 long pictures lie. With sides swapped it has the size of 10 others."
    )
    mixed = pictures(tmp_path / "b", ending, [(20, 30)] * 5 + [(30, 20)] * 5)
    (note,) = check({"a": mixed}).findings
    assert note.text == f"{ending} files have no spacing: distances and areas are counted in pixels."


@each_ending
def test_label_pictures_that_are_wrong(tmp_path: Path, ending: str) -> None:
    folder = pictures(tmp_path / "a", ending, [(20, 30)] * 6)
    label = io.imread(folder / f"labelsTr/p0{ending}")
    save(folder / f"labelsTr/p0{ending}", label.T)
    save(folder / f"labelsTr/p1{ending}", np.stack([label] * 3, axis=-1))
    save(folder / f"labelsTr/p2{ending}", 255 * label)
    save(folder / f"imagesTr/p3_0000{ending}", label)
    broken = folder / f"imagesTr/p4_0000{ending}"
    broken.write_bytes(broken.read_bytes()[:300])
    assert found(folder) == {
        "shape_mismatch": ["p0"], "channel_mismatch": ["p1", "p3"], "unknown_label": ["p2"], "unreadable": ["p4"],
        "pixels": [None],
    }  # fmt: skip


@each_ending
def test_the_same_picture_twice(tmp_path: Path, ending: str) -> None:
    folder = pictures(tmp_path / "a", ending, [(20, 30)] * 6)
    save(folder / f"imagesTr/p3_0000{ending}", io.imread(folder / f"imagesTr/p1_0000{ending}"))
    assert found(folder) == {"duplicate": ["p3"], "pixels": [None]}


# ---------------------------------------------------------------------------------------------------- orientation tags


def tag(path: Path, orientation: int) -> None:
    """Save the picture again with this tag, its pixels as they are."""
    with Image.open(path) as picture:
        pixels = picture.copy()
    exif = Image.Exif()
    exif[274] = orientation
    pixels.save(path, exif=exif)


@pytest.mark.parametrize("ending", [".png", ".tif"])  # BMP has no tags
@pytest.mark.parametrize(
    ("image", "label", "words"),
    [
        (6, 6, "imagesTr/p1_0000{} turned by 90° clockwise, labelsTr/p1{} turned by 90° clockwise. Training sees"),
        (
            3,
            1,
            "viewers show imagesTr/p1_0000{} turned by 180°. Training sees pixels as they are stored. The case's other",
        ),
        (
            1,
            2,
            "viewers show labelsTr/p1{} mirrored left to right. Training sees pixels as they are stored. The case's",
        ),
    ],
)
def test_a_tag_that_viewers_turn_pictures_by(tmp_path: Path, ending: str, image: int, label: int, words: str) -> None:
    folder = pictures(tmp_path / "a", ending, [(20, 30)] * 6)
    case = open_dataset(folder).cases[1]
    assert case.label is not None
    before = read_case(case, open_dataset(folder))
    tag(case.images[0], image)
    tag(case.label, label)
    for one, other in zip(before[:2], read_case(case, open_dataset(folder))[:2], strict=True):
        np.testing.assert_array_equal(one, other)  # the reader does not look at it
    (finding,) = (f for f in check({"a": folder}).findings if f.code != "pixels")
    assert (finding.severity, finding.code, finding.case) == ("warning", "orientation_tag", "p1")
    assert words.replace("{}", ending) in finding.text
    assert ("tagged otherwise" in finding.text) == (image != label)


@pytest.mark.parametrize(
    "how", [{"bigtiff": True}, {"byteorder": ">"}, {"compression": "zlib"}, {}], ids=["large", "big end", "packed", "plain"]
)  # fmt: skip
def test_a_tag_of_a_volume(tmp_path: Path, how: dict[str, Any]) -> None:
    """Of voxels that Pillow does not open."""
    folder = stacks(tmp_path / "a", ".tif")
    volume = tifffile.imread(folder / "imagesTr/c2_0000.tif").astype(np.float64)
    tifffile.imwrite(folder / "imagesTr/c2_0000.tif", volume, extratags=[(274, "H", 1, 8, True)], **how)
    assert found(folder) == {"orientation_tag": ["c2"]}


# ------------------------------------------------------------------------------------------------------ volumes in TIFF


def stacks(folder: Path, ending: str, spacing: object = (3.0, 0.5, 0.7)) -> Path:
    """Six volumes with their spacing beside them."""
    site(folder, n=6)
    rewrite(folder, file_ending=ending)
    for path in list(folder.glob("*/*.nii.gz")):
        path.unlink()
    label = np.zeros(SHAPE, np.uint8)
    label[1:3, 1:4, 2:5] = 1
    for i in range(6):
        image = np.random.default_rng(i).normal(100, 10, SHAPE).astype(np.float32)
        tifffile.imwrite(folder / f"imagesTr/c{i}_0000{ending}", image)
        tifffile.imwrite(folder / f"labelsTr/c{i}{ending}", label)
        beside(folder, f"imagesTr/c{i}", spacing)
    return folder


def beside(folder: Path, name: str, spacing: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"spacing": spacing}))


def no_file(folder: Path) -> None:
    (folder / "imagesTr/c1.json").unlink()


def image(spacing: object) -> Change:
    return lambda folder: beside(folder, "imagesTr/c1", spacing)


def label(spacing: object) -> Change:
    return lambda folder: beside(folder, "labelsTr/c1", spacing)


each_stack = pytest.mark.parametrize("ending", [".tif", ".tiff"])


@each_stack
@pytest.mark.parametrize(
    ("change", "severity", "code", "words"),
    [
        # nnU-Net #2937: read as 1 x 1 x 1 mm without a word that anyone sees
        (no_file, "error", "no_spacing", "no imagesTr/c1.json, so its voxels count as 1 x 1 x 1 mm, unlike those of 5 other"),
        (image([0, 0.5, 0.7]), "error", "no_spacing", "c1.json, which says the spacing of c1_0000{}, gives [0, 0.5, 0.7]"),
        (image([0.5, 0.7]), "error", "no_spacing", "gives [0.5, 0.7]. Allowed are three numbers"),
        (image(["3", "1", "1"]), "error", "no_spacing", 'gives ["3", "1", "1"]'),
        (lambda s: (s / "imagesTr/c1.json").write_text("{}"), "error", "no_spacing", 'holds no "spacing"'),
        (lambda s: (s / "imagesTr/c1.json").write_text("[3"), "error", "no_spacing", 'holds no "spacing"'),
        (label([3, 0.5, 0]), "error", "no_spacing", "labelsTr/c1.json, which says the spacing of c1{}"),
        (label([3, 0.5, 0.9]), "warning", "geometry_mismatch", "spacings of 0.9 x 0.5 x 3 and 0.7 x 0.5 x 3 mm"),
        (image([1, 1, 1]), "warning", "unit_spacing", "exactly 1 mm along all axes, unlike that of 5 other"),
        (image([30, 5, 7]), "warning", "odd_spacing", "10.2 mm"),
    ],
    ids=["none", "zero", "two", "text", "no key", "no JSON", "label's", "other than label's", "unit", "odd"],
)  # fmt: skip
def test_a_spacing_beside_a_volume(
    tmp_path: Path, ending: str, change: Change, severity: str, code: str, words: str
) -> None:
    folder = stacks(tmp_path / "a", ending)
    assert found(folder) == {}
    beside(folder, "labelsTr/c2", [3, 0.5, 0.7])  # as nnU-Net writes it
    change(folder)
    (finding,) = check({"a": folder}).findings
    assert (finding.severity, finding.code, finding.case) == (severity, code, "c1")
    assert words.replace("{}", ending) in finding.text
    assert finding.fix.endswith(".")


@each_stack
def test_a_spacing_that_a_run_refuses_is_an_error_and_hides_nothing(tmp_path: Path, ending: str) -> None:
    folder = stacks(tmp_path / "a", ending)
    beside(folder, "imagesTr/c1", [0, 1, 1])
    beside(folder, "labelsTr/c2", [0, 1, 1])
    for case in ("c1", "c2"):
        label = np.full(SHAPE, 9, np.uint8)
        tifffile.imwrite(folder / f"labelsTr/{case}{ending}", label)
    assert found(folder) == {"no_spacing": ["c1", "c2"], "unknown_label": ["c1", "c2"]}
    dataset = open_dataset(folder)
    for case in (1, 2):
        with pytest.raises(DataError):
            read_case(dataset.cases[case], dataset)


@each_stack
def test_volumes_that_all_lack_their_spacing(tmp_path: Path, ending: str) -> None:
    folder = stacks(tmp_path / "a", ending)
    for path in folder.glob("imagesTr/*.json"):
        path.unlink()
    (finding,) = check({"a": folder}).findings
    assert (finding.severity, finding.code) == ("note", "pixels")
    assert "No case has its spacing beside it (imagesTr/CASE.json)" in finding.text


def test_volumes_in_tiff_have_no_orientation(tmp_path: Path) -> None:
    """So they are not turned beside another site's NIfTI files."""
    other = site(tmp_path / "b", seed=1, prefix="b")
    for i in range(6):
        write(other, f"b{i}", place={"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}, seed=60 + i)
    findings: tuple[Finding, ...] = check({"a": stacks(tmp_path / "a", ".tif"), "b": other}).findings
    assert not [f for f in findings if f.code == "sites_orientation"]
