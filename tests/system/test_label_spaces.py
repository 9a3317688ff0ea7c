"""Runs of sites that number and order otherwise, with regions, with voxels to ignore, and at low resolution."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from safetensors.numpy import load_file

from concilium.data.phantom import DEFAULT_SITES, write_phantom
from concilium.errors import DataError, StudyError
from concilium.line import Outcome, run
from concilium.metrics import Pair
from concilium.metrics.dice import metric as dice
from concilium.predict import predict
from concilium.study import Study

Make = Callable[..., Study]
SITES = ("north", "south")


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def write(array: np.ndarray, path: Path, like: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(sitk.ReadImage(str(like)))
    sitk.WriteImage(image, str(path))


def rewrite(site: Path, **changes: Any) -> None:
    path = site / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def renumber(site: Path, ids: Mapping[int, int]) -> None:
    """Other ids in the label maps."""
    table = np.array([ids.get(i, i) for i in range(10)], np.uint8)
    for path in (site / "labelsTr").iterdir():
        write(table[voxels(path)], path, path)


def swap_channels(site: Path) -> None:
    for first in (site / "imagesTr").glob("*_0000.*"):
        second = first.with_name(first.name.replace("_0000", "_0001"))
        aside = first.with_name("aside")
        first.rename(aside)
        second.rename(first)
        aside.rename(second)


@pytest.fixture(scope="module")
def two_channels(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites and the test set of the phantom, with a second channel."""
    folder = tmp_path_factory.mktemp("two")
    for name in (*SITES, "test"):
        shutil.copytree(phantom / name, folder / name)
        rewrite(folder / name, channel_names={"0": "T1", "1": "T2"})
        for path in list((folder / name / "imagesTr").iterdir()):
            image = voxels(path)
            write(image.max() - image**2 // 100, path.with_name(path.name.replace("_0000", "_0001")), path)
    return folder


def weights(outcome: Outcome, model: str = "federated") -> dict[str, np.ndarray]:
    return load_file(outcome.folder / "weights" / f"{model}.safetensors")


def scores(outcome: Outcome) -> list[dict[str, Any]]:
    """Without what differs from run to run."""
    cases: list[dict[str, Any]] = outcome.results["cases"]
    return cases


def same_run(a: Outcome, b: Outcome, models: tuple[str, ...] = ("federated",)) -> bool:
    for model in models:
        x, y = weights(a, model), weights(b, model)
        if x.keys() != y.keys() or not all(np.array_equal(x[k], y[k]) for k in x):
            return False
    return scores(a) == scores(b)


@pytest.mark.slow
def test_sites_that_number_and_order_otherwise_change_nothing(
    small_study: Make, two_channels: Path, tmp_path: Path
) -> None:
    """South has its ids and channels the other way round, in words of its own; so has the test set, in the study's words."""
    other = tmp_path / "other"
    shutil.copytree(two_channels, other)
    for name, labels, channels in (
        ("south", {"background": 0, "tumour": 1, "organ": 2}, {"0": "T2w", "1": "T1"}),
        ("test", {"background": 0, "lesion": 1, "organ": 2}, {"0": "T2", "1": "T1"}),
    ):
        renumber(other / name, {1: 2, 2: 1})
        swap_channels(other / name)
        rewrite(other / name, labels=labels, channel_names=channels)

    def study(data: Path, **south: Any) -> Study:
        sites = {name: {"data": str(data / name)} for name in SITES}
        changes = {f"sites__{name}": table for name, table in sites.items()}
        changes["sites__south"] |= south
        return small_study(
            sites=SITES, test=False, test__data=str(data / "test"), protocol__compare=["centralized"], **changes
        )

    models = ("federated", "centralized")
    one = run(study(two_channels), tmp_path / "one")
    words: dict[str, Any] = {"labels": {"tumour": "lesion"}, "channels": {"T2w": "T2"}}
    two = run(study(other, **words), tmp_path / "two")
    assert same_run(one, two, models)
    assert one.exit_code == two.exit_code == 0
    notes = [w for w in two.results["warnings"] if w not in one.results["warnings"]]
    assert notes == [
        f"{site}: {note}"
        for site in ("south", "test")
        for note in (
            "Label ids differ from the study's: re-mapped by name.",
            "The order of the channels differs from the study's: re-ordered by name.",
        )
    ]
    assert (one.folder / "plans.json").read_text() == (two.folder / "plans.json").read_text()
    assert json.loads((two.folder / "dataset.json").read_text())["labels"] == {"background": 0, "organ": 1, "lesion": 2}

    del words["labels"]
    with pytest.raises(DataError, match=r'south has labels background, tumour, organ\..*"tumour" = "lesion"'):
        run(study(other, **words), tmp_path / "three")


def test_regions_are_trained_scored_and_written(small_study: Make, phantom: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in (*SITES, "test"):
        shutil.copytree(phantom / name, data / name)
        rewrite(data / name, labels={"background": 0, "whole": [1, 2], "lesion": 2}, regions_class_order=[1, 2])
    changes = {"protocol__steps": 8, "test__data": str(data / "test")}
    outcome = run(small_study(sites=SITES, data=data, test=False, **changes), tmp_path / "run")
    assert outcome.exit_code == 0
    about = json.loads((outcome.folder / "dataset.json").read_text())
    assert (about["labels"], about["regions_class_order"]) == ({"background": 0, "whole": [1, 2], "lesion": 2}, [1, 2])
    heads = [w for name, w in weights(outcome).items() if name.startswith("head0") and name.endswith("weight")]
    assert [w.shape[0] for w in heads] == [2]

    assert predict(outcome.folder, data / "test" / "imagesTr", tmp_path / "out") == []
    scored = {(c["case"], c["label"]): c["dice"] for c in outcome.results["cases"] if c["subset"] == "test"}
    assert {label for _, label in scored} == {"whole", "lesion"}
    for (case, label), value in scored.items():
        ids = {"whole": [1, 2], "lesion": [2]}[label]
        a, b = (np.isin(voxels(d / f"{case}.nii.gz"), ids) for d in (tmp_path / "out", data / "test" / "labelsTr"))
        assert dice(Pair(a, b, None)) == value
    assert any(0 < value < 1 for value in scored.values())


def test_voxels_to_be_ignored_are_not_scored(small_study: Make, phantom: Path, tmp_path: Path) -> None:
    """At one site half of each volume is to be ignored; the other one knows nothing of it, and need not."""
    data = tmp_path / "data"
    for name in SITES:
        shutil.copytree(phantom / name, data / name)
    rewrite(data / "south", labels={"background": 0, "organ": 1, "lesion": 2, "ignore": 3})
    for path in (data / "south" / "labelsTr").iterdir():
        label = voxels(path)
        label[: len(label) // 2] = 3
        write(label, path, path)
    outcome = run(small_study(sites=SITES, data=data, test=False, protocol__steps=8), tmp_path / "run")
    about = json.loads((outcome.folder / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}
    predict(outcome.folder, data / "south" / "imagesTr", tmp_path / "out")
    scored = [c for c in outcome.results["cases"] if c["site"] == "south"]
    assert {c["label"] for c in scored} == {"organ", "lesion"}
    lower = []
    for c in scored:
        reference, predicted = (
            voxels(f / f"{c['case']}.nii.gz") for f in (data / "south" / "labelsTr", tmp_path / "out")
        )
        a, b, counts = (
            predicted == about["labels"][c["label"]],
            reference == about["labels"][c["label"]],
            reference != 3,
        )
        assert dice(Pair(a & counts, b, None)) == c["dice"]
        lower.append(bool((a & ~counts).any()))
        assert 3 not in predicted
    assert any(lower), "nothing was predicted where voxels are to be ignored: the test sees nothing"


@pytest.mark.slow
def test_low_resolution_is_trained_and_predicted(small_study: Make, tmp_path: Path) -> None:
    """Volumes of about 80 x 80 x 56 voxels, for a GPU of 20 MB."""
    write_phantom(tmp_path / "data", sites=[replace(DEFAULT_SITES[0], n_cases=3)], n_test=1, scale=2.0)
    small = {"training__patch_size": None, "training__batch_size": 2, "protocol__rounds": 1, "protocol__steps": 1}
    study = small_study(
        sites=(DEFAULT_SITES[0].name,), data=tmp_path / "data", test=False, plan__configuration="3d_lowres",
        plan__memory_gb=0.02, network__base_features=8, **small,
    )  # fmt: skip
    outcome = run(study, tmp_path / "run")
    plans = json.loads((outcome.folder / "plans.json").read_text())["configurations"]
    assert np.prod(plans["3d_lowres"]["spacing"]) > 2 * np.prod(plans["3d_fullres"]["spacing"])
    assert outcome.exit_code == 0
    assert {c["status"] for c in outcome.results["cases"]} <= {"ok", "empty_prediction"}
    test = tmp_path / "data" / "test"
    assert predict(outcome.folder, test / "imagesTr", tmp_path / "out") == []
    for path in (test / "labelsTr").iterdir():
        assert voxels(tmp_path / "out" / path.name).shape == voxels(path).shape


def test_low_resolution_that_is_not_planned_is_refused_with_the_reason(small_study: Make, tmp_path: Path) -> None:
    study = small_study(sites=("south",), plan__configuration="3d_lowres", training__patch_size=None)
    with pytest.raises(StudyError, match=r"3d_lowres.*not exist for these data: a patch of 3d_fullres already covers"):
        run(study, tmp_path / "run")
