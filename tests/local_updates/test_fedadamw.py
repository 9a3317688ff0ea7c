"""FedAdamW against its equations in numpy, and on a problem on which sites with moments of their own go astray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from averaging import Server, plain

from concilium.data.patches import Batch
from concilium.local_updates.fedadamw import finish, step

Make = Callable[..., Any]
BETAS = (0.9, 0.999)


def corrected(server: Server, rates: Sequence[float], batch: Batch, *, align: float, who: Sequence[str] = ()) -> None:
    """A round of FedAdamW."""
    server.round(rates, batch, take=partial(step, align=align), finish=partial(finish, align=align), who=who)


@pytest.mark.parametrize("align", [0.0, 0.5])
def test_three_rounds_are_those_of_the_equations(parabola: Make, nothing: Batch, align: float) -> None:
    """The rate falls, and sites differ in size: the moment of each round begins as the mean of those after the last."""
    optima, curvatures = {"a": [1.0, 0.0], "b": [-2.0, 3.0]}, {"a": [1.0, 2.0], "b": [3.0, 0.5]}
    cases = {"a": 5, "b": 2}
    make = torch.optim.Adam
    server = Server({n: parabola(optima[n], curvatures[n], optimizer=make) for n in cases}, cases, [4.0, -4.0])
    x, before, last, v = np.array([4.0, -4.0]), None, 0.0, None
    m = {n: np.zeros(2) for n in cases}
    for number in range(3):
        rates = [0.1 / (1 + number + k) for k in range(4)]
        corrected(server, rates, nothing, align=align)
        way = np.zeros(2) if before is None else (x - before) / last
        came, moments = {}, {}
        for n in cases:
            y, w = x.copy(), np.zeros(2) if v is None else v.copy()
            for k, rate in enumerate(rates, 1):
                gradient = np.array(curvatures[n]) * (y - np.array(optima[n]))
                m[n] = BETAS[0] * m[n] + (1 - BETAS[0]) * gradient
                w = BETAS[1] * w + (1 - BETAS[1]) * gradient**2
                young = (1 - BETAS[0] ** k, 1 - BETAS[1] ** k) if v is None else (1.0, 1.0)
                y = y - rate * (m[n] / young[0]) / (np.sqrt(w / young[1]) + 1e-8) + rate * align * way
            came[n], moments[n] = y, w / (1 - BETAS[1] ** len(rates) if v is None else 1.0)
        before, last = x, sum(rates)
        x = sum(cases[n] * came[n] for n in cases) / 7
        v = sum(cases[n] * moments[n] for n in cases) / 7
        np.testing.assert_allclose(server.w, x, rtol=1e-6)
        np.testing.assert_allclose(server.control["w"], v, rtol=1e-5)


def test_who_knows_next_to_nothing_of_a_direction_does_not_outvote_who_does(parabola: Make, nothing: Batch) -> None:
    """Two sites hardly feel the parameter and would have it 0, one does and would have it 1; the joint optimum is 0.998."""

    def server() -> Server:
        def site(optimum: float, curvature: float) -> Any:
            return parabola([optimum], [curvature], optimizer=torch.optim.Adam)

        return Server({"a": site(0, 1e-3), "b": site(0, 1e-3), "c": site(1, 1.0)}, {"a": 1, "b": 1, "c": 1}, [2.0])

    own, shared = server(), server()
    for number in range(30):
        rates = [0.05 * (1 - number / 30)] * 10
        plain(own, rates, nothing)
        corrected(shared, rates, nothing, align=0.0)
    assert float(own.w) < 0.5
    assert float(shared.w) == pytest.approx(0.998, abs=0.02)


def test_a_site_that_comes_late_begins_with_the_moment_of_the_others(parabola: Make, nothing: Batch) -> None:
    make = torch.optim.Adam
    server = Server(
        {"a": parabola([0.0], [1.0], optimizer=make), "b": parabola([1.0], [1.0], optimizer=make)},
        {"a": 1, "b": 1},
        [2.0],
    )
    corrected(server, [0.1], nothing, align=0.5, who=["a"])
    assert float(server.control["w"]) == pytest.approx(4.0 / 2), "half of the cases saw a gradient of 2"
    site = server.sites["b"]
    step(site.lend(server.w.clone(), dict(server.control)), nothing)
    moment = site.optimizer.state[site.network.w]["exp_avg_sq"]
    assert float(moment) == pytest.approx(0.999 * 2.0 + 0.001 * float(server.w - 1) ** 2, rel=1e-6)


def test_what_is_not_shared_keeps_its_own_moment(parabola: Make, nothing: Batch) -> None:
    site = parabola([1.0], [1.0], optimizer=torch.optim.Adam)
    local = site.lend(torch.zeros(1, dtype=torch.float64), {"another": torch.full((1,), 9.0)})
    step(local, nothing)
    assert float(site.optimizer.state[site.network.w]["exp_avg_sq"]) == pytest.approx(0.001)
