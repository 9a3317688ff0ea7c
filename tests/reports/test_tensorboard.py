"""TensorBoard's files hold the rounds' figures, and no more of them than the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")

import concilium
from concilium.reports.tensorboard import write_events

Make = Callable[..., Path]


def scalars(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Model -> tag -> (step, value), read back from the files."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for path in sorted(folder.glob("*/events.*")):
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            for value in event.summary.value:
                found.setdefault(path.parent.name, {}).setdefault(value.tag, []).append(
                    (event.step, value.simple_value)
                )
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


def test_between_hospitals_small_sites_are_left_out(run_folder: Make) -> None:
    read = scalars(write_events(run_folder(engine="flare")))
    assert set(read["federated"]) == {"loss/north"}
