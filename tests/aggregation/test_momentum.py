"""Momentum at the server, against torch's SGD and by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from drawn import STATISTICS, by_hand, close, mean_of, near, network, same, total_of, updates_of
from torch import Tensor

from concilium.aggregation.momentum import rule
from concilium.messages import Tensors


def test_by_hand() -> None:
    """From 10 with means 12, 15: v = 2, then 0.5 * 2 + (15 - 11) = 5; weights 10 + 0.5 * 2 = 11, then 11 + 0.5 * 5 = 13.5."""
    step = partial(rule, learning_rate=0.5, momentum=0.5)
    first, state = step(total_of(by_hand([12.0])), {}, before={"x": torch.tensor([10.0])})
    assert (first["x"].item(), state["first/x"].item()) == (11.0, 2.0)
    second, state = step(total_of(by_hand([15.0])), state, before=first)
    assert (second["x"].item(), state["first/x"].item()) == (13.5, 5.0)


@pytest.mark.parametrize(("learning_rate", "momentum"), [(1.0, 0.9), (0.3, 0.5), (0.5, 0.0)])
def test_it_is_torchs_sgd_on_the_differences(learning_rate: float, momentum: float) -> None:
    parameter = torch.nn.Parameter(network(0)["conv.weight"].double())
    optimizer = torch.optim.SGD([parameter], lr=learning_rate, momentum=momentum)
    weights: Tensors = network(0)
    state: Tensors = {}
    for number in range(6):
        updates = updates_of([near(weights, 10 * number + site) for site in range(3)], n_cases=(3, 5, 2))
        parameter.grad = weights["conv.weight"].double() - mean_of(updates)["conv.weight"].double()
        weights, state = rule(total_of(updates), state, before=weights, learning_rate=learning_rate, momentum=momentum)
        optimizer.step()
        torch.testing.assert_close(weights["conv.weight"].double(), parameter.detach(), rtol=1e-6, atol=1e-7)


def test_rate_1_and_momentum_0_are_the_mean() -> None:
    before = network(0)
    state: Tensors = {}
    for number in range(3):
        updates = updates_of([near(before, 10 * number + site) for site in range(3)], n_cases=(3, 5, 2))
        weights, state = rule(total_of(updates), state, before=before, learning_rate=1.0, momentum=0.0)
        close(weights, mean_of(updates))
        before = dict(weights)


def test_statistics_are_averaged_and_the_state_is_float32() -> None:
    before = network(0)
    updates = updates_of([network(site) for site in (1, 2)], n_cases=(3, 5))
    weights, state = rule(total_of(updates), {}, before=before)
    averaged: dict[str, Tensor] = {name: mean_of(updates)[name] for name in STATISTICS}
    assert same({name: weights[name] for name in STATISTICS}, averaged)
    assert set(state) == {"first/conv.weight", "first/conv.bias", "first/none"}
    assert all(t.dtype == torch.float32 for t in state.values())
