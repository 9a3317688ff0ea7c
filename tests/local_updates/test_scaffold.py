"""SCAFFOLD against its equations in numpy, and against the optimum of a problem on which plain averaging drifts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from averaging import Server, plain
from torch import Tensor

from concilium.data.patches import Batch
from concilium.local_updates.scaffold import finish, step

Make = Callable[..., Any]


corrected = partial(Server.round, take=step, finish=finish)


def test_three_rounds_are_those_of_the_equations(parabola: Make, nothing: Batch) -> None:
    """Algorithm 1, option II: the rate falls, sites differ in size, and one is out of the second round."""
    optima, curvatures = (
        {"a": [1.0, 0.0], "b": [-2.0, 3.0], "c": [0.5, -1.0]},
        {"a": [1.0, 2.0], "b": [3.0, 0.5], "c": [1, 1]},
    )
    cases = {"a": 5, "b": 2, "c": 9}
    server = Server({n: parabola(optima[n], curvatures[n]) for n in cases}, cases, [4.0, -4.0])
    x, c = np.array([4.0, -4.0]), np.zeros(2)
    own = {n: np.zeros(2) for n in cases}
    for number, who in enumerate([("a", "b", "c"), ("a", "c"), ("a", "b", "c")]):
        rates = [0.1 / (1 + number + k) for k in range(4)]
        corrected(server, rates, nothing, who=who)
        came, changes = {}, {}
        for n in who:
            y = x.copy()
            for rate in rates:
                gradient = np.array(curvatures[n]) * (y - np.array(optima[n]))
                y = y - rate * (gradient - own[n] + c)
            new = own[n] - c + (x - y) / sum(rates)
            came[n], changes[n], own[n] = y, new - own[n], new
        x = sum(cases[n] * came[n] for n in who) / sum(cases[n] for n in who)
        c = c + sum(cases[n] * changes[n] for n in who) / sum(cases.values())
        np.testing.assert_allclose(server.w, x, rtol=1e-12)
        np.testing.assert_allclose(server.control["w"], c, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(c, sum(cases[n] * own[n] for n in cases) / sum(cases.values()), atol=1e-12)
        for n in cases:
            np.testing.assert_allclose(
                server.sites[n].memory.get("own/w", torch.zeros(2)), own[n], rtol=1e-9, atol=1e-12
            )


MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        pytest.param(torch.optim.SGD, 0.04, id="sgd"),
        pytest.param(MOMENTUM, 0.004, id="momentum"),
        pytest.param(torch.optim.Adam, 0.02, id="adam"),
    ],
)
def test_many_local_steps_do_not_drift(parabola: Make, nothing: Batch, optimizer: Any, rate: float) -> None:
    """Sites go to their own optimum, 0 or 1, and the mean of these is 0.5; the joint one, where gradients cancel, is 0.8."""

    def server() -> Server:
        site = partial(parabola, optimizer=optimizer)
        return Server({"a": site([0.0], [1.0]), "b": site([1.0], [4.0])}, {"a": 3, "b": 3}, [2.0])

    drifting, converging = server(), server()
    for _ in range(25):
        plain(drifting, [rate] * 30, nothing)
        corrected(converging, [rate] * 30, nothing)
    assert float(drifting.w) < 0.65
    assert float(converging.w) == pytest.approx(0.8, abs=1e-5)
    for site in converging.sites.values():  # what a control variate stands for
        gradient = site.curvature * (converging.w - site.optimum)
        torch.testing.assert_close(site.memory["own/w"], gradient, rtol=0, atol=1e-5)


def test_with_momentum_differences_of_weights_would_grow_without_bound() -> None:
    """Why the mean of directions is kept: option II to the letter on the same problem, where momentum makes it diverge."""
    x, c, rate = 2.0, 0.0, 0.002
    curvature, own, velocity = {0.0: 1.0, 1.0: 4.0}, {0.0: 0.0, 1.0: 0.0}, {0.0: 0.0, 1.0: 0.0}
    for _ in range(20):
        came, changes = [], []
        for optimum in own:
            y = x
            for _ in range(50):
                velocity[optimum] = 0.9 * velocity[optimum] + curvature[optimum] * (y - optimum) - own[optimum] + c
                y -= rate * velocity[optimum]
            change = (x - y) / (50 * rate) - c
            own[optimum] += change
            came.append(y)
            changes.append(change)
        x, c = sum(came) / 2, c + sum(changes) / 2
    assert max(map(abs, own.values())) > 1e6


def test_where_all_sites_are_equal_it_is_plain(parabola: Make, nothing: Batch) -> None:
    """To the bit, over rounds in which the rate falls, and with sites of different size."""
    a, b = (
        Server(
            {n: parabola([1.0, 7.0], [0.3, 2.0], optimizer=MOMENTUM) for n in "xyz"},
            {"x": 3, "y": 7, "z": 5},
            [0.1, 0.2],
        )
        for _ in range(2)
    )
    for number in range(4):
        rates = [0.05 / (1 + number), 0.03 / (1 + number)]
        corrected(a, rates, nothing)
        plain(b, rates, nothing)
        assert torch.equal(a.w, b.w)
    assert float(a.control["w"].abs().max()) > 0


def test_a_site_that_comes_late_is_corrected_by_all_that_the_others_know(parabola: Make, nothing: Batch) -> None:
    server = Server({"a": parabola([0.0], [1.0]), "b": parabola([1.0], [1.0])}, {"a": 1, "b": 1}, [2.0])
    corrected(server, [0.1], nothing, who=["a"])
    assert float(server.control["w"]) == pytest.approx(2.0 / 2), "half of the cases saw a gradient of 2"
    site = server.sites["b"]
    start = server.w.clone()
    step(site.lend(start, dict(server.control)), nothing)
    gradient = start - 1.0
    torch.testing.assert_close(site.network.w.detach(), start - 0.1 * (gradient + server.control["w"]))


def test_what_is_not_shared_is_not_corrected(parabola: Make, nothing: Batch) -> None:
    """A tensor that stays at its site is in no total."""
    site = parabola([1.0], [1.0])
    site.memory["own/w"] = torch.tensor([5.0], dtype=torch.float64)
    start = torch.zeros(1, dtype=torch.float64)
    step(site.lend(start, {"another": torch.ones(1)}), nothing)
    torch.testing.assert_close(site.network.w.detach(), torch.tensor([0.1], dtype=torch.float64))


def test_a_step_that_float16_leaves_out_does_not_count(parabola: Make, nothing: Batch) -> None:
    """Where a gradient overflows, no step is taken: the control variate is that of the others."""

    def sent(lost: int | None) -> Tensor:
        site = parabola([1.0], [2.0])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        local = replace(site.lend(torch.zeros(1, dtype=torch.float64), {}), scaler=scaler)
        for number in range(3):
            if number == lost:
                site.curvature *= float("inf")
            step(local, nothing)
            site.curvature = torch.tensor([2.0], dtype=torch.float64)
            if number != lost:
                site.network.w.data.zero_()
        change: Tensor = finish(local, steps=3)["w"]
        return change

    assert torch.equal(sent(None), sent(1))
    torch.testing.assert_close(sent(None), torch.tensor([-2.0], dtype=torch.float64))


def test_a_round_of_nothing_but_such_steps_changes_nothing(parabola: Make, nothing: Batch) -> None:
    site = parabola([1.0], [float("inf")])
    scaler = torch.amp.GradScaler("cpu")
    local = replace(
        site.lend(torch.zeros(1, dtype=torch.float64), {"w": torch.ones(1, dtype=torch.float64)}), scaler=scaler
    )
    step(local, nothing)
    assert torch.equal(finish(local, steps=1)["w"], torch.zeros(1, dtype=torch.float64))
    assert not site.memory
