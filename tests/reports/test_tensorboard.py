"""TensorBoard's files hold the rounds' figures, and no more of them than the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard")

import concilium
from concilium.reports.tensorboard import write_events

Make = Callable[..., Path]


def events(folder: Path) -> Iterator[tuple[str, Any]]:
    """Model, and event, read back from the files."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for path in sorted(folder.glob("*/events.*")):
        for raw in RawEventFileLoader(str(path)).Load():
            yield path.parent.name, Event.FromString(raw)


def wall_times(folder: Path) -> dict[tuple[str, str], list[float]]:
    """(Model, tag) -> times."""
    found: dict[tuple[str, str], list[float]] = {}
    for model, event in events(folder):
        for value in event.summary.value:
            found.setdefault((model, value.tag), []).append(event.wall_time)
    return found


def scalars(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Model -> tag -> (step, value)."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for model, event in events(folder):
        for value in event.summary.value:
            found.setdefault(model, {}).setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_from_python(run_folder: Make) -> None:
    folder = run_folder()
    assert concilium.Run(folder).tensorboard() == folder / "tensorboard"
    assert set(scalars(folder / "tensorboard")) == {"federated", "local"}


def test_losses_of_every_round_and_site(run_folder: Make) -> None:
    folder = run_folder()
    (folder / "curves.jsonl").write_text('{"model": "federated", "round": 2, "dice": {"north": 0.5, "all": 0.4}}\n')
    write_events(folder)
    read = scalars(write_events(folder))
    assert set(read) == {"federated", "local"}
    steps, losses = zip(*read["federated"]["loss/north"], strict=True)
    assert steps == (1, 2, 3)
    assert losses == pytest.approx((1, 0.5, 1 / 3))
    assert read["federated"]["dice/north"] == [(2, 0.5)]
    assert "loss/tiny" in read["federated"]


def test_events_lie_when_the_rounds_ended(run_folder: Make) -> None:
    """After the start of the session, one round after the other: three seconds each, the second model after the first."""
    times = wall_times(write_events(run_folder()))
    began = datetime(2026, 11, 21, 5, tzinfo=UTC).timestamp()
    assert times["federated", "loss/north"] == [began + 3, began + 6, began + 9]
    assert times["local", "loss/north"] == [began + 12, began + 15, began + 18]


def test_a_site_knows_the_times_from_its_log(run_folder: Make) -> None:
    folder = run_folder(engine="flare") / "sites" / "north"
    line = {"event": "trained", "model": "federated", "round": 1, "loss": 0.5, "time": 1.7e9}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    assert wall_times(write_events(folder)) == {("federated", "loss/north"): [1.7e9]}


def test_between_hospitals_small_sites_are_left_out(run_folder: Make) -> None:
    read = scalars(write_events(run_folder(engine="flare")))
    assert set(read["federated"]) == {"loss/north"}
