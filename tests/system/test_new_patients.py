"""New patients of all parties of a vertical study: segmented by all together, as one place with all channels would."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from concilium.answers import Policy
from concilium.answers.new_patients import new_entries
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.errors import ContractError, StudyError
from concilium.line import Event, run
from concilium.predict import predict
from concilium.site import Site
from concilium.study import Study, parse_study, to_toml

KEY = "vertical"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_sequences(tmp_path / "data", n_cases=4, n_test=3, size=16)
    return tmp_path / "data"


def study_on(data: Path, **protocol: Any) -> Study:
    raw = {
        "study": {"name": "newcomers", "seed": 3},
        "sites": {name: {"data": str(data / name), "holds": [name]} for name in SEQUENCES},
        "protocol": {"name": "vertical", "labels": "first", "cut": "shallow", "rounds": 1, "steps": 2, "new_patients": True}
        | protocol,
        "network": {"name": "unet", "base_features": 4, "levels": 2},
        "training": {"optimizer": "adamw", "batch_size": 2, "patch_size": [8, 16, 16]},
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }  # fmt: skip
    return parse_study(raw, folder=data)


def arrives(data: Path, number: int, sites: tuple[str, ...] = SEQUENCES) -> str:
    """A patient of the test set comes to these sites as one that is new there; its name."""
    path = sorted((data / "test/imagesTr").glob("*_0000.nii.gz"))[number]
    name = path.name.removesuffix("_0000.nii.gz")
    for site in sites:
        (data / site / "imagesTs").mkdir(exist_ok=True)
        channel = SEQUENCES.index(site)
        shutil.copyfile(path.with_name(f"{name}_{channel:04d}.nii.gz"), data / site / f"imagesTs/{name}_0000.nii.gz")
    return name


def label_maps(folder: Path) -> dict[str, Any]:
    maps = {p.name.removesuffix(".nii.gz"): sitk.ReadImage(str(p)) for p in sorted(folder.glob("*.nii.gz"))}
    return {name: (sitk.GetArrayFromImage(m), m.GetSpacing(), m.GetOrigin()) for name, m in maps.items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, (array, *geometry) in expected.items():
        assert np.array_equal(found[name][0], array)
        assert list(found[name][1:]) == geometry


def test_all_parties_segment_a_new_patient_as_one_place_does(data: Path, tmp_path: Path) -> None:
    first, second = arrives(data, 0), arrives(data, 1)
    arrives(data, 2, ("first", "third"))  # of whom the second institute has nothing
    (data / "first/imagesTs/broken_0000.nii.gz").write_bytes(b"no image")
    out = run(study_on(data), tmp_path / "run")
    assert (out.exit_code, out.results["problems"]) == (0, [])
    found = label_maps(tmp_path / f"run/sites/first/segmented/{KEY}")
    assert set(found) == {first, second}
    assert max(array.max() for array, *_ in found.values()) > 0
    assert not (tmp_path / "run/sites/second/segmented").exists()
    predict(tmp_path / "run", data / "test/imagesTr", tmp_path / "predicted")
    assert_same(found, {name: m for name, m in label_maps(tmp_path / "predicted").items() if name in found})
    told = json.loads((tmp_path / f"run/new_patients/{KEY}.json").read_text())
    assert told == {"model": KEY, "site": "first", "folder": f"segmented/{KEY}", "cases": 2, "left_out": 0}
    noted = json.loads((tmp_path / "run/sites/first/aligned_new.json").read_text())
    assert sorted(noted["cases"]) == sorted((first, second))
    assert len(noted["left_out"]) == 2
    assert any(text.endswith("another party has no such case.") for text in noted["left_out"].values())
    assert "broken" in noted["left_out"]["first/broken"], "what could not be read is said too"


def test_a_finished_run_segments_whoever_has_come_since(data: Path, tmp_path: Path) -> None:
    before = run(study_on(data, body="labels"), tmp_path / "run")  # nobody is new, and no folder there
    assert before.exit_code == 0
    assert json.loads((tmp_path / f"run/new_patients/{KEY}.json").read_text())["cases"] == 0
    weights = (tmp_path / f"run/weights/{KEY}.safetensors").read_bytes()
    name = arrives(data, 2)
    stages: list[str] = []

    def watch(event: Event) -> None:
        stages.append(event.text)

    after = run(study_on(data, body="labels"), tmp_path / "run", resume=True, watch=watch)
    assert after.exit_code == 0
    assert (tmp_path / f"run/weights/{KEY}.safetensors").read_bytes() == weights
    assert f"{KEY}, new patients: segmenting 1 cases, whose label maps go to first" in stages
    predict(tmp_path / "run", data / "test/imagesTr", tmp_path / "predicted")
    assert_same(
        label_maps(tmp_path / f"run/sites/first/segmented/{KEY}"), {name: label_maps(tmp_path / "predicted")[name]}
    )


def test_one_who_lies_elsewhere_in_space_is_left_out(data: Path, tmp_path: Path) -> None:
    names = [arrives(data, 0), arrives(data, 1)]
    moved = data / f"third/imagesTs/{names[0]}_0000.nii.gz"
    image = sitk.ReadImage(str(moved))
    image.SetOrigin([v + 5 for v in image.GetOrigin()])
    sitk.WriteImage(image, str(moved))
    out = run(study_on(data), tmp_path / "run")
    assert out.exit_code == 0
    assert any("1 cases lie elsewhere in space" in w for w in out.results["warnings"])
    assert set(label_maps(tmp_path / f"run/sites/first/segmented/{KEY}")) == {names[1]}


@pytest.mark.parametrize("site", ["first", "third"])
def test_a_site_that_does_not_allow_it_sends_nothing_of_new_patients(
    site: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other sites had answered by then is not taken for answers about the next model."""
    arrives(data, 0)
    begin = Site.__init__

    def closed(self: Site, settings: Any, **given: Any) -> None:
        allowed = Policy(new_patients=settings.name != site)
        begin(self, replace(settings, policy=allowed), **given)

    monkeypatch.setattr(Site, "__init__", closed)
    study = study_on(data)
    out = run(replace(study, study=replace(study.study, seeds=2)), tmp_path / "run")
    assert out.exit_code == 4
    assert all("new patients" in p and "new_patients" in p and site in p for p in out.results["problems"])
    assert len(out.results["problems"]) == 2 == len(out.results["models"])
    assert not list((tmp_path / "run/sites").rglob("segmented"))
    assert {c["subset"] for c in out.results["cases"]} == {"validation"}, "the trained model is scored all the same"


