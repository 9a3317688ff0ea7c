"""Yogi at the server, against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import STATISTICS, by_hand, close, mean_of, near, network, same, total_of, updates_of

from concilium.aggregation.adam import rule as adam
from concilium.aggregation.yogi import rule
from concilium.messages import Tensors


def test_by_hand() -> None:
    """From 10 with mean 12: m = 0.5 * 2 = 1. v = 1 is below 4: 1 + 0.25 * 4 = 2. A step of 0.1 * 1 / (1.414 + 1)."""
    weights, state = rule(
        total_of(by_hand([12.0])),
        {},
        before={"x": torch.tensor([10.0])},
        learning_rate=0.1,
        beta1=0.5,
        beta2=0.75,
        tau=1.0,
    )
    assert {name: t.item() for name, t in state.items()} == {"first/x": 1.0, "second/x": 2.0}
    assert weights["x"].item() == pytest.approx(10 + 0.1 / (1 + 2**0.5))


def test_it_is_algorithm_2_in_numpy() -> None:
    eta, beta1, beta2, tau = 0.02, 0.8, 0.95, 0.01
    weights: Tensors = network(0)
    state: Tensors = {}
    x = network(0)["conv.weight"].numpy().astype(np.float64)
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for number in range(6):
        step = 0.01 / (1 + number) ** 3  # differences shrink, so that v falls as well as rises
        updates = updates_of([near(weights, 10 * number + site, step=step) for site in range(3)], n_cases=(3, 5, 2))
        delta = mean_of(updates)["conv.weight"].numpy().astype(np.float64) - weights["conv.weight"].numpy()
        m = beta1 * m + (1 - beta1) * delta
        v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        x = x + eta * m / (np.sqrt(v) + tau)
        weights, state = rule(
            total_of(updates), state, before=weights, learning_rate=eta, beta1=beta1, beta2=beta2, tau=tau
        )
        np.testing.assert_allclose(weights["conv.weight"].numpy(), x, rtol=1e-5, atol=1e-6)


def test_it_forgets_more_slowly_than_adam() -> None:
    """After one large difference and ten small ones its second moment is larger, so its steps are smaller."""
    seconds = {}
    for step in (rule, adam):
        weights: Tensors = {"x": torch.tensor([0.0])}
        state: Tensors = {}
        for size in (1.0, *[0.001] * 10):
            updates = by_hand([weights["x"].item() + size])
            weights, state = step(total_of(updates), state, before=weights)
        seconds[step] = state["second/x"].item()
    assert seconds[rule] > 1.05 * seconds[adam]


def test_without_momentum_and_adaptivity_it_is_the_mean() -> None:
    before = network(0)
    updates = updates_of([near(before, site) for site in range(3)], n_cases=(3, 5, 2))
    weights, _ = rule(total_of(updates), {}, before=before, learning_rate=2e-3, beta1=0.0, beta2=1.0, tau=1e-3)
    close(weights, mean_of(updates), ulps=4)


def test_statistics_are_averaged_and_the_state_is_float32() -> None:
    updates = updates_of([network(site) for site in (1, 2)], n_cases=(3, 5))
    weights, state = rule(total_of(updates), {}, before=network(0))
    assert same({n: weights[n] for n in STATISTICS}, {n: mean_of(updates)[n] for n in STATISTICS})
    assert all(t.dtype == torch.float32 for t in state.values())
