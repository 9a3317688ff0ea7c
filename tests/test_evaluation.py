"""`concilium evaluate`: label maps in folders, scored with the code that scores a run."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from concilium import cli
from concilium.errors import DataError
from concilium.evaluation import evaluate, mean_table, write_evaluation

SPACING = (1.0, 2.0, 4.0)  # along x, y, z of the file; arrays have them the other way round
Save = Callable[..., None]


def boxes(*found: tuple[int, tuple[slice, ...]], shape: tuple[int, ...] = (8, 10, 12)) -> NDArray[np.uint8]:
    label_map = np.zeros(shape, np.uint8)
    for value, where in found:
        label_map[where] = value
    return label_map


ORGAN = (slice(2, 6), slice(2, 6), slice(2, 6))
SHIFTED = (slice(2, 6), slice(2, 6), slice(3, 7))
TUMOUR = (slice(6, 8), slice(8, 10), slice(8, 12))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("p", "r"):
        (tmp_path / name).mkdir()
    return tmp_path / "p", tmp_path / "r"


def save(path: Path, label_map: NDArray[Any], *, spacing: tuple[float, ...] = SPACING, origin: float = 0.0) -> None:
    image = sitk.GetImageFromArray(label_map)
    if label_map.ndim == 3:
        image.SetSpacing(spacing)
        image.SetOrigin((origin, 0.0, 0.0))
    sitk.WriteImage(image, str(path))


def describe(folder: Path, labels: dict[str, Any], ending: str = ".nii.gz", **more: Any) -> Path:
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ending, **more}))
    return folder / "dataset.json"


def test_scores_by_hand(folders: tuple[Path, Path]) -> None:
    """A cube of 4 moved by 1 voxel of 1 mm: 48 of 64 voxels of 8 mm3 overlap; a tumour that is missed, and one made up."""
    p, r = folders
    describe(r, {"background": 0, "organ": 1, "tumour": 2}, patient={"one": "anna", "two": "anna"})
    save(p / "one.nii.gz", boxes((1, SHIFTED)))
    save(r / "one.nii.gz", boxes((1, ORGAN), (2, TUMOUR)))
    save(p / "two.nii.gz", boxes((1, ORGAN), (2, TUMOUR)))
    save(r / "two.nii.gz", boxes((1, ORGAN)))
    found = evaluate(p, r)
    rows = {(row["case"], row["label"]): row for row in found.cases}
    organ = rows["one", "organ"]
    assert organ["dice"] == 0.75
    assert organ["iou"] == 0.6
    assert organ["hd95"] == 1.0
    assert organ["nsd"] == 1.0
    assert (organ["status"], organ["unit"], organ["patient"]) == ("ok", "mm", "anna")
    assert organ["reference_volume"] == organ["prediction_volume"] == pytest.approx(64 * 8 / 1000)
    assert [organ[f"lesions_{word}"] for word in ("found", "missed", "false")] == [1, 0, 0]
    missed, made_up = rows["one", "tumour"], rows["two", "tumour"]
    assert (missed["status"], missed["dice"], missed["hd95"], missed["lesions_missed"]) == (
        "empty_prediction",
        0.0,
        None,
        1,
    )
    assert (made_up["status"], made_up["nsd"], made_up["lesions_false"]) == ("empty_reference", 0.0, 1)
    (dice,) = [s for s in found.summary if (s["label"], s["metric"]) == ("organ", "dice")]
    assert (dice["mean"], dice["n"], dice["n_cases"]) == (0.875, 1, 2)  # one patient
    assert found.problems == found.warnings == ()
    assert mean_table(found)[0][3] == "HD95 [mm]"
    assert mean_table(found)[1:] == [
        ("organ", "0.875", "0.800", "0.500", "1.000", "2", "0", "2", "0", "0"),
        ("tumour", "0.000", "0.000", "–", "0.000", "2", "2", "0", "1", "1"),
        ("foreground_mean", "0.438", "0.400", "0.500", "0.500", "2", "2", "2", "1", "1"),
    ]
    strict = evaluate(p, r, tolerance=0.5).cases[0]["nsd"]
    assert strict < 1.0


def test_regions_and_ignored_voxels(folders: tuple[Path, Path]) -> None:
    p, r = folders
    about = describe(p.parent, {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    save(p / "one.nii.gz", boxes((1, ORGAN), (1, TUMOUR)))
    save(r / "one.nii.gz", boxes((2, ORGAN), (3, TUMOUR)))
    rows = {row["label"]: row for row in evaluate(p, r, labels=about).cases}
    assert set(rows) == {"whole", "core"}
    assert (rows["whole"]["dice"], rows["whole"]["hd95"], rows["whole"]["lesions_false"]) == (1.0, 0.0, 0)
    assert (rows["core"]["status"], rows["core"]["dice"]) == ("empty_prediction", 0.0)


def test_without_a_dataset_json_every_id_is_a_label(folders: tuple[Path, Path]) -> None:
    p, r = folders
    save(p / "one.mha", boxes((7, ORGAN), (9, TUMOUR)))
    save(r / "one.mha", boxes((7, ORGAN)))
    assert [(row["label"], row["status"]) for row in evaluate(p, r).cases] == [("7", "ok"), ("9", "empty_reference")]


def test_images_without_spacing_are_in_pixels(folders: tuple[Path, Path]) -> None:
    p, r = folders
    save(p / "one.png", boxes((1, SHIFTED[1:]), shape=(10, 12)))
    save(r / "one.png", boxes((1, ORGAN[1:]), shape=(10, 12)))
    (row,) = evaluate(p, r).cases
    assert (row["unit"], row["hd95"], row["reference_volume"]) == ("px", 1.0, 16.0)


def test_cases_that_cannot_be_scored_are_told_one_by_one(folders: tuple[Path, Path]) -> None:
    p, r = folders
    describe(p, {"background": 0, "organ": 1})
    good = boxes((1, ORGAN))
    for name in ("good", "shape", "unnamed", "broken", "fraction", "only_p", "moved"):
        save(p / f"{name}.nii.gz", good)
    for name in ("good", "only_r"):
        save(r / f"{name}.nii.gz", good)
    save(r / "shape.nii.gz", good[:-1])
    save(r / "unnamed.nii.gz", boxes((1, ORGAN), (4, TUMOUR)))
    save(r / "fraction.nii.gz", good * np.float32(0.5))
    save(r / "moved.nii.gz", good, origin=3.0)
    (r / "broken.nii.gz").write_bytes((p / "good.nii.gz").read_bytes()[:60])
    found = evaluate(p, r)
    problems = dict(found.problems)
    assert list(problems) == ["broken", "fraction", "only_p", "only_r", "shape", "unnamed"]
    for case, words in {
        "broken": "cannot be read", "fraction": "whole numbers", "only_p": f"{r} has no label map", "unnamed": "hold [4]",
        "only_r": f"{p} has no label map", "shape": "(8, 10, 12) voxels, the reference (7, 10, 12)",
    }.items():  # fmt: skip
        assert words in problems[case]
    assert [row["case"] for row in found.cases] == ["good", "moved"]
    assert [(case, "differ in origin" in text) for case, text in found.warnings] == [("moved", True)]


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ("{", "cannot be used"),
        ('{"labels": 5}', "cannot be used"),
        ('{"labels": {"a": "1"}}', "label a is '1'"),
        ('{"labels": {"a": []}}', r"label a is \(\)"),
        ('{"labels": {"a": 1, "ignore": [2]}}', "ignore"),
        ('{"labels": {"a": 1}, "file_ending": ".jpg"}', "'.jpg'"),
        ('{"labels": {"a": 1}, "file_ending": ".mha"}', "no case in common"),
    ],
)
def test_a_wrong_dataset_json_is_refused(about: str, words: str, folders: tuple[Path, Path]) -> None:
    p, r = folders
    save(r / "one.nii.gz", boxes((1, ORGAN)))
    (p / "dataset.json").write_text(about)
    with pytest.raises(DataError, match=words):
        evaluate(p, r)


def test_folders_without_maps_are_refused(folders: tuple[Path, Path]) -> None:
    p, r = folders
    with pytest.raises(DataError, match="holds no label map"):
        evaluate(p, r)
    save(r / "one.nii.gz", boxes((1, ORGAN)))
    with pytest.raises(DataError, match="no case in common"):
        evaluate(p, r)
    with pytest.raises(DataError, match="is no folder"):
        evaluate(p / "none", r)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["concilium", "evaluate", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert isinstance(e.value.code, int)
    return e.value.code


def test_the_command(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    p, r = folders
    save(p / "one.nii.gz", boxes((1, SHIFTED)))
    save(r / "one.nii.gz", boxes((1, ORGAN)))
    out = tmp_path / "new" / "scores.json"
    assert command(monkeypatch, "-p", str(p), "-r", str(r), "--out", str(out)) == 0
    shown = capsys.readouterr()
    assert "0.750" in shown.out
    assert "[mm]" in shown.out, "what stands in brackets is no markup"  # in a narrow terminal on a line of its own
    said = json.loads(out.read_text())
    assert set(said) == {"cases", "summary", "problems", "warnings"}
    assert said["cases"][0]["dice"] == 0.75
    save(r / "two.nii.gz", boxes((1, ORGAN)))
    table = tmp_path / "scores.csv"
    assert command(monkeypatch, "-p", str(p), "-r", str(r), "--out", str(table)) == 4
    assert f"Not scored: two: {p} has no label map of this case." in capsys.readouterr().err
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert (row["case"], row["label"], float(row["dice"])) == ("one", "1", 0.75)
    assert command(monkeypatch, "-p", str(p / "none"), "-r", str(r)) == 3


def test_nothing_scored_is_written_too(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    p, r = folders
    save(p / "one.nii.gz", boxes((1, ORGAN)))
    save(r / "one.nii.gz", boxes((1, ORGAN), shape=(9, 10, 12)))
    found = evaluate(p, r)
    assert found.cases == ()
    for name in ("a.csv", "a.json"):
        write_evaluation(found, tmp_path / name)
    assert len(mean_table(found)) == 1
