"""Weights by agreement: the formula by hand, what it tells apart, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from drawn import STATISTICS, by_hand, mean_of, near, network, same, updates_of

from concilium.aggregation import Update
from concilium.aggregation.agreement import deviations, directions, rule
from concilium.messages import Tensors

CASES = (8, 3, 20, 5)


def round_of(before: Tensors, losses: Sequence[float], number: int = 0, **columns: Sequence[object]) -> list[Update]:
    networks = [near(before, 100 * number + site) for site in range(1, len(losses) + 1)]
    return updates_of(networks, n_cases=CASES[: len(losses)], loss=losses, **columns)


def parts(state: Tensors) -> list[float]:
    return [float(t) for name, t in sorted(state.items()) if name.startswith("part/")]


# -------------------------------------------------------------------------------------------------------------- the formula


def test_directions_are_numpys() -> None:
    before, networks = network(0), [network(seed) for seed in range(1, 6)]
    cosines, lengths = directions(updates_of(networks), before)
    learnt = [n for n in before if n not in STATISTICS]
    flat = np.stack(
        [np.concatenate([(n[k].double() - before[k].double()).numpy().ravel() for k in learnt]) for n in networks]
    )
    median = np.median(flat, axis=0)
    np.testing.assert_allclose(lengths, np.linalg.norm(flat, axis=1), rtol=1e-12)
    expected = flat @ median / np.linalg.norm(flat, axis=1) / np.linalg.norm(median)
    np.testing.assert_allclose(cosines, expected, rtol=1e-9)


def test_by_hand() -> None:
    """Three sites, memory 0: median loss 0.2; tolerated 0.5 * max(1, 1 - 0.2) = 0.5; s2 exceeds by 0.6, D = 1.2, part 0.6.

    All point along (1, 0) but s1, along (3, 4): its cosine is 0.6, so turn = 0.4, D = 0.4 / 0.8 = 0.5, part 1.
    """
    before = {"x": torch.zeros(2)}
    updates = by_hand([2.0, 0.0], [3.0, 4.0], [4.0, 0.0], n_cases=(4, 2, 10), loss=(0.2, 0.2, 0.8))
    state: Tensors = {"first": torch.tensor(1.0)}
    weights, state = rule(updates, state, before=before, lag=0.5, turn=0.8, memory=0.0)
    assert {name: t.item() for name, t in state.items()} == pytest.approx(
        {
            "first": 1.0, "reach": 1.0,
            "excess/s0": 0.0, "excess/s1": 0.0, "excess/s2": 0.6,
            "turn/s0": 0.0, "turn/s1": 0.4, "turn/s2": 0.0,
            "part/s0": 1.0, "part/s1": 1.0, "part/s2": 0.6,
        }
    )  # fmt: skip
    expected = (4 * torch.tensor([2.0, 0.0]) + 2 * torch.tensor([3.0, 4.0]) + 6 * torch.tensor([4.0, 0.0])) / 12
    torch.testing.assert_close(weights["x"], expected, rtol=1e-4, atol=0)


def test_what_is_remembered_is_a_running_mean() -> None:
    """Excess of 0.4 in every round, memory 0.5: 0.2, 0.3, 0.35."""
    before, state = network(0), {}
    found = []
    for number in range(3):
        _, state = rule(round_of(before, (0.1, 0.1, 0.1, 0.5), number), state, before=before, memory=0.5)
        found.append(float(state["excess/s3"]))
    assert found == pytest.approx([0.2, 0.3, 0.35])


def test_what_sites_differ_by_anyway_is_tolerated() -> None:
    """Median |excess| 0.2: two robust deviations are 0.593, more than a tenth of 1."""
    excess = (-0.2, 0.0, 0.2, 0.6)
    state = {f"excess/s{i}": torch.tensor(e) for i, e in enumerate(excess)} | {"reach": torch.tensor(1.0)}
    found = deviations(by_hand(*[[0.0]] * 4), state, lag=0.1, turn=0.5)
    assert found == pytest.approx([0.0, 0.0, 0.2 / 0.59304, 0.6 / 0.59304])


# ------------------------------------------------------------------------------------------------------- it is the mean


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4])
def test_where_all_agree_it_is_the_mean_to_the_bit(n_sites: int) -> None:
    before, state = network(0), {}
    for number in range(4):
        losses = [0.9 - 0.2 * number + 0.01 * site for site in range(n_sites)]
        updates = round_of(before, losses, number)
        weights, state = rule(updates, state, before=before)
        assert same(weights, mean_of(updates))
        before = dict(weights)


def test_a_site_that_did_part_of_its_steps_counts_in_part() -> None:
    before = network(0)
    updates = round_of(before, (0.5, 0.5, 0.5), share=(1.0, 0.25, 1.0))
    assert same(rule(updates, {}, before=before)[0], mean_of(updates))


def test_nothing_is_tolerated_without_limit_but_everything_with_large_options() -> None:
    before = network(0)
    updates = round_of(before, (0.1, 0.1, 0.1, 5.0))
    weights, _ = rule(updates, {}, before=before, lag=1e6, turn=1e6, memory=0.0)
    assert same(weights, mean_of(updates))
    weights, state = rule(updates, {}, before=before, memory=0.0)
    assert parts(state) == [1.0, 1.0, 1.0, 0.0]
    assert same(weights, mean_of(updates[:3]))


# ------------------------------------------------------------------------------------------------------- what it tells apart

LEARNT = [0.9, 0.5, 0.2, 0.0, -0.1, -0.2, -0.25, -0.3]
"""The loss of a site with right labels, round by round."""
STUCK = [0.95, 0.6, 0.4, 0.25, 0.15, 0.1, 0.05, 0.0]
"""That of a site with half of them wrong, as measured on the phantom."""


def run(losses: Sequence[Sequence[float]], *, rounds: int = 8, **options: float) -> list[list[float]]:
    """The parts given in each round; every site has the same common step and one of its own."""
    before, state, found = network(0), {}, []
    for number in range(rounds):
        updates = round_of(before, [of[number] for of in losses], number)
        weights, state = rule(updates, state, before=before, **options)
        found.append(parts(state))
        before = dict(weights)
    return found


@pytest.mark.parametrize("place", range(4))
def test_a_site_whose_loss_stays_behind_loses_its_weight_and_the_others_keep_theirs(place: int) -> None:
    losses = [STUCK if site == place else [x + 0.02 * site for x in LEARNT] for site in range(4)]
    found = run(losses)
    assert found[0] == [1.0] * 4, "nobody is suspected at once"
    assert all(f[place] == 0.0 for f in found[5:])
    assert all(f[site] == 1.0 for f in found for site in range(4) if site != place)


def test_sites_with_cases_of_unequal_difficulty_keep_their_weight() -> None:
    losses = [[x + offset for x in LEARNT] for offset in (0.0, 0.05, -0.05, 0.1)]
    assert run(losses) == [[1.0] * 4] * 8


def test_one_bad_round_is_forgiven() -> None:
    odd = [x + 0.25 * (number == 3) for number, x in enumerate(LEARNT)]
    assert run([LEARNT, LEARNT, LEARNT, odd]) == [[1.0] * 4] * 8


def test_a_site_that_pushes_the_other_way_loses_its_weight() -> None:
    before, state = network(0), {}
    for number in range(4):
        updates = round_of(before, (0.5, 0.5, 0.5, 0.5), number)
        against = {n: 2 * before[n] - t if n not in STATISTICS else t for n, t in updates[1].weights.items()}
        updates[1] = Update(**(vars(updates[1]) | {"weights": against}))
        weights, state = rule(updates, state, before=before)
    assert parts(state) == [1.0, 0.0, 1.0, 1.0]
    assert same(weights, mean_of([u for u in updates if u.site != "s1"]))


@pytest.mark.parametrize("size", [1e6, -1e6, 3e38])
def test_garbage_has_no_weight_from_the_first_round_on(size: float) -> None:
    before = network(0)
    updates = round_of(before, (0.5, 0.5, 0.5, 0.5))
    garbage = {n: torch.full_like(t, size if t.is_floating_point() else 10**6) for n, t in before.items()}
    spoilt = [*updates[:3], Update(**(vars(updates[3]) | {"weights": garbage}))]
    weights, state = rule(spoilt, {}, before=before)
    assert parts(state) == [1.0, 1.0, 1.0, 0.0]
    assert same(weights, mean_of(updates[:3]))


def test_a_site_that_comes_and_goes_is_remembered_by_name() -> None:
    before, state = network(0), {}
    step = partial(rule, before=before)
    for number in range(6):
        _, state = step(round_of(before, (0.1, 0.1, 0.1, 0.9), number), state)
    without = [u for u in round_of(before, (0.1, 0.1, 0.1, 0.9)) if u.site != "s0"]
    _, state = step(without[:2], state)  # two sites tell nothing new
    weights, state = step(without, state)
    assert float(state["part/s3"]) == 0.0
    assert same(weights, mean_of(without[:2]))


def test_where_all_are_suspected_none_is() -> None:
    before = network(0)
    updates = round_of(before, (0.5, 0.5))
    state = {f"turn/s{i}": torch.tensor(1.0) for i in range(2)}
    weights, _ = rule(updates, state, before=before)
    assert same(weights, mean_of(updates))
