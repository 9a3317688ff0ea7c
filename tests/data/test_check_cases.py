"""`check` on the images themselves: fixtures after what users reported (numbers of public threads beside each)."""

from __future__ import annotations

import gzip
import re
import struct
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from check_sites import SHAPE, found, rewrite, save, site, write

from concilium.data import _check_case
from concilium.data._check_types import Picture
from concilium.data.check import check
from concilium.data.dataset import open_dataset, read_case
from concilium.errors import DataError

Fault = Callable[[Path], None]


def image(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 10, SHAPE).astype(np.float32)


def box(value: float = 1, kind: str = "u1") -> np.ndarray:
    label = np.zeros(SHAPE, kind)
    label[1:3, 1:4, 2:5] = value
    return label


def label(**place: Sequence[float]) -> Fault:
    """The label map of case c0 in another place than its image."""
    return lambda folder: save(folder / "labelsTr/c0.nii.gz", box(), **place)


def holding(value: float, kind: str = "u1") -> Fault:
    """A label map that holds this in its box of 2 x 3 x 3 voxels, of 120."""
    return lambda folder: write(folder, "c0", label=box(value, kind))


def with_nan(folder: Path) -> None:
    voxels = image()
    voxels[0, 0, :3] = np.nan, np.inf, -np.inf
    write(folder, "c0", voxels)


def cut_off(folder: Path) -> None:
    path = folder / "imagesTr/c0_0000.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))


def header_without_place(folder: Path) -> None:
    save(
        folder / "labelsTr/c0.nii.gz", box(), spacing=(1, 1, 1), origin=(0, 0, 0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)
    )


def stored_mirrored(folder: Path) -> None:
    """The label map as another program stores it: the same places, the y axis the other way round."""
    path = folder / "imagesTr/c0_0000.nii.gz"
    there = sitk.ReadImage(str(path))
    label = sitk.GetImageFromArray(box())
    label.CopyInformation(there)
    sitk.WriteImage(sitk.Flip(label, [False, True, False]), str(folder / "labelsTr/c0.nii.gz"))


def stored_turned(folder: Path) -> None:
    """The same with x and y swapped, in a cube, so that shapes do not show it."""
    cube = np.random.default_rng(3).normal(size=(5, 5, 5)).astype(np.float32)
    write(folder, "c0", cube, np.ones(cube.shape, np.uint8), place={"spacing": (2, 2, 2)})
    label = sitk.PermuteAxes(sitk.ReadImage(str(folder / "labelsTr/c0.nii.gz")), [1, 0, 2])
    sitk.WriteImage(label, str(folder / "labelsTr/c0.nii.gz"))


def no_pixdim(folder: Path) -> None:
    for path in ("imagesTr/c0_0000.nii.gz", "labelsTr/c0.nii.gz"):
        content = bytearray(gzip.decompress((folder / path).read_bytes()))
        content[80:92] = struct.pack("<3f", 0, 0, 0)
        (folder / path).write_bytes(gzip.compress(bytes(content)))


def two_dimensional(folder: Path) -> None:
    for path, voxels in (("imagesTr/c0_0000.nii.gz", image()[0]), ("labelsTr/c0.nii.gz", box()[1])):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / path)


def layers(folder: Path) -> None:
    """Label maps of 3D Slicer with several segments are vectors of layers."""
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((*SHAPE, 2), np.uint8), isVector=True), str(folder / "labelsTr/c0.nii.gz")
    )


