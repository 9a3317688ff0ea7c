"""Weights by quality: the formula by hand, the neutral case, and whom it leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from drawn import by_hand, mean_of, near, network, same, updates_of

from concilium.aggregation.quality import ratio, rule
from concilium.errors import StudyError
from concilium.messages import Tensors

CASES = (8, 3, 20, 5)


def parts(state: Tensors) -> list[float]:
    return [float(t) for name, t in sorted(state.items()) if name.startswith("part/")]


def test_by_hand() -> None:
    """Others' medians 0.75, 0.75, 0.75, 0.75: s3 has (0.67 + 0.05) / 0.8 = 0.9, and squared 0.81 of its 5 cases."""
    updates = by_hand([1.0], [2.0], [3.0], [10.0], n_cases=CASES, quality=(0.75, 0.75, 0.75, 0.67))
    weights, state = rule(updates, {}, before={}, memory=0.0)
    assert [ratio(i, [0.75, 0.75, 0.75, 0.67]) for i in range(4)] == pytest.approx([1, 1, 1, 0.9])
    assert parts(state) == pytest.approx([1, 1, 1, 0.81])
    expected = (8 * 1 + 3 * 2 + 20 * 3 + 4.05 * 10) / (8 + 3 + 20 + 4.05)
    assert weights["x"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("qualities", [(0.8, 0.8, 0.8, 0.8), (0.0, 0.0, 0.0, 0.0), (0.3,), (0.3, 0.3)])
def test_equal_updates_have_the_mean_to_the_bit(qualities: Sequence[float]) -> None:
    networks = [near(network(0), seed) for seed in range(len(qualities))]
    updates = updates_of(networks, n_cases=CASES, quality=qualities, share=(1.0, 0.5, 1.0, 1.0))
    state: Tensors = {}
    for _ in range(3):
        weights, state = rule(updates, state, before=network(0))
        assert same(weights, mean_of(updates))


def test_without_sharpness_and_cutoff_it_is_the_mean() -> None:
    networks = [near(network(0), seed) for seed in range(4)]
    updates = updates_of(networks, n_cases=CASES, quality=(0.9, 0.1, 0.5, 0.0))
    assert same(rule(updates, {}, before=network(0), sharpness=0.0, cutoff=0.0)[0], mean_of(updates))


def test_nobody_gains_beyond_its_cases() -> None:
    _, state = rule(by_hand(*[[1.0]] * 4, quality=(0.8, 0.8, 0.8, 1.0)), {}, before={}, memory=0.0)
    assert parts(state) == [1.0] * 4


def test_a_site_far_below_the_others_gets_nothing_after_some_rounds() -> None:
    """Ratio 0.7: the running mean is 0.91, 0.85, 0.80; in the third round it is below 0.85 for the first time by far."""
    updates = updates_of([near(network(0), seed) for seed in range(4)], n_cases=CASES, quality=(0.8, 0.8, 0.545, 0.8))
    state: Tensors = {}
    found = []
    for _ in range(5):
        weights, state = rule(updates, state, before=network(0))
        found.append(parts(state))
    assert found[0][2] == pytest.approx(0.91**2, rel=1e-3)
    assert [f[2] for f in found[2:]] == [0.0] * 3
    assert all(f[i] == 1.0 for f in found for i in (0, 1, 3))
    assert same(weights, mean_of([u for u in updates if u.site != "s2"]))


def test_while_all_are_poor_differences_say_little() -> None:
    _, state = rule(by_hand(*[[1.0]] * 4, quality=(0.01, 0.01, 0.01, 0.002)), {}, before={}, memory=0.0)
    assert min(parts(state)) > 0.7


def test_garbage_that_judges_find_useless_gets_nothing() -> None:
    honest = [near(network(0), seed) for seed in range(3)]
    garbage = {n: torch.full_like(t, 1_000_000) for n, t in network(0).items()}
    updates = updates_of([*honest, garbage], n_cases=CASES, quality=(0.5, 0.5, 0.5, 0.0))
    state: Tensors = {}
    for _ in range(3):
        weights, state = rule(updates, state, before=network(0))
        assert same(weights, mean_of(updates[:3]))


@pytest.mark.parametrize("qualities", [(None, None), (0.5, None)])
def test_without_judges_it_says_which_way_of_collecting_asks(qualities: Sequence[float | None]) -> None:
    with pytest.raises(StudyError, match="judged"):
        rule(by_hand([1.0], [2.0], quality=qualities), {}, before={})
