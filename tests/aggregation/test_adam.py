"""Adam at the server, against torch's Adam and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from drawn import STATISTICS, by_hand, close, mean_of, near, network, same, total_of, updates_of

from concilium.aggregation.adam import rule
from concilium.messages import Tensors


def test_by_hand() -> None:
    """From 10 with mean 12: m = 0.5 * 2 = 1, v = 0.75 * 4 + 0.25 * 4 = 4, so a step of 0.1 * 1 / (2 + 2) = 0.025."""
    weights, state = rule(
        total_of(by_hand([12.0])),
        {},
        before={"x": torch.tensor([10.0])},
        learning_rate=0.1,
        beta1=0.5,
        beta2=0.75,
        tau=2.0,
    )
    assert weights["x"].item() == pytest.approx(10.025)
    assert {name: t.item() for name, t in state.items()} == {"first/x": 1.0, "second/x": 4.0}


@pytest.mark.parametrize(("learning_rate", "beta1", "beta2", "tau"), [(0.01, 0.9, 0.99, 1e-3), (0.3, 0.5, 0.9, 0.1)])
def test_it_is_torchs_adam_on_the_differences(learning_rate: float, beta1: float, beta2: float, tau: float) -> None:
    """Torch corrects its moments for their start, and the paper does not: rate and epsilon of each step undo that."""
    parameter = torch.nn.Parameter(network(0)["conv.weight"].double())
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(beta1, beta2))
    optimizer.state[parameter] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.full_like(parameter, tau**2),
    }
    weights: Tensors = network(0)
    state: Tensors = {}
    for number in range(1, 8):
        updates = updates_of([near(weights, 10 * number + site) for site in range(3)], n_cases=(3, 5, 2))
        parameter.grad = weights["conv.weight"].double() - mean_of(updates)["conv.weight"].double()
        first, second = 1 - beta1**number, math.sqrt(1 - beta2**number)
        optimizer.param_groups[0] |= {"lr": learning_rate * first / second, "eps": tau / second}
        optimizer.step()
        weights, state = rule(
            total_of(updates), state, before=weights, learning_rate=learning_rate, beta1=beta1, beta2=beta2, tau=tau
        )
        torch.testing.assert_close(weights["conv.weight"].double(), parameter.detach(), rtol=1e-5, atol=1e-6)


def test_without_momentum_and_adaptivity_it_is_the_mean() -> None:
    before = network(0)
    state: Tensors = {}
    for number in range(3):
        updates = updates_of([near(before, 10 * number + site) for site in range(3)], n_cases=(3, 5, 2))
        weights, state = rule(
            total_of(updates), state, before=before, learning_rate=2e-3, beta1=0.0, beta2=1.0, tau=1e-3
        )
        close(weights, mean_of(updates), ulps=4)
        before = dict(weights)


def test_statistics_are_averaged_and_the_state_is_float32() -> None:
    updates = updates_of([network(site) for site in (1, 2)], n_cases=(3, 5))
    weights, state = rule(total_of(updates), {}, before=network(0))
    assert same({n: weights[n] for n in STATISTICS}, {n: mean_of(updates)[n] for n in STATISTICS})
    assert set(state) == {f"{m}/{n}" for m in ("first", "second") for n in ("conv.weight", "conv.bias", "none")}
    assert all(t.dtype == torch.float32 for t in state.values())
