"""Labels that were looked for at some sites, or in some cases, only: read, matched by name, drawn, and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from concilium.answers.evaluate import score_labels
from concilium.data._raw_folder import write_raw_folder
from concilium.data.dataset import content_key, open_dataset, read_case, translated
from concilium.data.labels import annotation_mask, unknown_ids
from concilium.data.matching import Names, Space, agree, annotation_notes
from concilium.errors import DataError
from concilium.messages import Labels, PlugIn
from concilium.results import SCALES, score_row
from concilium.statistics import summarize

LABELS: Labels = {"background": 0, "liver": 1, "kidney": 2}
REGIONS: Labels = {"background": 0, "whole": (1, 2), "core": 2}


def site(folder: Path, labels: dict[str, Any] | None = None, **more: Any) -> Path:
    """Three cases whose label maps hold ids 0, 1 and 2."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    label = np.arange(27).reshape(3, 3, 3) % 3
    for case in "abc":
        sitk.WriteImage(
            sitk.GetImageFromArray(label.astype(np.float32)), str(folder / "imagesTr" / f"{case}_0000.nii.gz")
        )
        sitk.WriteImage(sitk.GetImageFromArray(label.astype(np.uint8)), str(folder / "labelsTr" / f"{case}.nii.gz"))
    about = {"channel_names": {"0": "CT"}, "labels": labels or dict(LABELS), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about | more))
    return folder


def ids(folder: Path, names: Names | None = None, space: Space | None = None) -> dict[str, set[int]]:
    dataset = open_dataset(folder, names)
    dataset = translated(dataset, space) if space else dataset
    found = {case.name: read_case(case, dataset)[1] for case in dataset.cases}
    return {name: set(np.unique(label).astype(int).tolist()) for name, label in found.items() if label is not None}


def same(found: set[int]) -> dict[str, set[int]]:
    return dict.fromkeys("abc", found)


def test_what_nobody_looked_for_is_not_in_a_label_map(tmp_path: Path) -> None:
    """Whatever a label map says of it: an id that was not looked for is unknown, like the background around it."""
    assert ids(site(tmp_path / "all")) == same({0, 1, 2})
    assert ids(site(tmp_path / "site", annotated=["liver"])) == same({0, 1})
    by_case = {"a": ["kidney"], "b": [], "c": ["liver", "kidney"]}
    assert ids(site(tmp_path / "case", annotated=by_case)) == {"a": {0, 2}, "b": {0}, "c": {0, 1, 2}}
    assert ids(tmp_path / "all", Names(annotated=("kidney",))) == same({0, 2}), "the study may say it"
    assert ids(tmp_path / "site", Names(annotated=("kidney",))) == same({0, 2}), "and goes before the file"


def test_cases_say_what_was_looked_for_in_the_words_of_the_study(tmp_path: Path) -> None:
    folder = site(
        tmp_path, {"background": 0, "leber": 1, "kidney": 2}, annotated={"a": ["leber"], "b": ["leber", "kidney"]}
    )
    dataset = open_dataset(folder, Names(labels={"leber": "liver"}))
    assert [case.annotated for case in dataset.cases] == [("liver",), ("liver", "kidney"), None]
    assert dataset.space.annotated is None, "in some case everything was looked for"
    cases = translated(dataset, Space(("CT",), dict(LABELS))).cases
    assert [case.annotated for case in cases] == [("liver",), None, None], "all of the study's labels is all"
    assert open_dataset(site(tmp_path / "part", annotated=["liver"])).space.annotated == ("liver",)


def test_the_study_does_not_widen_what_the_file_says_of_a_case(tmp_path: Path) -> None:
    """What nobody looked for in a case stays unknown there, also where the study names more for the whole site."""
    folder = site(tmp_path / "some", annotated={"a": ["liver"], "b": []})
    both = Names(annotated=("liver", "kidney"))
    assert [case.annotated for case in open_dataset(folder, both).cases] == [("liver",), (), ("liver", "kidney")]
    assert ids(folder, both, Space(("CT",), dict(LABELS))) == {"a": {0, 1}, "b": {0}, "c": {0, 1, 2}}
    assert [case.annotated for case in open_dataset(folder, Names(annotated=("kidney",))).cases] == [
        (),
        (),
        ("kidney",),
    ]
    own = site(tmp_path / "own", {"background": 0, "leber": 1, "kidney": 2}, annotated={"a": ["leber"]})
    named = Names(labels={"leber": "liver"}, annotated=("liver",))
    assert open_dataset(own, named).cases[0].annotated == ("liver",)


def test_a_part_of_a_data_set_keeps_what_is_said_of_its_cases(tmp_path: Path) -> None:
    source = open_dataset(site(tmp_path / "all", annotated={"a": ["liver"]}))
    patients = {"a": "1", "b": "2"}
    write_raw_folder(tmp_path / "part", source, patients, annotated=("liver", "kidney"), shift=None, key=(0, "s"))
    assert [c.annotated for c in open_dataset(tmp_path / "part").cases] == [("liver",), ("liver", "kidney")]


