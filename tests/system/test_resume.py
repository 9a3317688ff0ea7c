"""A run that was stopped goes on to the same weights, to the bit."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from concilium.errors import StudyError
from concilium.line import Event, run
from concilium.study import Study, to_toml

Make = Callable[..., Study]


def digests(folder: Path) -> dict[str, str]:
    """Of every finished model, at the server and at the sites."""
    found = [*folder.glob("weights/*.safetensors"), *folder.glob("sites/*/models/*.safetensors")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.fixture(scope="module")
def study(small_study: Make) -> Study:
    return small_study(protocol__rounds=4, protocol__compare=["local", "centralized"], training__optimizer="sgd")


@pytest.fixture(scope="module")
def uninterrupted(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(study, folder)
    return digests(folder)


def go_on(study: Study, folder: Path) -> None:
    """Resume in a new process."""
    (folder.parent / "study.toml").write_text(to_toml(study))
    command = [
        sys.executable,
        "-m",
        "concilium",
        "run",
        str(folder.parent / "study.toml"),
        "--out",
        str(folder),
        "--resume",
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        "local",
        "centralized_long",
        *(pytest.param(m, marks=pytest.mark.exhaustive) for m in ("federated", "centralized")),
    ],
)
def test_four_rounds_are_two_and_a_new_process_and_two(
    model: str, study: Study, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if event.kind == "round" and (event.model, event.round) == (model, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop)
    go_on(study, tmp_path / "run")
    assert digests(tmp_path / "run") == uninterrupted


def test_a_stop_between_the_snapshots_and_the_rounds_commit_loses_one_round(
    small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concilium.record import Record

    study = small_study(protocol__rounds=3, protocol__compare=["local"], training__optimizer="sgd", test=False)
    run(study, tmp_path / "whole")
    commit = Record.commit

    def stop(self: Record, model: str, done: object, *, seconds: float) -> None:
        if model == "federated" and done.number == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        commit(self, model, done, seconds=seconds)  # type: ignore[arg-type]

    monkeypatch.setattr(Record, "commit", stop)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run")
    monkeypatch.undo()
    run(study, tmp_path / "run", resume=True)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_another_study_cannot_resume_a_run(study: Study, small_study: Make, tmp_path: Path) -> None:
    run(small_study(protocol__rounds=1), tmp_path / "run")
    with pytest.raises(StudyError, match="differs"):
        run(study, tmp_path / "run", resume=True)
    with pytest.raises(StudyError, match="--resume"):
        run(small_study(protocol__rounds=1), tmp_path / "run")


@pytest.mark.slow
def test_killed_at_random_moments(study: Study, uninterrupted: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "study.toml").write_text(to_toml(study))
    command = [sys.executable, "-m", "concilium", "run", str(tmp_path / "study.toml"), "--out", str(folder), "--resume"]
    draw = random.Random(11)
    kills = 0
    while kills < 5:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        before = last_change(folder)
        while last_change(folder) == before and process.poll() is None:  # imports are over, the run has begun
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2.0))
        if process.poll() is not None:
            break  # it finished before
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 5, "the run is too short to be killed so often"
    go_on(study, folder)
    assert digests(folder) == uninterrupted


def last_change(folder: Path) -> float:
    path = folder / "environment.json"
    return path.stat().st_mtime if path.exists() else 0.0
