"""Runs of sites with less memory, or less time, than others."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file

import concilium
from concilium.answers import fitting, time_box, train
from concilium.engines.simulation import connect
from concilium.errors import DataError, EngineError
from concilium.line import Outcome, run
from concilium.preparation import Event
from concilium.record import Record
from concilium.study import Study

Make = Callable[..., Study]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def small_south(phantom: Path) -> dict[str, Any]:
    return {"sites__south": {"data": str(phantom / "south"), "micro_batch": 1}}


# ------------------------------------------------------------------------------------------------------- micro-batches


def test_a_run_by_the_memory_at_hand_has_the_same_network_and_goes_on_as_it_began(
    small_study: Make, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: Event) -> None:
        if event.kind == "round":
            raise KeyboardInterrupt

    changes = {"training__optimizer": "sgd", "training__batch_size": 4, "test": False, "sites": ("north", "south")}
    by_memory = changes | {"sites__south": {"data": str(phantom / "south"), "micro_batch": "auto"}}
    monkeypatch.setattr(fitting, "at_hand", lambda device: 1000)
    whole, parts = run(small_study(**changes), tmp_path / "whole"), run(small_study(**by_memory), tmp_path / "parts")
    a, b = (load_file(o.folder / "weights" / "federated.safetensors") for o in (whole, parts))
    assert parts.exit_code == 0
    assert 0 < max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
    with pytest.raises(KeyboardInterrupt):
        run(small_study(**by_memory), tmp_path / "half", watch=stop)
    monkeypatch.setattr(fitting, "at_hand", lambda device: 10**12)  # other programs have ended
    again = run(small_study(**by_memory), tmp_path / "half", resume=True)
    (way,) = json.loads((again.folder / "sites" / "south" / fitting.NOTE).read_text()).values()
    assert (way["at_once"], way["had"]) == (1, 1000)
    resumed = load_file(again.folder / "weights" / "federated.safetensors")
    assert all(torch.equal(b[name], resumed[name]) for name in b)


@pytest.mark.parametrize("patch", [[16, 16, 8], pytest.param([16, 16], marks=pytest.mark.exhaustive)], ids=["3D", "2D"])
def test_a_site_that_holds_less_trains_the_same_network(
    patch: list[int], small_study: Make, phantom: Path, tmp_path: Path
) -> None:
    """The server is not told, and its messages are as long as ever."""
    flat = {"plan__configuration": "2d"} if len(patch) == 2 else {}
    changes = {"training__optimizer": "sgd", "training__batch_size": 3, "training__patch_size": patch, "test": False}
    one = run(small_study(**changes, **flat), tmp_path / "one")
    other = run(small_study(**changes, **flat, **small_south(phantom)), tmp_path / "other")
    assert other.exit_code == 0
    a, b = (load_file(o.folder / "weights" / "federated.safetensors") for o in (one, other))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
    sizes = [
        [
            {k: v for k, v in line["sites"]["south"].items() if k == "bytes_down" or k.startswith("n_")}
            for line in lines(o.folder)
        ]
        for o in (one, other)
    ]
    assert sizes[0] == sizes[1]
    assert "micro_batch = 1" in (tmp_path / "other" / "study.toml").read_text()


def test_a_network_that_looks_at_whole_batches_is_refused_before_anything_trains(
    small_study: Make, phantom: Path, tmp_path: Path
) -> None:
    study = small_study(network__name="unet", network__levels=2, network__norm="batch", **small_south(phantom))
    with pytest.raises(DataError, match=r"south: micro_batch \(DataError; .*look at a whole batch, here of 2"):
        run(study, tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_split_training_is_refused_by_the_site_too(split_study: Make, tmp_path: Path) -> None:
    """Whatever the server's study says."""
    with pytest.raises(EngineError, match=r"0 of 1 sites answered \(south: micro_batch \(DataError"):
        run(
            split_study(sites=("south",), protocol__min_sites=1),
            tmp_path / "run",
            connect=partial(connect, micro_batch={"south": 1}),
        )


def test_a_site_that_runs_out_of_memory_is_told_what_may_help(small_study: Make, tmp_path: Path) -> None:
    (tmp_path / "fuse").touch()
    study = small_study(
        local_update__name="faults:lacks", local_update__fuse=str(tmp_path / "fuse"), protocol__rounds=1, test=False
    )
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 4
    (problem,) = outcome.results["problems"]
    assert "north: out_of_memory (RuntimeError; " in problem
    assert "a smaller micro_batch at the site may help" in problem


# ------------------------------------------------------------------------------------------------------------ time boxes


