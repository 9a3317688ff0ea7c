"""`check` on files' names and `dataset.json`: fixtures after what users reported (numbers of public threads beside each)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_sites import found, rewrite, site, write

from concilium.data.check import check


def test_a_clean_site_has_nothing_wrong(tmp_path: Path) -> None:
    assert found(site(tmp_path / "a")) == {}


@pytest.mark.parametrize(
    ("change", "code", "case", "words"),
    [
        # nnU-Net #729, #1644: images without the channel's number
        (lambda s: rename(s, "imagesTr/c0_0000", "imagesTr/c0"), "unknown_file", "c0", r"Expected c0_0000\.nii\.gz"),
        # nnU-Net #820, #448, #231: label maps with one
        (lambda s: rename(s, "labelsTr/c1", "labelsTr/c1_0000"), "unknown_file", "c1", r"Expected c1\.nii\.gz\. Rename it"),
        # nnU-Net #2937: a number twice over
        (lambda s: rename(s, "imagesTr/c0_0000", "imagesTr/c0_0001_0000"), "missing_channel", "c0", "label map and no image"),
        (lambda s: rename(s, "imagesTr/c2_0000", "imagesTr/c2_0003"), "extra_channel", "c2", "channel 3.*names 1: 0 MRI"),
        (lambda s: (s / "labelsTr/c3.nii.gz").unlink(), "missing_label", "c3", r"labelsTr/c3\.nii\.gz"),
        # FLIP #90: files of another kind are counted by people and not by the program
        (lambda s: (s / "imagesTr/c9.dcm").write_bytes(b""), "ignored_file", None, r"c9\.dcm is never read"),
        (lambda s: rewrite(s, numTraining=17), "case_count", None, "numTraining = 17; there are 6"),
        (lambda s: rewrite(s, patient=None), "no_patients", None, "no table patient"),
        (lambda s: rewrite(s, patient={"c0": "p"}), "patient_table", None, "lacks 5 cases"),
        (lambda s: rewrite(s, patient={f"c{i}": f"p{i}" for i in range(7)}), "patient_table", None, r"1 case without any .*c6"),
        (lambda s: rewrite(s, annotated={"c00": ["tumour"]}), "annotated_table", None, r"1 case without any .*c00.*misspelt"),
        (lambda s: rewrite(s, annotated={"c0": ["tumour"]}), "annotated_table", None, r"lacks 5 cases \(c1, .*background"),
        (lambda s: rewrite(s, annotated=[]), "nothing_annotated", None, "nothing to train on.*take the site out"),
        (lambda s: rewrite(s, annotated={f"c{i}": [] for i in range(6)}), "nothing_annotated", None, r"6 cases\)"),
        (lambda s: rewrite(s, labels={"background": 0, "tumour": 5}), "dataset_json", None, "numbered from 0"),
        # nnU-Net #1602: the keys of its first version
        (lambda s: rewrite(s, channel_names=None, modality={"0": "CT"}), "dataset_json", None, "older data sets"),
        (lambda s: (s / "dataset.json").write_text("{"), "dataset_json", None, "must be JSON"),
        (lambda s: (s / "dataset.json").unlink(), "dataset_json", None, r"no dataset\.json"),
        (lambda s: (s / "labelsTr").rename(s / "labels"), "no_data_set", None, "no folder labelsTr"),
        (lambda s: rewrite(s, file_ending=".nrrd"), "no_training_cases", None, "no complete case"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    tmp_path: Path, change: Callable[[Path], Any], code: str, case: str | None, words: str
) -> None:
    folder = site(tmp_path / "a")
    change(folder)
    findings = [f for f in check({"a": folder}).findings if f.code == code]
    assert [f.case for f in findings if re.search(words, f"{f.text} {f.fix}")][:1] == [case], findings
    assert all(f.text.endswith((".", ")")) and f.fix.endswith(".") for f in findings)


def test_what_is_annotated_case_by_case_is_no_absent_label(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    rewrite(
        folder, labels={"background": 0, "tumour": 1, "organ": 2}, annotated={f"c{i}": ["tumour"] for i in range(6)}
    )
    assert found(folder) == {}


def rename(folder: Path, old: str, new: str) -> None:
    (folder / f"{old}.nii.gz").rename(folder / f"{new}.nii.gz")


def test_everything_is_said_at_once(tmp_path: Path) -> None:
    """One bad file hides nothing: nnU-Net's own check stops at the first (#1913, #2051), FLIP #677 at one of 1910."""
    folder = site(tmp_path / "a")
    rewrite(folder, numTraining=1, labels={"background": 0, "tumour": 7})
    (folder / "imagesTr/c0_0000.nii.gz").write_bytes(b"nothing")
    (folder / "labelsTr/c1.nii.gz").unlink()
    write(folder, "c2", np.zeros((4, 5, 6), np.float32))
    codes = found(folder)
    assert set(codes) == {
        "case_count",
        "dataset_json",
        "unreadable",
        "missing_label",
        "constant_image",
        "unknown_label",
        "absent_label",
    }
    assert codes["unreadable"] == ["c0"]
    assert codes["missing_label"] == ["c1"]


