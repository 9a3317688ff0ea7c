"""What a NIfTI file really holds; SimpleITK's silence about it, and nibabel as the oracle."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from concilium.data import _nifti
from concilium.data._nifti import scan

KINDS = [nib.Nifti1Image, nib.Nifti2Image]


def volume(kind: str = "f4") -> np.ndarray:
    array = np.arange(6 * 7 * 8, dtype=kind).reshape(6, 7, 8)
    if array.dtype.kind in "fc":
        array[0, 0, 0], array[1, 2, 3], array[5, 6, 7] = np.nan, np.inf, -np.inf
    return array


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(("kind", "n"), [("f4", 3), ("f8", 3), (">f4", 3), ("c8", 3), ("i2", 0), ("u1", 0)])
def test_voxels_that_are_not_finite_are_counted(tmp_path: Path, make: type, kind: str, n: int, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    order = ">" if kind.startswith(">") else "<"
    header = make.header_class(endianness=order)
    nib.save(make(volume(kind), np.diag([2, 3, 4, 1]), header=header, dtype=np.dtype(kind)), path)
    payload = scan(path)
    assert payload is not None
    assert (payload.n_not_finite, payload.n_missing, payload.placed) == (n, 0, True)
    assert (payload.size, payload.spacing) == ((6, 7, 8), (2, 3, 4))


def test_simpleitk_does_replace_them_without_a_word(tmp_path: Path) -> None:
    """The reason for this module. Once this fails, reading alone is enough."""
    for ending, kept in ((".nii.gz", 0), (".nii", 0), (".nrrd", 3), (".mha", 3), (".gipl", 3)):
        path = tmp_path / f"a{ending}"
        sitk.WriteImage(sitk.GetImageFromArray(volume()), str(path))
        read = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        assert np.count_nonzero(~np.isfinite(read)) == kept
        if not kept:
            payload = scan(path)
            assert payload is not None
            assert payload.n_not_finite == 3


def test_pieces_do_not_change_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nib.save(nib.Nifti1Image(volume("f8"), np.eye(4)), tmp_path / "a.nii.gz")
    for size in (1024, 2048, 1 << 22):
        monkeypatch.setattr(_nifti, "PIECE", size)
        payload = scan(tmp_path / "a.nii.gz")
        assert payload is not None
        assert (payload.n_not_finite, payload.n_missing) == (3, 0)


def test_bytes_after_the_voxels_are_no_voxels(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.ones((2, 3, 4), "f4"), np.eye(4)), path)
    with path.open("ab") as file:
        file.write(struct.pack("<f", np.nan) * 100)
    payload = scan(path)
    assert payload is not None
    assert (payload.n_not_finite, payload.n_missing) == (0, 0)


def test_what_a_cut_off_file_lacks_is_counted(tmp_path: Path) -> None:
    """SimpleITK reads both with zeros in the place of what is missing."""
    whole = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.ones((10, 10, 10), "f4"), np.eye(4)), whole)
    content = whole.read_bytes()[:-1234]
    (tmp_path / "b.nii").write_bytes(content)
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(content))
    for name in ("b.nii", "c.nii.gz"):
        payload = scan(tmp_path / name)
        assert payload is not None
        assert payload.n_missing == 1234
        assert (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))) == 0).any()


def test_a_damaged_archive_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 20, 20)), np.eye(4)), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(EOFError):
        scan(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(gzip.BadGzipFile):
        scan(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 1000, struct.pack("<i", 348) + b"\xff" * 600])
def test_what_is_no_nifti_file_is_left_to_the_reader(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.nii").write_bytes(content)
    assert scan(tmp_path / "a.nii") is None