@pytest.mark.parametrize(
    ("fault", "severity", "code", "words"),
    [
        # nnU-Net #1913, #2333, #622: spacing; 0.1 mm more along x is 0.5 mm at the far corner
        (label(spacing=(0.8, 0.8, 2)), "warning", "geometry_mismatch", r"0\.5 mm apart \(0\.71 voxels\).*0\.8 x 0\.8 x 2 and"),
        (label(spacing=(0.7, 0.8, 3)), "error", "geometry_mismatch", "3 mm apart"),
        # nnU-Net #2551, #1267, #201: another origin
        (label(origin=(-7, 3.5, 15)), "error", "geometry_mismatch", r"4 mm apart \(5\.7 voxels\)"),
        (label(origin=(-7, 3.5, 11.1)), "warning", "geometry_mismatch", r"0\.1 mm apart.*CopyInformation.*safe"),
        # nnU-Net #2526: another direction
        (label(direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)), "error", "geometry_mismatch", r"voxels\. → Look at one in a viewer"),
        (header_without_place, "error", "geometry_mismatch", "without a place"),
        # nnU-Net #1669: the y axis the other way round; copying the header, as advised there, moves the structure
        (stored_mirrored, "error", "mirrored", "mirrored along y.*Resample"),
        (stored_turned, "error", "mirrored", "axes in another order"),
        # nnU-Net #1267, #2218: shape
        (lambda s: save(s / "labelsTr/c0.nii.gz", box()[:3]), "error", "shape_mismatch", "6 x 5 x 3 voxels, the image 6 x 5 x 4"),
        (lambda s: save(s / "labelsTr/c0.nii.gz", box().transpose(0, 2, 1)), "error", "shape_mismatch", "turned"),
        # nnU-Net #2925: layers of segments
        (layers, "error", "channel_mismatch", "2 values in each voxel"),
        (holding(255), "error", "unknown_label", r"18 voxels \(15 %\).*255.*Allowed: background = 0, tumour = 1.*write 1"),
        (holding(-1, "i2"), "error", "unknown_label", "hold -1"),
        (holding(0.25, "f4"), "error", "fractional_label", r"18 voxels .*\(0\.25\).*nearest"),
        (holding(np.nan, "f4"), "error", "not_finite", "18 of 120 voxels of the label map"),
        (holding(0), "warning", "empty_label", "background only"),
        (with_nan, "error", "not_finite", "3 of 120 voxels of c0_0000.nii.gz are NaN or infinite"),
        (lambda s: write(s, "c0", np.full(SHAPE, 5.0)), "error", "constant_image", "one value"),
        (cut_off, "error", "unreadable", "100 bytes of voxels are missing"),
        (lambda s: (s / "labelsTr/c0.nii.gz").write_bytes(b"no archive"), "error", "unreadable", "not compressed"),
        (lambda s: (s / "labelsTr/c0.nii.gz").write_bytes(b""), "error", "unreadable", "labelsTr/c0.nii.gz is empty"),
        (lambda s: (s / "labelsTr/c0.nii.gz").write_bytes(gzip.compress(b"x" * 400)), "error", "unreadable", "not what its name"),
        (lambda s: (s / "labelsTr/c0.nii.gz").write_bytes(gzip.compress(b"text")), "error", "unreadable", "cannot be read"),
        # nnU-Net #2937, #1285: no spacing is taken for 1 mm
        (no_pixdim, "error", "no_spacing", "0 x 0 x 0"),
        # nnU-Net #1348: 2D files
        (two_dimensional, "warning", "flat_volume", "999 times"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_case_is_said(tmp_path: Path, fault: Fault, severity: str, code: str, words: str) -> None:
    folder = site(tmp_path / "a")
    fault(folder)
    findings = check({"a": folder}).findings
    about = [(f.severity, f.code) for f in findings if f.case == "c0" and re.search(words, f"{f.text} → {f.fix}")]
    assert about == [(severity, code)], findings
    assert all(f.case == "c0" for f in findings)
    assert all(f.text.endswith((".", ")")) and f.fix.endswith(".") for f in findings)


def test_rounding_of_headers_is_no_finding(tmp_path: Path) -> None:
    """nnU-Net #1287, #2051 (directions that differ in the eighth digit), #1267 (3.27022 and 3.27 mm)."""
    folder = site(tmp_path / "a")
    label = folder / "labelsTr/c0.nii.gz"
    near = (0.80000002, -0.59999998, 1e-8, 0.59999998, 0.80000002, 0, 0, 0, 1)
    save(label, box(), spacing=(0.70001, 0.8, 2.0002), origin=(-7.0001, 3.5, 11.0001), direction=near)
    assert found(folder) == {}


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha", ".gipl"])
def test_other_formats_for_volumes(tmp_path: Path, ending: str) -> None:
    """The same faults, whatever library reads; GIPL keeps no direction."""
    folder = site(tmp_path / "a")
    with_nan(folder)
    write(folder, "c1", label=box(3))
    write(folder, "c2", image(1005), label_place={"origin": (100, 0, 0)})
    for path in list(folder.glob("*/*.nii.gz")):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path).replace(".nii.gz", ending))
        path.unlink()
    voxels = image()
    voxels[0, 0, :3] = np.nan
    save(folder / f"imagesTr/c0_0000{ending}", voxels)
    rewrite(folder, file_ending=ending)
    broken = folder / f"imagesTr/c3_0000{ending}"
    broken.write_bytes(broken.read_bytes()[:-50])
    assert found(folder) == {
        "not_finite": ["c0"],
        "unknown_label": ["c1"],
        "geometry_mismatch": ["c2"],
        "unreadable": ["c3"],
    }


