"""A study that divides one data set, against the same study on folders that were divided before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

from concilium.errors import DataError
from concilium.line import Event, run
from concilium.study import Study, parse_study, read_study

SITES = ("north", "south", "west")


@pytest.fixture(scope="module")
def pooled(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of the phantom's sites and of its test set in one folder, and a table that says whose it was."""
    folder = tmp_path_factory.mktemp("pooled")
    patient: dict[str, str] = {}
    hospital: dict[str, str] = {}
    for name in (*SITES, "test"):
        about = json.loads((phantom / name / "dataset.json").read_text())
        patient |= about["patient"]
        hospital |= dict.fromkeys(about["patient"], name)
        for kind in ("imagesTr", "labelsTr"):
            (folder / kind).mkdir(exist_ok=True)
            for file in (phantom / name / kind).iterdir():
                os.link(file, folder / kind / file.name)
    (folder / "dataset.json").write_text(json.dumps(about | {"patient": patient, "hospital": hospital}))
    return folder


@pytest.fixture(scope="module")
def divided_study(pooled: Path) -> Callable[..., Study]:
    def make(**tables: dict[str, object]) -> Study:
        raw = {
            "study": {"name": "small", "seed": 3},
            "partition": {"data": ".", "by": "key", "key": "hospital", "test": ["test"]},
            "sites": {name: {} for name in SITES},
            "protocol": {"rounds": 2, "steps": 2},
            "network": {"base_features": 4},
            "training": {"optimizer": "adamw", "batch_size": 2, "patch_size": [16, 16, 8], "mirror": False},
            "engine": {"threads": 1, "device": "cpu"},
        }
        return parse_study(raw | tables, folder=pooled)

    return make


def test_dividing_by_key_gives_the_bits_of_the_divided_data(
    small_study: Callable[..., Study], divided_study: Callable[..., Study], tmp_path: Path
) -> None:
    told: list[Event] = []
    runs = run(small_study(), tmp_path / "direct"), run(divided_study(), tmp_path / "divided", watch=told.append)
    a, b = (load_file(r.folder / "weights" / "federated.safetensors") for r in runs)
    assert all(equal(a[name], b[name]) for name in a)
    for file in ("plans.json", "fingerprint.json", "dataset.json"):
        assert (runs[0].folder / file).read_bytes() == (runs[1].folder / file).read_bytes()
    assert [r.exit_code for r in runs] == [0, 0]
    assert runs[0].results["cases"] == runs[1].results["cases"]
    assert "Writing north 6 cases of 5 patients, south 4 cases of 4 patients, west 3" in "".join(e.text for e in told)
    again = read_study(tmp_path / "divided" / "study.toml")
    assert again == divided_study()


def test_a_study_of_shifted_sites_goes_on_as_it_began(divided_study: Callable[..., Study], tmp_path: Path) -> None:
    """Dirichlet, a held-out share, and shifts that change the voxel grid: stopped after a round, and not stopped."""

    def shifted() -> Study:
        return divided_study(
            partition={"data": ".", "by": "dirichlet", "alpha": 1.0, "min_patients": 2, "test": 0.1},
            sites={
                "a": {"shift": {"gamma": 1.5, "noise": 0.1}},
                "b": {"shift": {"spacing": [1.5, 1.5, 2.0], "blur": 1.0}},
            },
        )

    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == 1:
            raise Stopped

    whole = run(shifted(), tmp_path / "whole")
    with pytest.raises(Stopped):
        run(shifted(), tmp_path / "again", watch=stop)
    again = run(shifted(), tmp_path / "again", resume=True)
    a, b = (load_file(r.folder / "weights" / "federated.safetensors") for r in (whole, again))
    assert all(equal(a[name], b[name]) for name in a)
    assert (tmp_path / "whole" / "partition.csv").read_bytes() == (tmp_path / "again" / "partition.csv").read_bytes()
    assert {c["site"] for c in again.results["cases"]} == {"a", "b", "test"}


def test_what_the_data_do_not_allow_leaves_no_run_behind(divided_study: Callable[..., Study], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="belong to no site"):
        run(divided_study(sites={"north": {}, "south": {}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
