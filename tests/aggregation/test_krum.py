"""Krum by brute force over flattened networks, and what it must not be moved by."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from drawn import by_hand, mean_of, near, network, same, updates_of

from concilium.aggregation.krum import rule, squared_distances
from concilium.messages import Tensors


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([t.double().numpy().ravel() for t in tensors.values() if t.is_floating_point()])


def brute_force(networks: list[Tensors], n_closest: int) -> list[float]:
    """The least sum of squared distances over all choices of so many others."""
    scores = []
    for i, own in enumerate(networks):
        squares = [float(((flat(own) - flat(o)) ** 2).sum()) for j, o in enumerate(networks) if j != i]
        scores.append(min(sum(c) for c in itertools.combinations(squares, n_closest)))
    return scores


@pytest.mark.parametrize(
    ("n_sites", "faulty", "n_closest"), [(4, None, 2), (5, None, 2), (7, 1, 4), (7, None, 3), (7, 2, 3)]
)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_one_of_brute_force(n_sites: int, faulty: int | None, n_closest: int, seed: int) -> None:
    networks: list[Tensors] = [network(100 * seed + i, scale=1 + i % 3) for i in range(n_sites)]
    scores = brute_force(networks, n_closest)
    weights, state = rule(updates_of(networks), {}, before=network(99), faulty=faulty)
    assert same(weights, networks[int(np.argmin(scores))])
    assert state == {}
    kept = sorted(range(n_sites), key=lambda i: scores[i])[:3]
    several, _ = rule(updates_of(networks), {}, before=network(99), faulty=faulty, keep=3)
    assert same(several, mean_of(updates_of([networks[i] for i in kept], n_cases=(1, 1, 1))))


def test_by_hand() -> None:
    """0, 1, 3, 10: two closest each: 0 -> 1 + 9, 1 -> 1 + 4, 3 -> 4 + 9, 10 -> 49 + 81."""
    updates = by_hand([0.0], [1.0], [3.0], [10.0], n_cases=(50, 1, 1, 50))
    assert squared_distances(updates)[3].tolist() == [100.0, 81.0, 49.0, 0.0]
    assert rule(updates, {}, before={})[0]["x"].item() == 1.0


def test_of_equal_scores_the_first_site_has_it() -> None:
    """0 and 1 and 2 and 3: the two in the middle have 1 + 1."""
    assert rule(by_hand([3.0], [1.0], [2.0], [0.0]), {}, before={})[0]["x"].item() == 1.0
    assert rule(by_hand([3.0], [2.0], [1.0], [0.0]), {}, before={})[0]["x"].item() == 2.0
    assert rule(by_hand([5.0]), {}, before={}, faulty=3)[0]["x"].item() == 5.0


def test_of_two_sites_neither_is_closer_and_it_is_their_mean() -> None:
    assert rule(by_hand([5.0], [7.0], n_cases=(1, 99)), {}, before={})[0]["x"].item() == 6.0


def test_all_kept_is_the_unweighted_mean() -> None:
    updates = updates_of([network(seed) for seed in range(4)], n_cases=(5, 5, 5, 5))
    assert same(rule(updates, {}, before=network(99), keep=4)[0], mean_of(updates))
    assert same(rule(updates, {}, before=network(99), keep=9)[0], mean_of(updates))


@pytest.mark.parametrize("keep", [1, 2])
def test_garbage_is_never_chosen(keep: int) -> None:
    before = network(0)
    honest = [near(before, seed) for seed in range(1, 4)]
    garbage = {name: torch.full_like(t, 1_000_000) for name, t in before.items()}
    weights, _ = rule(updates_of([garbage, *honest]), {}, before=before, keep=keep)
    assert all((t.abs() < 1000).all() for t in weights.values())