def without(data: Path, run_at: Path, out: Path, name: str, missing: tuple[str, ...], holders: tuple[str, ...]) -> Any:
    """The label map that one place makes of this patient without the channels of some sites; their files are not there."""
    images = out / "images"
    images.mkdir(parents=True)
    for place, site in enumerate(holders):
        if site not in missing:
            channel = SEQUENCES.index(site)
            shutil.copyfile(data / f"test/imagesTr/{name}_{channel:04d}.nii.gz", images / f"{name}_{place:04d}.nii.gz")
    predict(run_at, images, out / "maps", missing=missing)
    return label_maps(out / "maps")[name]


@pytest.mark.parametrize(
    ("holders", "options"),
    [
        (SEQUENCES, {}),
        (SEQUENCES, {"body": "labels", "fuse": "mean"}),
        (SEQUENCES[1:], {"fuse": "max"}),  # whoever has the labels holds no channel
    ],
)
def test_patients_whom_a_party_lacks_are_segmented_as_without_its_channels(
    holders: tuple[str, ...], options: dict[str, str], data: Path, tmp_path: Path
) -> None:
    every, lacks, alone = arrives(data, 0), arrives(data, 1, ("first", "third")), arrives(data, 2, ("first",))
    study = study_on(data, incomplete=True, drop=0.3, **options)
    (data / "second/imagesTs/nobody_0000.nii.gz").write_bytes(
        (data / f"second/imagesTs/{every}_0000.nii.gz").read_bytes()
    )
    if holders != SEQUENCES:
        raw = tomllib.loads(to_toml(study))
        raw["sites"]["first"]["holds"] = []
        raw["network"] = {"name": "unet", "base_features": 4, "levels": 2}
        study = parse_study(raw, folder=data)
    out = run(study, tmp_path / "run")
    assert (out.exit_code, out.results["problems"]) == (0, [])
    assert not any("never learns to do without" in w for w in out.results["warnings"])
    absent = {every: (), lacks: ("second",)} | ({alone: ("second", "third")} if holders == SEQUENCES else {})
    expected = {
        name: without(data, tmp_path / "run", tmp_path / name, name, missing, holders)
        for name, missing in absent.items()
    }
    found = label_maps(tmp_path / f"run/sites/first/segmented/{KEY}")
    assert_same(found, expected)
    assert len({array.tobytes() for array, *_ in found.values()}) == len(found)
    told = json.loads((tmp_path / f"run/new_patients/{KEY}.json").read_text())
    assert told["without"] == {" ".join(missing): 1 for missing in absent.values()}
    noted = json.loads((tmp_path / "run/sites/first/aligned_new.json").read_text())
    mine = {name: list(missing) for name, missing in absent.items() if missing}
    assert noted["without"] == {"vertical": mine}
    elsewhere = json.loads((tmp_path / "run/sites/second/aligned_new.json").read_text())
    assert elsewhere["cases"] == [every]
    assert list(elsewhere["left_out"]) == ["second/nobody"]


def test_of_patients_whom_a_party_lacks_the_others_must_lie_alike(data: Path, tmp_path: Path) -> None:
    name = arrives(data, 0, ("first", "third"))
    moved = data / f"third/imagesTs/{name}_0000.nii.gz"
    image = sitk.ReadImage(str(moved))
    image.SetOrigin([v + 5 for v in image.GetOrigin()])
    sitk.WriteImage(image, str(moved))
    out = run(study_on(data, incomplete=True), tmp_path / "run")
    assert out.exit_code == 0
    assert any("1 cases lie elsewhere in space" in w for w in out.results["warnings"])
    assert any("drop = 0: the network never learns to do without" in w for w in out.results["warnings"])
    assert not list((tmp_path / "run/sites").rglob("segmented"))


def test_incomplete_says_which_new_patients(data: Path) -> None:
    with pytest.raises(StudyError, match="incomplete = true is not allowed without new_patients = true"):
        study_on(data, new_patients=False, incomplete=True)


def test_new_patients_that_were_not_aligned_are_not_there(data: Path, tmp_path: Path) -> None:
    name = arrives(data, 0)
    run(study_on(data), tmp_path / "run")
    folder = tmp_path / "run/sites/first"
    settings: Any = type("S", (), {"folder": folder, "data": {"first": data / "first"}, "names": {}, "name": "first"})()
    assert [e.case.name for e in new_entries(settings)] == [name]
    (data / f"first/imagesTs/{name}_0000.nii.gz").unlink()
    with pytest.raises(ContractError, match="not aligned, or are gone"):
        new_entries(settings)
