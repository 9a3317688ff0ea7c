"""`concilium plan` on phantoms: what it tells of sites that differ, its files, and that it plans as a run does."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

import concilium as cc
from concilium import cli
from concilium.data.phantom import PhantomSite, write_phantom
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.errors import StudyError

Command = Callable[..., tuple[int, str, str]]
SITES = (
    PhantomSite("south", 12),
    PhantomSite("north", 10, spacing=(1.0, 1.0, 5.0)),
    PhantomSite("fine", 10, spacing=(0.5, 0.5, 0.6)),
    PhantomSite("few", 2, spacing=(4.0, 1.0, 1.0)),
)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites whose scanners differ: slices of 5 mm, small voxels, and two cases that are thick along another axis."""
    folder = tmp_path_factory.mktemp("uneven")
    write_phantom(folder, sites=SITES, n_test=1, scale=0.5)
    return folder


def study(folder: Path, *sites: str, **tables: Any) -> dict[str, Any]:
    return {
        "study": {"name": "uneven"},
        "sites": {name: {"data": str(folder / name)} for name in sites},
        "protocol": {"rounds": 1, "steps": 1},
        "network": {"base_features": 4},
        "engine": {"threads": 1},
    } | tables


@pytest.fixture(scope="module")
def planned(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[cc.Plan, Path]:
    """What is found of all of them, and the folder that it is kept in."""
    out = tmp_path_factory.mktemp("kept") / "plans"
    return cc.plan(study(uneven, *[s.name for s in SITES]), out=out), out


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command(...)`: exit code of `concilium plan ...`, what is on stdout, what is on stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["concilium", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as e:
            cli.main()
        shown = capsys.readouterr()
        return int(e.value.code or 0), shown.out, " ".join(shown.err.split())

    return run


def test_each_site_is_seen_beside_the_joint_plan(planned: tuple[cc.Plan, Path]) -> None:
    found, _ = planned
    sites = found.sites
    assert list(sites.index) == [s.name for s in SITES]
    assert sites["n_cases"].to_dict() == {s.name: s.n_cases for s in SITES}
    assert found.axes == ("z", "y", "x")
    for site in SITES:
        assert sites.loc[site.name, "spacing"] == pytest.approx(site.spacing[::-1], rel=1e-3)
    joint = found.found.joint.spacing
    assert joint == pytest.approx((1.5, 1.0, 1.0), rel=1e-3)
    assert sites.loc["north", "factor"] == pytest.approx((5 / 1.5, 1, 1), rel=0.01)
    assert sites.loc["north", "voxels"] == pytest.approx(5 / 1.5, rel=0.01)
    assert sites.loc["fine", "voxels"] == pytest.approx(0.6 / 1.5 / 4, rel=0.01)
    assert sites.loc["north", "anisotropy"] == pytest.approx(5, rel=1e-3)


def test_what_is_odd_has_its_ground_and_what_is_small_is_left_out(planned: tuple[cc.Plan, Path]) -> None:
    found, _ = planned
    assert found.suits == "asymmetric"
    assert found.found.advice.sites == ("north", "fine")
    grounds = found.grounds
    assert {"spacing", "kernels"} <= set(grounds[grounds["site"] == "north"]["kind"])
    assert set(grounds["site"]) == {"north", "fine", "few"}
    assert "north: its spacing along z is 5 mm, the joint plan's 1.5 mm" in found.text
    assert any(note.startswith("few has 2 cases") for note in found.found.advice.notes)
    assert any("few take the axes in another order" in note for note in found.found.advice.notes)


@pytest.mark.slow
def test_the_joint_plan_is_the_one_of_a_run_and_a_sites_own_that_of_a_run_of_it_alone(
    planned: tuple[cc.Plan, Path], uneven: Path, tmp_path: Path
) -> None:
    _, out = planned
    names = [s.name for s in SITES]
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        "plans.json", "fingerprint.json", *(f"{kind}/{n}.json" for kind in ("plans", "fingerprints") for n in names)
    }  # fmt: skip
    small = {"batch_size": 2, "patch_size": [8, 16, 16]}
    again = cc.plan(study(uneven, *names, training=small), out=tmp_path / "small", forecast=False)
    cc.run(study(uneven, *names, training=small), tmp_path / "run")
    assert (tmp_path / "small" / "plans.json").read_text() == (tmp_path / "run" / "plans.json").read_text()
    assert (tmp_path / "small" / "fingerprint.json").read_text() == (tmp_path / "run" / "fingerprint.json").read_text()
    assert set(again.sites["patch_size"]) == {(8, 16, 16)}, "that of the study, also alone"
    alone = cc.plan(study(uneven, "north"), out=tmp_path / "alone", forecast=False)
    assert (tmp_path / "alone" / "plans.json").read_text() == (out / "plans" / "north.json").read_text()
    assert alone.suits == "one"
    assert alone.sites.loc["north", "shared"] is None


@pytest.mark.slow
def test_the_command_fits_a_terminal_of_80_columns(uneven: Path, tmp_path: Path, command: Command) -> None:
    file = tmp_path / "study.toml"
    sites = "".join(f'[sites.{s.name}]\ndata = "{uneven / s.name}"\n' for s in SITES)
    file.write_text(f'[study]\nname = "s"\n{sites}[protocol]\nrounds = 1\nsteps = 1\n[network]\nbase_features = 4\n')
    code, out, err = command(file, "--json", tmp_path / "all.json", "--out", tmp_path / "kept")
    assert code == 0, err
    tables, _, advice = out.partition("Asymmetric plans may suit, for north, fine.")
    assert max(map(len, tables.splitlines())) <= 80
    for words in ("joint plan", "few alone", "interpolated", "lost"):
        assert words in tables
    assert "north: its spacing along z" in advice
    written = json.loads((tmp_path / "all.json").read_text())
    assert list(written["sites"]) == [s.name for s in SITES]
    assert written["sites"]["north"]["own"]["kernels"][0] == [1, 3, 3]
    assert written["advice"]["suits"] == "asymmetric"
    code, _, err = command(file, "--out", tmp_path / "kept")
    assert code == 2
    assert "is not empty" in err


def test_a_site_without_foreground_is_said_to_have_no_plan(uneven: Path, tmp_path: Path) -> None:
    shutil.copytree(uneven / "few", tmp_path / "blank")
    for path in (tmp_path / "blank" / "labelsTr").iterdir():
        image = sitk.ReadImage(str(path))
        empty = sitk.GetImageFromArray(np.zeros_like(sitk.GetArrayFromImage(image)))
        empty.CopyInformation(image)
        sitk.WriteImage(empty, str(path))
    both = study(uneven, "south", "blank")
    both["sites"]["blank"]["data"] = str(tmp_path / "blank")
    found = cc.plan(both, forecast=False)
    assert found.suits == "one"
    assert found.sites.loc["blank", "patch_size"] is None
    assert "blank cannot have a plan of its own (No case has foreground." in found.found.advice.notes[0]


def test_cases_that_cannot_be_read_are_said(uneven: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(uneven / "south", tmp_path / "south")
    sorted((tmp_path / "south" / "imagesTr").iterdir())[0].write_bytes(b"nothing")
    file = tmp_path / "study.toml"
    file.write_text(
        '[study]\nname = "s"\n[sites.south]\ndata = "south"\n'
        "[protocol]\nrounds = 1\nsteps = 1\n[network]\nbase_features = 4\n"
    )
    code, out, _ = command(file)
    assert code == 0
    assert "Excluded: south, case south_000: " in out


def test_a_divided_data_set_is_planned_as_it_would_be_run(uneven: Path) -> None:
    tables = study(uneven, partition={"data": str(uneven / "south"), "by": "size"})
    tables["sites"] = {"a": {}, "b": {"shift": {"spacing": [1.0, 1.0, 4.5]}}}
    found = cc.plan(tables, forecast=False)
    assert found.sites["n_cases"].sum() == 12
    assert found.sites.loc["b", "spacing"] == pytest.approx((4.5, 1, 1), rel=1e-3)


def test_a_study_between_hospitals_is_refused(uneven: Path) -> None:
    with pytest.raises(StudyError, match="not for one workstation"):
        cc.plan(study(uneven, "south", "north", engine={"name": "flare"}))


@pytest.mark.slow
@pytest.mark.parametrize("match", ["resolution", pytest.param("published", marks=pytest.mark.slow)])
def test_what_is_shared_is_what_a_run_by_own_plans_averages(uneven: Path, tmp_path: Path, match: str) -> None:
    by_site = {"plan": {"fingerprint": "site"}, "sharing": {"match": match}}
    tables = study(uneven, "south", "north", "fine", **by_site)
    found = cc.plan(tables, forecast=False)
    run = cc.run(tables, tmp_path / "run")
    (line,) = (json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines())
    shared = {site: took["shared"] for site, took in line["sites"].items()}
    assert found.sites["shared"].to_dict() == pytest.approx(shared, abs=1e-3)
    assert 0 < shared["north"] < 1
    assert found.suits == "asymmetric"


def test_what_stays_at_a_site_is_not_shared(uneven: Path) -> None:
    two = ("south", "north")
    everything = cc.plan(study(uneven, *two), forecast=False).sites["shared"]
    assert (
        cc.plan(study(uneven, *two, sharing={"keep": ["decoder"]}), forecast=False).sites["shared"] < everything
    ).all()


def test_parties_of_the_same_patients_have_one_plan(tmp_path: Path, command: Command) -> None:
    """No plan of a party alone, each its own channels only, and what training costs."""
    write_sequences(tmp_path, n_cases=8, n_test=2, size=16)
    file = tmp_path / "study.toml"
    file.write_text(
        "[study]\nname = 'parties'\n"
        + "".join(f"[sites.{n}]\ndata = '{tmp_path / n}'\nholds = ['{n}']\n" for n in SEQUENCES)
        + "[protocol]\nname = 'vertical'\nlabels = 'first'\ncut = 'shallow'\nrounds = 1\nsteps = 1\n"
        "[network]\nname = 'unet'\nbase_features = 4\nlevels = 2\n[training]\npatch_size = [8, 16, 16]\n"
        "[forecast]\nsite_gflops = 10\nserver_gflops = 10\n"
    )
    code, out, err = command(file)
    assert (code, "Warning" in out + err) == (0, False)
    assert "alone" not in out
    assert "no foreground" not in out
    assert all(f"vertical shallow │ {kind:>8}" in out for kind in ("float32", "float16", "bfloat16", "int8"))
    assert "One plan for all parties" in out + err