def test_channels_are_compared_with_the_first(tmp_path: Path) -> None:
    folder = site(tmp_path / "a", channel_names={"0": "T1", "1": "T2"})
    for i in range(6):
        save(folder / f"imagesTr/c{i}_0001.nii.gz", image(1050 + i))
    assert found(folder) == {}
    save(folder / "imagesTr/c0_0001.nii.gz", image()[:2])
    save(folder / "imagesTr/c1_0001.nii.gz", image(), origin=(0, 0, 0))
    save(
        folder / "imagesTr/c2_0001.nii.gz", image(), spacing=(0.70002, 0.8, 2)
    )  # the reader refuses it; we call it rounding
    save(folder / "imagesTr/c3_0001.nii.gz", np.zeros(SHAPE))
    (folder / "imagesTr/c4_0001.nii.gz").unlink()
    findings = check({"a": folder}).findings
    assert [(f.severity, f.code, f.case) for f in findings] == [
        ("error", "geometry_mismatch", "c1"),
        ("error", "geometry_mismatch", "c2"),
        ("error", "missing_channel", "c4"),
        ("error", "shape_mismatch", "c0"),
        ("warning", "constant_channel", "c3"),
        ("note", "case_count", None),
    ]
    assert "Channel 1 (T2) is missing" in findings[2].text
    with pytest.raises(DataError, match="spacings"):  # so it is an error to us, too
        read_case(open_dataset(folder).cases[2], open_dataset(folder))


# ------------------------------------------------------------------------------------------------------------- in a run


def test_a_run_sets_aside_what_nifti_would_hide(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    with_nan(folder)
    write(folder, "c1", label=box(np.nan, "f4"))
    cut_off_case = folder / "imagesTr/c2_0000.nii.gz"
    cut_off_case.write_bytes(gzip.compress(gzip.decompress(cut_off_case.read_bytes())[:-100]))
    dataset = open_dataset(folder)
    for i, code in enumerate(("not_finite", "not_finite", "unreadable")):
        with pytest.raises(DataError) as e:
            read_case(dataset.cases[i], dataset)
        assert e.value.code == code
    read_case(dataset.cases[3], dataset)


def test_one_file_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 cases must not need more memory than one."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    read = _check_case.read_file

    def spy(path: Path, *arguments: Any, **more: Any) -> object:
        nonlocal most
        most = max(most, sum(r() is not None for r in alive))
        picture = read(path, *arguments, **more)
        assert isinstance(picture, Picture)
        alive.append(weakref.ref(picture.voxels))
        return picture

    monkeypatch.setattr(_check_case, "read_file", spy)
    check({"a": site(tmp_path / "a")})
    assert len(alive) == 12
    assert most <= 1
