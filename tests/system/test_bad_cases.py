"""Cases that one party of a vertical study cannot use: all leave them out, say why, and train on the others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from test_parties import digest, scores, study_on

from concilium import readiness
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.errors import EngineError
from concilium.line import Event, Outcome, run
from concilium.study import Study

N, BAD = 8, "case_002"
ONE = {"protocol__rounds": 1, "protocol__steps": 1, "study__max_excluded": 0.2}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    write_sequences(folder, n_cases=N, n_test=1, size=16)
    return folder


@pytest.fixture
def data(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def without(intact: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run in which nobody ever had the bad case."""
    folder = tmp_path_factory.mktemp("without")
    shutil.copytree(intact, folder / "data")
    for path in (folder / "data").rglob(f"{BAD}*"):
        if "test" not in path.parts:
            path.unlink()
    return run(study_on(folder / "data", **ONE), folder / "run")


def image_of(data: Path, site: str, case: str = BAD) -> Path:
    return data / site / f"imagesTr/{case}_0000.nii.gz"


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_a_hole(path: Path) -> None:
    image = sitk.ReadImage(str(path))
    voxels = sitk.GetArrayFromImage(image).astype(np.float32)
    voxels[0, 0, 0] = np.nan
    made = sitk.GetImageFromArray(voxels)
    made.CopyInformation(image)
    sitk.WriteImage(made, str(path))


def set_aside(outcome: Outcome) -> dict[str, str]:
    """Site -> why, of the bad case; nothing else is set aside."""
    rows = outcome.results["excluded"]
    assert {row["case"] for row in rows} <= {BAD}
    return {row["site"]: row["reason"] for row in rows}


def reasons(site: str, why: str) -> dict[str, str]:
    return {name: why if name == site else "unusable_elsewhere" for name in SEQUENCES}


def damaging_later(monkeypatch: pytest.MonkeyPatch, damage: Callable[[], None]) -> None:
    """The file is damaged once, when the cases are aligned and nothing is prepared yet."""
    plan, todo = readiness.plan_for, [damage]

    def then_damaged(*given: Any) -> Any:
        if todo:
            todo.pop()()
        return plan(*given)

    monkeypatch.setattr(readiness, "plan_for", then_damaged)


@pytest.mark.parametrize("site", ["first", "second"])
@pytest.mark.parametrize(("damage", "why"), [(cut_off, "unreadable"), (with_a_hole, "not_finite")])
def test_a_file_that_cannot_be_read_at_one_party(
    site: str, damage: Callable[[Path], None], why: str, data: Path, tmp_path: Path, without: Outcome
) -> None:
    damage(image_of(data, site))
    outcome = run(study_on(data, **ONE), tmp_path / "run")
    assert outcome.exit_code == 0
    assert set_aside(outcome) == reasons(site, why)
    assert any("1 cases that all sites have cannot be used at one of them" in w for w in outcome.results["warnings"])
    assert digest(outcome.folder) == digest(without.folder), "trained on the others, and on nothing else"


@pytest.mark.parametrize("site", ["first", "second"])
def test_too_many_of_them_make_exit_code_4_and_end_nothing(site: str, data: Path, tmp_path: Path) -> None:
    cut_off(image_of(data, site))
    outcome = run(study_on(data, **ONE | {"study__max_excluded": 0.1}), tmp_path / "run")
    assert outcome.exit_code == 4
    assert any("cannot be used at one of them" in p for p in outcome.results["problems"])
    assert [m["name"] for m in outcome.results["models"]] == ["vertical"]


