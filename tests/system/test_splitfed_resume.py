"""A run of splitfed that was stopped goes on to the same weights, to the bit, wherever in a round it stopped."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sessions import VARIANTS, several

from concilium.answers.split import Session
from concilium.line import Event, run
from concilium.protocols._body import Body
from concilium.study import Study, to_toml

Make = Callable[..., Study]


own_and_common = pytest.mark.parametrize(
    "study", ["v1", "v2", *(pytest.param(v, marks=pytest.mark.exhaustive) for v in ("v3", "sequential"))], indirect=True
)
"""Bodies of the sites' own, and one that they share: the others keep what they have in the same places."""


def digests(folder: Path) -> dict[str, str]:
    """Of the finished model, at the server and at the sites, and of the last round with the optimisers of its bodies."""
    found = [*folder.glob("weights/*.safetensors"), *folder.glob("sites/*/models/*.safetensors")]
    found += folder.glob("checkpoints/splitfed/*.safetensors")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.fixture(scope="module", params=VARIANTS)
def study(request: pytest.FixtureRequest, split_study: Make) -> Study:
    return split_study(protocol__variant=request.param, protocol__rounds=4, training__optimizer="sgd")


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, str]]:
    """Variant -> what its uninterrupted run gave, kept while fixtures with parameters come and go."""
    return {}


@pytest.fixture
def uninterrupted(
    study: Study, known: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    variant = study.protocol.options["variant"]
    if variant not in known:
        known[variant] = without_a_stop(study, tmp_path_factory)
    return known[variant]


def without_a_stop(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(study, folder)
    moments = {n for n in load_file(folder / "checkpoints/splitfed/000004.safetensors") if n.startswith("body/")}
    assert all("momentum" in name for name in moments)
    assert len(moments) > 10
    return digests(folder)


def command(study: Study, folder: Path) -> list[str]:
    """To go on with a run, in a process of its own."""
    path = folder.parent / "study.toml"
    path.write_text(to_toml(study))
    return [sys.executable, "-m", "concilium", "run", str(path), "--out", str(folder), "--resume"]


def stop_after(study: Study, folder: Path, number: int) -> None:
    def stop(event: Event) -> None:
        if (event.kind, event.round) == ("round", number):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, folder, watch=stop)


@pytest.mark.slow
@own_and_common
def test_four_rounds_are_two_and_a_new_process_and_two(
    study: Study, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    stop_after(study, tmp_path / "run", 2)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(study, tmp_path / "run"), check=True, capture_output=True, env=environment)
    assert digests(tmp_path / "run") == uninterrupted


STOPS = {
    "front": (Session, 0),
    "tail": (Session, 7),
    "forward": (Body, 3),
    "backward": (Body, 11),
    "finish": (Session, 1),
}


@several(
    ("v1", "forward"), ("v2", "front"), ("v2", "backward"), ("v3", "finish"), ("sequential", "tail"),
    names=("study", "method"), of=(VARIANTS, tuple(STOPS)), indirect=["study"],
)  # fmt: skip
def test_a_stop_within_a_round_loses_no_more_than_the_round(
    method: str, study: Study, uninterrupted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first message of the second round, or after some of its steps."""
    owner, call = STOPS[method]
    original, calls = getattr(owner, method), iter(range(1000))
    a_round = {"finish": 3}.get(method, 6)  # three sites, two steps

    def stops(*args: Any, **options: Any) -> Any:
        if next(calls) == a_round + call % a_round:
            raise KeyboardInterrupt
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, stops)
        with pytest.raises(KeyboardInterrupt):
            run(study, tmp_path / "run")
    assert [p.stem for p in (tmp_path / "run/checkpoints/splitfed").glob("*")] == ["000001"]
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    assert digests(tmp_path / "run") == uninterrupted


@pytest.mark.slow
@own_and_common
def test_a_body_that_forgets_its_momentum_would_be_noticed(
    study: Study, uninterrupted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(study, tmp_path / "run", 2)
    load, forgotten = Body.load, set[int]()

    def forgets(self: Body, weights: Any, moments: Any, numbers: str) -> None:
        load(self, weights, moments if id(self) in forgotten else {}, numbers if id(self) in forgotten else "{}")
        forgotten.add(id(self))

    monkeypatch.setattr(Body, "load", forgets)
    run(study, tmp_path / "run", resume=True)
    there = "sites/west/models/splitfed.safetensors"  # in v3 the server has no whole network
    assert digests(tmp_path / "run")[there] != uninterrupted[there]


def test_the_server_forgets_the_moments_of_no_site(study: Study, tmp_path: Path) -> None:
    """What a round holds is enough: bodies are built anew from it."""
    stop_after(study, tmp_path / "run", 1)
    first = load_file(tmp_path / "run/checkpoints/splitfed/000001.safetensors")
    owners = {name.split("/")[1] for name in first if name.startswith("body/")}
    assert owners == ({"north", "south", "west"} if study.protocol.options["variant"] in ("v1", "v3") else {"server"})
    assert all(torch.isfinite(t).all() for t in first.values())
    if len(owners) == 3:
        one, two = (
            {n.split("/", 2)[2]: t for n, t in first.items() if n.startswith(f"body/{o}/")} for o in ("north", "south")
        )
        assert one.keys() == two.keys()
        assert not any(torch.equal(one[n], two[n]) for n in one), "each has its own"


@pytest.mark.slow
def test_killed_at_random_moments(split_study: Make, tmp_path: Path) -> None:
    """Rounds are long here, so that most kills come in the middle of one."""
    study = split_study(
        protocol__variant="v2",
        protocol__rounds=3,
        protocol__steps=30,
        training__optimizer="sgd",
        sites=("north", "south"),
    )
    run(study, tmp_path / "whole" / "run")
    folder = tmp_path / "killed" / "run"
    folder.parent.mkdir()
    draw, kills, environment = random.Random(5), 0, os.environ | {"OMP_NUM_THREADS": "1"}
    while kills < 3:
        shutil.rmtree(folder / "spool", ignore_errors=True)
        process = subprocess.Popen(
            command(study, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        while not is_training(folder) and process.poll() is None:  # imports and preprocessing are over
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.4))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 3, "the run is too short to be killed"
    subprocess.run(command(study, folder), check=True, capture_output=True, env=environment)
    assert digests(folder) == digests(tmp_path / "whole" / "run")


def is_training(folder: Path) -> bool:
    """Whether so many messages were sent that split training has begun."""
    return any(int(path.name[:9]) > 12 for path in folder.glob("spool/*/[0-9]*"))
