"""`check --fix`: copies in which what is right beyond doubt is mended, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from check_sites import SHAPE, SPACING, found, rewrite, save, site, write

import concilium as cc
from concilium.data.dataset import open_dataset, read_case
from concilium.errors import StudyError


def image(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(1000 + seed).normal(100, 10, SHAPE).astype(np.float32)


def box(kind: str = "u1") -> np.ndarray:
    label = np.zeros(SHAPE, kind)
    label[1:3, 1:4, 2:5] = 1
    return label


def damaged(folder: Path) -> Path:
    """Something of every kind that is mended, and `c9`, whose faults only a person can mend."""
    site(folder, n=10, numTraining=11)
    (folder / "imagesTr/c0_0000.nii.gz").rename(folder / "imagesTr/c0.nii.gz")
    (folder / "labelsTr/c1.nii.gz").rename(folder / "labelsTr/c1_0000.nii.gz")
    for case, kind in (("c2", "f8"), ("c3", "i2")):
        save(folder / f"labelsTr/{case}.nii.gz", box(kind), origin=(-7, 3.5, 11.1))
    save(folder / "labelsTr/c4_0000.nii.gz", box(), spacing=(0.7001, 0.81, 2.0))  # two faults of one file
    (folder / "labelsTr/c4.nii.gz").unlink()
    (folder / "imagesTr/c5_0000.nii.gz").rename(folder / "imagesTr/c5_0000.NII.GZ")
    write(folder, "c7", image())
    write(folder, "c6", image().astype(np.float64))
    patients = {f"c{i}": f"p{i}" for i in range(10)} | {"c7": "p6"}
    rewrite(folder, patient=patients)
    save(folder / "labelsTr/c9.nii.gz", np.full(SHAPE, 255, np.uint8), origin=(-7, 3.5, 15))
    (folder / "README.md").write_text("From the scanner upstairs.")
    (folder / "imagesTr/notes.txt").write_text("c3 was hard.")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_all_that_is_safe_is_mended_and_nothing_else_changes(tmp_path: Path) -> None:
    folder, out = damaged(tmp_path / "north"), tmp_path / "out"
    before = contents(folder)
    checked = cc.check([folder], fix=out).found
    assert contents(folder) == before
    safe = {(f.code, f.case) for f in checked.findings if f.safe}
    assert safe == {
        ("unknown_file", "c0"), ("unknown_file", "c1"), ("geometry_mismatch", "c2"), ("geometry_mismatch", "c3"),
        ("geometry_mismatch", "c4"), ("unknown_file", "c4"), ("ignored_file", "c5"), ("duplicate", "c7"), ("case_count", None),
    }  # fmt: skip
    # What is left is what only a person can know.
    assert found(out / "north") == {"geometry_mismatch": ["c9"], "unknown_label": ["c9"], "ignored_file": [None]}
    after = contents(out / "north")
    assert after == expected(before, after)
    assert json.loads(after["dataset.json"]) == json.loads(before["dataset.json"]) | {
        "numTraining": 9,
        "patient": {f"c{i}": f"p{i}" for i in range(10) if i != 7},
    }


def expected(before: dict[str, bytes], after: dict[str, bytes]) -> dict[str, bytes]:
    """The files as they were, but for names, for c7, and for what is written again (three label maps, dataset.json)."""
    names = {
        "imagesTr/c0.nii.gz": "imagesTr/c0_0000.nii.gz",
        "labelsTr/c1_0000.nii.gz": "labelsTr/c1.nii.gz",
        "labelsTr/c4_0000.nii.gz": "labelsTr/c4.nii.gz",
        "imagesTr/c5_0000.NII.GZ": "imagesTr/c5_0000.nii.gz",
    }
    files = {names.get(name, name): content for name, content in before.items() if "c7" not in name}
    written = {"dataset.json", *(f"labelsTr/{case}.nii.gz" for case in ("c2", "c3", "c4"))}
    return {name: after[name] if name in written else content for name, content in files.items()}


def test_a_new_header_leaves_voxels_and_their_type(tmp_path: Path) -> None:
    folder, out = damaged(tmp_path / "north"), tmp_path / "out"
    cc.check(folder, fix=out)
    for case, kind, own in (("c2", np.float64, "c2"), ("c3", np.int16, "c3"), ("c4", np.uint8, "c4_0000")):
        label = sitk.ReadImage(str(out / f"north/labelsTr/{case}.nii.gz"))
        there = sitk.ReadImage(str(out / f"north/imagesTr/{case}_0000.nii.gz"))
        voxels = sitk.GetArrayFromImage(label)
        assert voxels.dtype == kind
        np.testing.assert_array_equal(
            voxels, sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"labelsTr/{own}.nii.gz")))
        )
        for key in ("Spacing", "Origin", "Direction"):
            assert getattr(label, f"Get{key}")() == pytest.approx(getattr(there, f"Get{key}")(), abs=1e-6)
    with pytest.raises(AssertionError):  # the original's is another
        np.testing.assert_allclose(
            sitk.ReadImage(str(folder / "labelsTr/c4_0000.nii.gz")).GetSpacing(), SPACING, atol=1e-3
        )


def test_a_case_that_is_left_out_is_in_no_table(tmp_path: Path) -> None:
    """A table that named it would be refused."""
    folder = site(tmp_path / "north")
    rewrite(
        folder, patient={f"c{i}": f"p{max(i, 1)}" for i in range(6)}, annotated={f"c{i}": ["tumour"] for i in range(6)}
    )
    for case in ("c0", "c1"):
        write(folder, case, image())
    cc.check([folder], fix=tmp_path / "out")
    about = json.loads((tmp_path / "out/north/dataset.json").read_text())
    assert "c1" not in about["annotated"]
    assert len(open_dataset(tmp_path / "out/north").cases) == 5


def test_every_change_is_listed(tmp_path: Path) -> None:
    checked = cc.check([damaged(tmp_path / "north")], fix=tmp_path / "out").found
    text = (tmp_path / "out/FIXES.txt").read_text(encoding="utf-8")
    for line in (
        "imagesTr/c0.nii.gz: renamed to c0_0000.nii.gz (unknown_file)",
        "labelsTr/c3.nii.gz: has spacing, origin and direction of imagesTr/c3_0000.nii.gz now; its voxels are the same",
        "imagesTr/c7_0000.nii.gz: left out. It has the same image as case c6. It counts twice. (duplicate)",
        "labelsTr/c7.nii.gz: left out.",
        "dataset.json: c7 taken out of the table patient (duplicate)",
    ):
        assert f"\n  {line}" in text
    listed = json.loads((tmp_path / "out/FIXES.json").read_text(encoding="utf-8"))
    assert len(listed) == len(checked.changes) == text.count("\n  ") == 11
    assert listed[0].keys() == {"data_set", "code", "case", "file", "text"}


def test_the_number_of_cases_is_that_of_the_copy(tmp_path: Path) -> None:
    folder = damaged(tmp_path / "north")
    for said, words in ((17, "numTraining is 9 now, the number of complete cases; it was 17"), (9, ""), ("9", "")):
        rewrite(folder, numTraining=said)
        out = tmp_path / f"out{said}{type(said)}"
        changes = cc.check([folder], fix=out).found.changes
        assert [c.text for c in changes if c.code == "case_count"] == ([words] if words else [])
        assert json.loads((out / "north/dataset.json").read_text())["numTraining"] == (9 if words else said)


def test_channels_that_the_reader_refuses_for_a_rounding_are_mended(tmp_path: Path) -> None:
    folder = site(tmp_path / "a", channel_names={"0": "T1", "1": "T2"})
    for i in range(6):
        save(folder / f"imagesTr/c{i}_0001.nii.gz", image(i), spacing=(0.70002, 0.8, 2) if i == 2 else SPACING)
    assert found(folder) == {"geometry_mismatch": ["c2"]}
    cc.check([folder], fix=tmp_path / "out")
    assert found(tmp_path / "out/a") == {}
    dataset = open_dataset(tmp_path / "out/a")
    np.testing.assert_array_equal(read_case(dataset.cases[2], dataset)[0][1], image(2))


# ------------------------------------------------------------------------------------------------------- what is not safe


def with_nan(folder: Path) -> None:
    """Written again it would hold 0, which is what it is read as."""
    voxels = box("f4")
    voxels[0, 0, 0] = np.nan
    save(folder / "labelsTr/c0.nii.gz", voxels, origin=(-7, 3.5, 11.1))


def one_image(folder: Path, **second: Any) -> None:
    """Case c1 is c0 again."""
    rewrite(folder, patient={f"c{i}": f"p{max(i, 1)}" for i in range(6)})
    write(folder, "c0", image())
    write(folder, "c1", image(), **second)


def without_table(folder: Path) -> None:
    one_image(folder)
    rewrite(folder, patient=None)


def half_a_table(folder: Path) -> None:
    """Is the patient c0 the case c0?"""
    one_image(folder)
    rewrite(folder, patient={"c1": "c0"})


def other_patient(folder: Path) -> None:
    one_image(folder)
    rewrite(folder, patient={f"c{i}": f"p{i}" for i in range(6)})


def unreadable_labels(folder: Path) -> None:
    one_image(folder)
    for case in ("c0", "c1"):
        (folder / f"labelsTr/{case}.nii.gz").write_bytes(b"nothing")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(with_nan, id="NaN"),
        pytest.param(without_table, id="no table"),
        pytest.param(half_a_table, id="half a table"),
        pytest.param(other_patient, id="other patient"),
        pytest.param(unreadable_labels, id="unreadable"),
        pytest.param(lambda s: one_image(s, label=np.ones(SHAPE, np.uint8)), id="other label map"),
        pytest.param(lambda s: one_image(s, place={"spacing": (1, 2, 3)}), id="which is right?"),
        pytest.param(lambda s: save(s / "labelsTr/c0.nii.gz", box(), origin=(-7, 3.5, 15)), id="far apart"),
        pytest.param(lambda s: (s / "imagesTr/c0_0000.nii.gz").unlink(), id="no image"),
    ],
)
def test_what_only_a_person_can_know_is_left(tmp_path: Path, fault: Callable[[Path], Any]) -> None:
    folder = site(tmp_path / "a")
    fault(folder)
    rewrite(folder, numTraining=None)
    checked = cc.check([folder], fix=tmp_path / "out").found
    assert checked.findings
    assert not [f for f in checked.findings if f.safe]
    assert not checked.changes
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ where copies go


def test_a_copy_never_lies_where_something_is(tmp_path: Path) -> None:
    folder = damaged(tmp_path / "north")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full/file", folder, folder / "mended"):
        with pytest.raises(StudyError, match="Give another --fix"):
            cc.check([folder], fix=out)
    (tmp_path / "empty").mkdir()
    cc.check([folder], fix=tmp_path / "empty")
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == ["FIXES.json", "FIXES.txt", "north"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_all_data_sets_are_copied_and_each_has_a_folder(tmp_path: Path) -> None:
    """Also where two have one name, so that they are called by their paths."""
    one, two = damaged(tmp_path / "one/set"), site(tmp_path / "two/set", seed=1, prefix="b")
    out = tmp_path / "out"
    cc.check([one, two], test=site(tmp_path / "held_out", seed=2, prefix="t"), fix=out)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["one_set", "test", "two_set"]
    assert contents(out / "two_set") == contents(two)
    assert contents(out / "test") == contents(tmp_path / "held_out")
    assert found(out / "one_set").keys() == {"geometry_mismatch", "unknown_label", "ignored_file"}


def test_a_stack_takes_its_spacing_along(tmp_path: Path) -> None:
    import tifffile

    folder = site(tmp_path / "a")
    rewrite(folder, file_ending=".tif", patient={f"c{i}": f"p{max(i, 1)}" for i in range(6)})
    for path in list(folder.glob("*/*.nii.gz")):
        voxels = np.repeat(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), 2, 0)
        tifffile.imwrite(str(path).replace(".nii.gz", ".tif"), voxels)
        path.unlink()
    for i in range(6):
        (folder / f"imagesTr/c{i}.json").write_text('{"spacing": [3, 0.5, 0.7]}')
    (folder / "imagesTr/c1_0000.tif").write_bytes((folder / "imagesTr/c0_0000.tif").read_bytes())
    (folder / "imagesTr/c2_0000.tif").rename(folder / "imagesTr/c2.tif")
    assert found(folder) == {"unknown_file": ["c2"], "duplicate": ["c1"]}
    cc.check([folder], fix=tmp_path / "out")
    assert found(tmp_path / "out/a") == {}
    assert not list((tmp_path / "out/a").glob("*/c1*"))
