"""Steps that end in time, by a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from concilium.answers import time_box
from concilium.answers.time_box import while_it_fits


class Clock:
    """Moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time_box, "time", clock)
    return clock


def steps_in(clock: Clock, seconds: float | None, *, begin: float = 0.0, draw: float = 0.0, takes: list[float]) -> int:
    """How many of these steps are taken, in a round that takes `begin` seconds to begin and `draw` for each batch."""
    began = clock.now
    clock.now += begin

    def batches() -> Iterator[float]:
        for taken in takes:
            clock.now += draw
            yield taken

    n = 0
    for taken in while_it_fits(batches(), seconds, began=began):
        clock.now += taken
        n += 1
    return n


def test_without_a_limit_all_steps_are_taken(clock: Clock) -> None:
    assert steps_in(clock, None, takes=[1e6] * 7) == 7


@pytest.mark.parametrize(
    ("seconds", "n"),
    [(1e9, 20), (10.0, 9), (9.9, 8), (2.3, 2), (2.2, 1), (0.5, 1)],
)
def test_a_tenth_of_the_time_is_left_for_the_answer(clock: Clock, seconds: float, n: int) -> None:
    """Of steps of a second; one is taken in any case."""
    began = clock.now
    assert steps_in(clock, seconds, takes=[1.0] * 20) == n
    assert clock.now - began <= max(0.9 * seconds, 1.0) + 1e-9


def test_the_answer_is_given_as_long_as_the_beginning_took(clock: Clock) -> None:
    """The weights that came are as large as those that go."""
    assert steps_in(clock, 10.0, begin=3.0, takes=[1.0] * 20) == 4


def test_making_the_batch_is_part_of_a_step(clock: Clock) -> None:
    assert steps_in(clock, 10.0, draw=0.5, takes=[1.0] * 20) == 6


def test_the_longest_of_the_last_steps_is_what_the_next_may_take(clock: Clock) -> None:
    """A first step that is slow, as on a GPU that warms up, counts for five steps and no longer."""
    assert steps_in(clock, 20.0, takes=[5.0, *[1.0] * 30]) == 14
    assert steps_in(clock, 10.0, takes=[5.0, *[1.0] * 30]) == 1
    assert steps_in(clock, 10.0, takes=[1.0, 1.0, 4.0, 1.0, 1.0]) == 3
