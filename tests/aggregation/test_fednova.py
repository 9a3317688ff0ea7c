"""Normalised averaging, by hand, and on the quadratics of the paper, where `mean` converges to the wrong point."""

from __future__ import annotations

import pytest
import torch
from drawn import STATISTICS, by_hand, close, mean_of, near, network, updates_of

from concilium.aggregation import Update
from concilium.aggregation.fednova import rule
from concilium.messages import Tensors


def test_by_hand() -> None:
    """From 10; 3 of 4 cases went 8 in 2 steps, 1 of 4 went 4 in 4: directions 4 and 1, mean 3.25; 2.5 steps on average."""
    updates = by_hand([18.0], [14.0], n_cases=(3, 1), n_steps=(2, 4))
    weights, state = rule(updates, {}, before={"x": torch.tensor([10.0])})
    assert weights["x"].item() == 10 + 2.5 * 3.25
    assert state == {}


@pytest.mark.parametrize("n_steps", [1, 7, 250])
def test_with_equal_steps_it_is_the_mean(n_steps: int) -> None:
    before = network(0)
    updates = updates_of([near(before, site) for site in range(1, 5)], n_cases=(3, 5, 2, 40), n_steps=[n_steps] * 4)
    close(rule(updates, {}, before=before)[0], mean_of(updates))


def test_statistics_are_averaged_by_cases() -> None:
    before = network(0)
    updates = updates_of([near(before, site) for site in (1, 2)], n_cases=(3, 5), n_steps=(10, 1))
    weights, _ = rule(updates, {}, before=before)
    close({n: weights[n] for n in STATISTICS}, {n: mean_of(updates)[n] for n in STATISTICS})


def test_it_converges_to_the_minimum_where_the_mean_does_not() -> None:
    """Two sites, each ½ (x − target)², targets 0 and 1, 1 and 9 steps of rate 0.01: the minimum of the sum is ½."""
    found = {}
    for name in ("fednova", "mean"):
        x = torch.tensor([0.0])
        for _ in range(600):
            after = [t + (x - t) * (1 - 0.01) ** n for t, n in ((0.0, 1), (1.0, 9))]
            updates = by_hand(after[0].tolist(), after[1].tolist(), n_steps=(1, 9))
            weights: Tensors = rule(updates, {}, before={"x": x})[0] if name == "fednova" else mean_of(updates)
            x = weights["x"]
        found[name] = x.item()
    assert found["fednova"] == pytest.approx(0.5, abs=0.02)
    assert found["mean"] > 0.85


def test_a_site_that_was_cut_short_counts_with_all_its_cases() -> None:
    """What it did in 1 of 4 steps is taken as a direction, with the weight of its cases."""
    updates = by_hand([1.0], [4.0], n_cases=(1, 1), n_steps=(1, 4), share=(0.25, 1.0))
    assert rule(updates, {}, before={"x": torch.tensor([0.0])})[0]["x"].item() == 2.5
    assert isinstance(updates[0], Update)