def test_a_table_that_names_no_case_is_refused(tmp_path: Path) -> None:
    """Misspelt, its case would count as annotated in full."""
    folder = site(tmp_path, annotated={"a": ["liver"], "aa": ["liver"]})
    with pytest.raises(
        DataError, match=r"annotated names 1 cases that are not there: aa\. Allowed are the 3 cases .*Correct"
    ):
        open_dataset(folder)


def test_cases_that_a_table_leaves_out_are_counted(tmp_path: Path) -> None:
    folder = site(tmp_path, annotated={"a": ["liver"]})
    assert open_dataset(folder).left_out == 2
    assert open_dataset(folder, Names(annotated=("liver",))).left_out == 0, "the study says it of these"


def test_prepared_cases_depend_on_it(tmp_path: Path) -> None:
    folder = site(tmp_path)
    keys = {
        content_key(dataset.cases[0], dataset)
        for dataset in (
            open_dataset(folder, n) for n in (None, Names(annotated=("liver",)), Names(annotated=("kidney",)))
        )
    }
    assert len(keys) == 3


@pytest.mark.parametrize("given", ["liver", ["spleen"], {"a": "liver"}, {"a": ["background"]}, 3])
def test_wrong_words_are_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotated is .*list of labels \(liver, kidney\)"):
        open_dataset(site(tmp_path, annotated=given))


def test_sites_that_know_their_own_labels_only_make_one_space() -> None:
    told = {
        "a": Space(("CT",), {"background": 0, "liver": 1}, ("liver",)),
        "b": Space(("CT",), {"background": 0, "kidney": 1, "ignore": 2}, ("kidney",)),
        "c": Space(("CT",), dict(LABELS), None),
    }
    study, how = agree(told)
    assert study.labels == {"background": 0, "liver": 1, "kidney": 2, "ignore": 3}
    assert dict(how["b"].ids) == {0: 0, 1: 2, 2: 3}
    assert dict(how["a"].ids) == {0: 0, 1: 1}


def test_a_site_that_looked_for_everything_must_know_everything() -> None:
    told = {"a": Space(("CT",), dict(LABELS), None), "b": Space(("CT",), {"background": 0, "liver": 1}, None)}
    with pytest.raises(DataError, match='list what was looked for: "annotated"') as error:
        agree(told)
    assert error.value.code == "sites_differ"
    told["b"] = Space(("CT",), {"background": 0, "liver": 1}, ("liver", "spleen"))
    with pytest.raises(DataError, match="b says that spleen is annotated there"):
        agree(told)


def test_every_label_is_looked_for_somewhere() -> None:
    assert annotation_notes(LABELS, {"a": None, "b": ("liver",)}) == [
        "b annotates liver only: other labels are unknown there, not background."
    ]
    assert annotation_notes(LABELS, {"a": None, "b": ("kidney", "liver")}) == []
    with pytest.raises(DataError, match="No site annotates kidney"):
        annotation_notes(LABELS, {"a": ("liver",), "b": ("liver",)})


def test_masks_are_by_channel_of_the_logits() -> None:
    assert annotation_mask(LABELS, ["kidney"]) == (True, False, True)
    assert annotation_mask(LABELS, []) == (False, False, False)
    assert annotation_mask(REGIONS, ["core"]) == (False, True)
    assert annotation_mask({**LABELS, "ignore": 3}, ["liver", "kidney"]) == (True, True, True)
    assert unknown_ids(LABELS, ["kidney"]) == (1,)
    assert unknown_ids(REGIONS, ["whole"]) == (), "an id of a region that was looked for stays"
    assert unknown_ids(REGIONS, ["core"]) == (1,)


def test_only_what_was_looked_for_is_scored() -> None:
    reference = np.zeros((4, 4, 4))
    prediction = reference.copy()
    reference[:2], prediction[1:3], prediction[3] = 1, 1, 2
    metrics = (PlugIn("dice"), PlugIn("hd95"))
    scores = score_labels(
        prediction, reference, (1.0, 1.0, 1.0), LABELS, metrics, case=0, patient=0, annotated=("liver",)
    )
    liver, kidney = scores
    assert liver.values["dice"] == 0.5
    assert (kidney.status, kidney.values) == ("not_annotated", {"dice": None, "hd95": None})
    about = {"model": "m", "subset": "test", "site": "test", "case": "x", "patient": "p"}
    summary = summarize([about | score_row(s) for s in scores], SCALES)
    means = {row["label"]: (row["mean"], row["n"], row["n_undefined"]) for row in summary if row["metric"] == "dice"}
    assert means == {"liver": (0.5, 1, 0)}, "it is neither a 0 nor undefined"