def test_a_wrong_name_is_one_finding(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    rename(folder, "imagesTr/c0_0000", "imagesTr/c0")
    rename(folder, "labelsTr/c1", "labelsTr/c1_0000")
    assert found(folder) == {"unknown_file": ["c0", "c1"]}
    write(folder, "c0", label=np.full((4, 5, 6), 9, np.uint8))
    rename(folder, "imagesTr/c0_0000", "imagesTr/c0")
    assert found(folder) == {"unknown_file": ["c0", "c1"], "unknown_label": ["c0"]}  # it is read all the same


def test_a_number_that_is_the_cases_and_not_a_channels(tmp_path: Path) -> None:
    """nnU-Net #729: case_0012.nii.gz, beside a label map of that name, is no channel 12."""
    folder = site(tmp_path / "a")
    rename(folder, "imagesTr/c0_0000", "imagesTr/c_0012")
    rename(folder, "labelsTr/c0", "labelsTr/c_0012")
    (finding,) = (f for f in check({"a": folder}).findings if f.code != "patient_table")
    assert (finding.code, finding.case, finding.safe) == ("unknown_file", "c_0012", True)
    assert "Expected c_0012_0000.nii.gz" in finding.text
    rename(folder, "labelsTr/c_0012", "labelsTr/c")
    assert set(found(folder)) == {"patient_table", "extra_channel", "missing_channel", "case_count"}


def test_a_name_that_could_be_another_is_not_safe(tmp_path: Path) -> None:
    two = site(tmp_path / "a", channel_names={"0": "T1", "1": "T2"})
    for i in range(6):
        write(two, f"c{i}", seed=20 + i)
        rename(two, f"imagesTr/c{i}_0000", f"imagesTr/c{i}_0001")
        write(two, f"c{i}", seed=i)
    assert found(two) == {}
    rename(two, "imagesTr/c0_0000", "imagesTr/c0")  # which channel?
    (two / "imagesTr/c0_0001.nii.gz").unlink()
    one = site(tmp_path / "b")
    rename(one, "labelsTr/c1", "labelsTr/x")
    rename(one, "imagesTr/c1_0000", "imagesTr/c1")  # of which case?
    write(one, "c2_0000")  # a label map with a number, beside the one without
    (one / "imagesTr/c2_0000_0000.nii.gz").unlink()
    findings = [f for x in (two, one) for f in check({"a": x}).findings if f.code == "unknown_file"]
    assert [(f.case, f.safe) for f in findings] == [("c0", False), ("c1", False), ("c2", False)]


def test_endings_in_capitals(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    (folder / "imagesTr/c0_0000.nii.gz").rename(folder / "imagesTr/c0_0000.NII.GZ")
    (folder / "labelsTr/c1.nii.gz").rename(folder / "labelsTr/c1.nii.GZ")
    write(folder, "c2", seed=2)
    (folder / "labelsTr/c2.Nii.gz").write_bytes(b"another")
    findings = check({"a": folder}).findings
    assert [(f.code, f.case, f.safe) for f in findings] == [
        ("ignored_file", "c0", True),
        ("ignored_file", "c1", True),
        ("ignored_file", None, False),
        ("case_count", None, True),
    ]


def test_several_data_sets_and_none_that_is_there(tmp_path: Path) -> None:
    checked = check({"a": tmp_path / "nowhere", "b": site(tmp_path / "b")}, test=tmp_path / "also_nowhere")
    assert [(f.site, f.code) for f in checked.findings] == [("a", "no_data_set"), ("test", "no_data_set")]
    assert checked.cases == {"a": 0, "b": 6, "test": 0}


def test_a_folder_without_dataset_json_is_still_read(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    (folder / "dataset.json").unlink()
    (folder / "imagesTr/c0_0000.nii.gz").write_bytes(b"nothing")
    assert found(folder)["unreadable"] == ["c0"]


def test_regions_and_the_ignore_label_are_no_unknown_ids(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    rewrite(folder, labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, regions_class_order=[1, 2])
    write(folder, "c0", label=np.arange(120).reshape(4, 5, 6).astype(np.uint8) % 4)
    assert not {"unknown_label", "absent_label"} & set(found(folder))


def test_the_progress_reaches_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    check({"a": site(tmp_path / "a")}, watch=lambda done, total, case: told.append((done, total)))
    assert told == [(i, 6) for i in range(7)]


def test_dataset_json_is_not_changed(tmp_path: Path) -> None:
    folder = site(tmp_path / "a")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    check({"a": folder})
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 6