@pytest.mark.parametrize(
    ("site", "damage", "why"),
    [
        ("first", Path.unlink, "missing_channel"),
        ("second", cut_off, "unreadable"),
        ("second", Path.unlink, "unreadable"),
    ],
)
def test_a_file_that_goes_bad_before_it_is_prepared(
    site: str, damage: Any, why: str, data: Path, tmp_path: Path, without: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it then is mended again, the run that goes on still leaves it out."""
    path = image_of(data, site)
    before = path.read_bytes()
    damaging_later(monkeypatch, lambda: damage(path))
    outcome = run(study_on(data, **ONE), tmp_path / "run")
    assert outcome.exit_code == 0
    assert set_aside(outcome) == reasons(site, why)
    assert digest(outcome.folder) == digest(without.folder)
    path.write_bytes(before)
    more = study_on(data, **ONE, study__seeds=2)
    again = run(more, tmp_path / "run", resume=True)
    assert (again.exit_code, set_aside(again)) == (0, reasons(site, why))
    assert len(again.results["models"]) == 2


def test_a_party_that_only_a_variant_asks_prepares_before_anything_trains(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image_of(data, "third")
    damaging_later(monkeypatch, lambda: cut_off(path))
    study = study_on(data, **ONE, protocol__parties=["first", "second"], variants__all={"protocol": {"parties": []}})
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    assert set_aside(outcome) == reasons("third", "unreadable")
    assert [m["name"] for m in outcome.results["models"]] == ["vertical", "all"]


def test_a_party_that_fails_again_and_leaves_nothing_out_ends_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "all_can_prepare", lambda *_: False)
    with pytest.raises(
        EngineError, match=f"cannot prepare some of {N} cases, and when asked again it leaves none of them out"
    ):
        run(study_on(data, **ONE), tmp_path / "run")


def test_a_size_of_voxels_that_cannot_be_resampled(data: Path, tmp_path: Path, without: Outcome) -> None:
    """It can be read, and lies alike everywhere: no party can prepare it."""
    for path in [*(image_of(data, site) for site in SEQUENCES), data / f"first/labelsTr/{BAD}.nii.gz"]:
        image = sitk.ReadImage(str(path))
        image.SetSpacing((0.001, 0.001, 0.001))
        sitk.WriteImage(image, str(path))
    outcome = run(study_on(data, **ONE), tmp_path / "run")
    assert outcome.exit_code == 0
    assert set_aside(outcome) == dict.fromkeys(SEQUENCES, "unusable")
    assert digest(outcome.folder) == digest(without.folder)


def test_once_training_began_a_bad_file_is_another_case(data: Path, tmp_path: Path) -> None:
    path = image_of(data, "second")
    before = path.read_bytes()
    study = study_on(data, **ONE)
    assert run(study, tmp_path / "run").exit_code == 0
    cut_off(path)
    more = replace(study, study=replace(study.study, seeds=2))
    with pytest.raises(EngineError, match="other cases are at all sites than when the run began"):
        run(more, tmp_path / "run", resume=True)
    path.write_bytes(before)
    assert run(more, tmp_path / "run", resume=True).exit_code == 0


@pytest.mark.parametrize("later", [False, True])
def test_a_run_that_trained_nothing_yet_may_begin_with_others(
    later: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the case that is mended could not be read, or could not be prepared."""

    def stop(event: Event) -> None:
        if "training" in event.text.lower() or event.kind == "round" or "Planned" in event.text:
            raise KeyboardInterrupt

    path = image_of(data, "second")
    before = path.read_bytes()
    if later:
        damaging_later(monkeypatch, lambda: cut_off(path))
    else:
        cut_off(path)
    study = study_on(data, **ONE)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop)
    assert (tmp_path / "run/sites/second/failed.json").is_file() == later
    path.write_bytes(before)
    outcome = run(study, tmp_path / "run", resume=True)
    assert (outcome.exit_code, outcome.results["excluded"]) == (0, [])


@pytest.fixture(scope="module")
def plain(intact: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(study_on(intact, **ONE), tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("site", ["first", "second"])
def test_a_case_that_cannot_be_read_when_it_is_scored(site: str, data: Path, tmp_path: Path, plain: Outcome) -> None:
    """The others are scored, and what is asked afterwards gets its own answer."""
    expected = scores(plain.results, "vertical", "validation")
    lost = min(expected)

    def damage(event: Event) -> None:
        if "scoring the validation" in event.text:
            cut_off(image_of(data, site, lost))

    study: Study = study_on(data, **ONE | {"study__max_excluded": 0.6})
    outcome = run(study, tmp_path / "run", watch=damage)
    assert outcome.exit_code == 0
    assert scores(outcome.results, "vertical", "validation") == {c: d for c, d in expected.items() if c != lost}
    assert scores(outcome.results, "vertical", "test") == scores(plain.results, "vertical", "test") != {}
    rows = {(row["site"], row["case"], row["reason"]) for row in outcome.results["excluded"]}
    here = (site, lost, "unreadable")
    assert rows == ({here} if site == "first" else {here, ("first", lost, "unusable_elsewhere")})
