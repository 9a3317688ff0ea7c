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
        (lambda s: rename(s, "imagesTr/c0_0000", "imagesTr/c0"), "unknown_file", "c0", r"rename it to c0_0000\.nii\.gz"),
        # nnU-Net #820, #448, #231: label maps with one
        (lambda s: rename(s, "labelsTr/c1", "labelsTr/c1_0000"), "unknown_file", "c1", r"Rename it to c1\.nii\.gz"),
        # nnU-Net #2937: a number twice over
        (lambda s: rename(s, "imagesTr/c0_0000", "imagesTr/c0_0001_0000"), "missing_channel", "c0", "label map and no image"),
        (lambda s: rename(s, "imagesTr/c2_0000", "imagesTr/c2_0003"), "extra_channel", "c2", "channel 3.*names 1: 0 MRI"),
        (lambda s: (s / "labelsTr/c3.nii.gz").unlink(), "missing_label", "c3", r"labelsTr/c3\.nii\.gz"),
        # FLIP #90: files of another kind are counted by people and not by the program
        (lambda s: (s / "imagesTr/c9.dcm").write_bytes(b""), "ignored_file", None, r"c9\.dcm is never read"),
        (lambda s: rewrite(s, numTraining=17), "case_count", None, "numTraining = 17; there are 6"),
        (lambda s: rewrite(s, patient=None), "no_patients", None, "no table patient"),
        (lambda s: rewrite(s, patient={"c0": "p"}), "patient_table", None, "lacks 5 cases"),
        (lambda s: rewrite(s, patient={f"c{i}": f"p{i}" for i in range(7)}), "patient_table", None, r"not there \(c6\)"),
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
    assert found(folder) == {"unknown_file": ["c0", "c1"], "case_count": [None]}


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