@pytest.fixture(scope="module")
def boxed(small_study: Make, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two sites that are to take 60 steps a round, and have time for a few; and each alone."""
    study = small_study(
        local_update__name="faults:crawls", local_update__seconds=0.15, protocol__steps=60, protocol__rounds=1,
        protocol__round_seconds=4.0, protocol__time_box=True, protocol__compare=["local"], sites=("north", "south"),
        test=False,
    )  # fmt: skip
    with mock.patch.object(time_box, "ROOM", 0.7):  # the machine that tests may be busy
        return run(study, tmp_path_factory.mktemp("boxed") / "run")


def test_slow_sites_answer_in_time_with_what_they_did(boxed: Outcome) -> None:
    assert boxed.exit_code == 0
    for line in lines(boxed.folder):
        assert not line["failures"]
        for took in line["sites"].values():
            assert took["n_asked"] == 60
            assert 1 <= took["n_steps"] <= 9
            assert took["seconds"] < 4


def test_the_record_says_how_many_steps_were_taken_of_how_many(boxed: Outcome) -> None:
    schema = json.loads((Path(concilium.__file__).parent / "results.schema.json").read_text())
    Draft202012Validator(schema).validate(json.loads((boxed.folder / "results.json").read_text()))
    for model in boxed.results["models"]:
        for site, took in model["sites"].items():
            assert took["n_asked"] == 60
            told = f"{model['name']}: {site} took {took['n_steps']} of 60 steps in the time of its rounds"
            assert any(text.startswith(told) for text in boxed.results["warnings"])
            assert f"{took['n_steps']} of 60" in concilium.open_run(boxed.folder).report().read_text()
    assert len(boxed.results["models"]) == 2
    assert list(concilium.open_run(boxed.folder).rounds["n_asked"].unique()) == [60]


def test_the_mean_counts_each_by_what_it_did(
    small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One site takes all steps, the other one: it counts for so much less than its cases."""
    kept: dict[int, dict[str, torch.Tensor]] = {}
    fits, finish = train.while_it_fits, train.Learner.finish
    limits = iter([None, 1e-9])
    monkeypatch.setattr(train, "while_it_fits", lambda items, _, began: fits(items, next(limits), began=began))

    def finished(self: Any, *args: Any, **given: Any) -> Any:
        told = finish(self, *args, **given)
        kept[told.n_steps] = dict(told.weights)
        return told

    monkeypatch.setattr(train.Learner, "finish", finished)
    outcome = run(
        small_study(
            sites=("north", "south"), protocol__rounds=1, protocol__steps=4, protocol__round_seconds=60.0,
            protocol__time_box=True, test=False,
        ),
        tmp_path / "run",
    )  # fmt: skip
    (line,) = lines(outcome.folder)
    n = {s: line["sites"][s]["n_cases"] * line["sites"][s]["n_steps"] / 4 for s in ("north", "south")}
    assert [line["sites"][s]["n_steps"] for s in n] == [4, 1]
    shared = load_file(outcome.folder / "weights" / "federated.safetensors")
    for name, tensor in shared.items():
        mean = (kept[4][name].double() * n["north"] + kept[1][name].double() * n["south"]) / sum(n.values())
        assert torch.allclose(tensor, mean.float(), rtol=0, atol=1e-7)


def test_a_site_with_time_enough_is_as_ever(small_study: Make, tmp_path: Path) -> None:
    """To the bit, and nobody is told anything."""
    changes: dict[str, Any] = {"sites": ("north", "south"), "test": False, "protocol__round_seconds": 600.0}
    one = run(small_study(**changes), tmp_path / "one")
    other = run(small_study(**changes, protocol__time_box=True), tmp_path / "other")
    a, b = (load_file(o.folder / "weights" / "federated.safetensors") for o in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert one.results["warnings"] == other.results["warnings"]


def test_a_step_that_is_longer_than_the_box_is_still_a_failure(small_study: Make, tmp_path: Path) -> None:
    (tmp_path / "fuse").touch()
    study = small_study(
        local_update__name="faults:sleeps", local_update__fuse=str(tmp_path / "fuse"), local_update__seconds=3.5,
        protocol__round_seconds=3.0, protocol__time_box=True, protocol__rounds=1, test=False,
    )  # fmt: skip
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 4
    assert lines(tmp_path / "run")[0]["failures"] == {"north": {"type": "SiteTimeout", "text": "no reply within 3 s"}}


@pytest.mark.slow
def test_it_goes_on_after_a_stop(small_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the round and the rates at which it stopped, though not to the bit."""
    monkeypatch.setattr(time_box, "ROOM", 0.7)
    study = small_study(
        sites=("north", "south"), local_update__name="faults:crawls", local_update__seconds=0.1, test=False,
        protocol__steps=60, protocol__round_seconds=3.0, protocol__time_box=True,
    )  # fmt: skip
    commit = Record.commit

    def stops(self: Record, model: str, done: Any, *, seconds: float) -> None:
        commit(self, model, done, seconds=seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(Record, "commit", stops)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run")
    monkeypatch.setattr(Record, "commit", commit)
    outcome = run(study, tmp_path / "run", resume=True)
    assert outcome.exit_code == 0
    assert [line["round"] for line in lines(tmp_path / "run")] == [1, 2]
    assert all(
        0 < site["n_steps"] < site["n_asked"] for line in lines(tmp_path / "run") for site in line["sites"].values()
    )
