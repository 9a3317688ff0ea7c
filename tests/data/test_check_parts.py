"""`check` of a study that divides one data set: what concerns its parts shows before a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from check_sites import SHAPE, rewrite, site, write

import concilium as cc
from concilium.data.check import Checked, check
from concilium.data.dataset import open_dataset
from concilium.data.partition import Layout, Part
from concilium.errors import StudyError
from concilium.reports.findings import lines

LABELS = {"background": 0, "tumour": 1, "cyst": 2}


def whole(folder: Path) -> Path:
    """Five cases of two patients at hospital a without a cyst; six of six at b, and two of two at t, with both labels."""
    cases = [*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(6)), "t0", "t1"]
    site(folder, n=0)
    for i, case in enumerate(cases):
        label = np.zeros(SHAPE, np.uint8)
        label[1:3, 1:4, 2:5] = 1
        label[3] = 0 if case[0] == "a" else 2
        write(folder, case, label=label, seed=i)
    patients = {case: f"p of {case if case[0] != 'a' else case in 'a0a1'}" for case in cases}
    rewrite(folder, labels=LABELS, numTraining=len(cases), patient=patients, hospital={c: c[0] for c in cases})
    return folder


def study(folder: Path, *, partition: str = 'by = "key"\nkey = "hospital"\ntest = ["t"]\n', more: str = "") -> Path:
    path = folder / "study.toml"
    path.write_text(
        f'[study]\nname = "s"\n[partition]\ndata = "all"\n{partition}[sites.a]\n[sites.b]\n'
        f"[protocol]\nrounds = 1\nsteps = 1\n{more}"
    )
    return path


def told(checked: Checked) -> list[tuple[str, str, str, str | None]]:
    return [(f.severity, f.code, f.site, f.case) for f in checked.findings]


def test_what_concerns_the_parts_is_said_of_them(tmp_path: Path) -> None:
    whole(tmp_path / "all")
    checked = cc.check(study(tmp_path)).found
    assert checked.cases == {"a": 5, "b": 6, "test": 2}
    assert told(checked) == [("warning", "absent_label", "a", None), ("warning", "few_patients", "a", None)]
    assert "cyst (2)" in checked.findings[0].text
    assert checked.findings[1].text == "There are 2 patients for 5 folds: 2 folds are made."


def test_what_concerns_a_case_is_said_of_its_part_and_the_rest_of_the_whole(tmp_path: Path) -> None:
    folder = whole(tmp_path / "all")
    rewrite(folder, numTraining=50)
    image = np.random.default_rng(99).normal(size=SHAPE)
    for case in ("a0", "b1", "t1"):
        write(folder, case, image)
    write(folder, "b2", label=np.full(SHAPE, 7, np.uint8), seed=50)
    found = [f for f in told(cc.check(study(tmp_path)).found) if f[1] not in ("absent_label", "few_patients")]
    assert found == [
        ("note", "case_count", "partition", None),
        ("error", "in_test_set", "a", "a0"),
        ("error", "duplicate", "b", "b1"),
        ("error", "unknown_label", "b", "b2"),
    ]
    shown = [text for _, text in lines(cc.check(study(tmp_path)).found)]
    assert shown[0] == "partition: 1 note."
    assert "a: 5 cases. 1 error, 2 warnings." in shown
    assert "3 data sets, 13 cases. 3 errors, 2 warnings, 1 note." in shown


def test_a_part_without_a_complete_case(tmp_path: Path) -> None:
    folder = whole(tmp_path / "all")
    for path in folder.glob("labelsTr/a*"):
        path.unlink()
    rewrite(folder, numTraining=None)
    found = told(cc.check(study(tmp_path)).found)
    assert ("error", "no_training_cases", "a", None) in found
    assert [f for f in found if f[2] != "a"] == []


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ('by = "key"\nkey = "town"\n', "town"),
        ('by = "size"\ntest = 0.95\n', "leaves no patient"),
        ('by = "csv"\nfile = "nowhere.csv"\n', "nowhere.csv"),
    ],
)
def test_a_division_that_fails_is_a_finding(tmp_path: Path, partition: str, words: str) -> None:
    whole(tmp_path / "all")
    checked = cc.check(study(tmp_path, partition=partition)).found
    assert checked.cases == {"partition": 13}
    (finding,) = (f for f in checked.findings if f.code == "partition")
    assert finding.severity == "error"
    assert words in finding.text
    assert finding.fix.endswith(".")


def test_what_a_division_notes_is_told(tmp_path: Path) -> None:
    names = [c.name for c in open_dataset(whole(tmp_path / "all")).cases]
    rows = "".join(f"{name},{'a' if name[0] == 'a' else 'b'}\n" for name in [*names, "x9"])
    (tmp_path / "who.csv").write_text(f"case,site\n{rows}")
    checked = cc.check(study(tmp_path, partition='by = "csv"\nfile = "who.csv"\n')).found
    found = [f for f in checked.findings if f.code == "partition"]
    assert [(f.severity, f.site) for f in found] == [("note", "partition")]
    assert "x9" in found[0].text


def test_labels_that_a_part_does_not_keep_are_none_of_its(tmp_path: Path) -> None:
    """As `by = "labels"` makes them background."""
    source = open_dataset(whole(tmp_path / "all"))

    def of(first: str) -> Mapping[str, str]:
        return {c.name: c.patient for c in source.cases if c.name[0] == first}

    parts = {"a": Part(source, of("a"), ("cyst",), None), "b": Part(source, of("b"), ("tumour",), None)}
    checked = check({"all": tmp_path / "all"}, folds=2, divide=lambda: Layout(parts, ("a", "b"), ()))
    assert told(checked) == [("error", "no_foreground", "a", None)]


def test_two_held_out_sets_are_one_too_many(tmp_path: Path) -> None:
    folder = whole(tmp_path / "all")
    with pytest.raises(StudyError, match="of its own"):
        cc.check(study(tmp_path), test=folder)


def test_a_divided_data_set_is_mended_as_one(tmp_path: Path) -> None:
    folder = whole(tmp_path / "all")
    rewrite(folder, numTraining=50)
    assert [c.code for c in cc.check(study(tmp_path), fix=tmp_path / "out").found.changes] == ["case_count"]
    assert len(open_dataset(tmp_path / "out/partition").cases) == 13
