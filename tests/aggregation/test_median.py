"""The median over sites, against torch and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import about, by_hand, near, network, same, updates_of

from concilium.aggregation import CHUNK, Update
from concilium.aggregation.median import rule


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4, 5, 8, 9])
def test_it_is_torchs_and_numpys_median(n_sites: int) -> None:
    networks = [network(seed) for seed in range(n_sites)]
    weights, state = rule(updates_of(networks), {}, before=network(99))
    networks = about(networks, weights["norm.running_mean"])
    for name in ("conv.weight", "norm.running_mean", "norm.running_var"):
        stacked = torch.stack([n[name] for n in networks])
        if n_sites % 2:  # with an even number torch takes the lower of the two in the middle
            assert torch.equal(weights[name], stacked.median(dim=0).values)
        np.testing.assert_allclose(weights[name].numpy(), np.median(stacked.double().numpy(), axis=0), rtol=1e-7)
    assert state == {}


def test_whole_numbers_stay_whole() -> None:
    updates = [Update({"n": torch.tensor([v])}, 1, 1, 0.5) for v in (2, 5, 100, 6)]
    weights, _ = rule(updates, {}, before={})
    assert (weights["n"].dtype, weights["n"].tolist()) == (torch.int64, [6])


def test_a_tensor_of_many_pieces_is_put_together_again() -> None:
    values = [torch.arange(2 * CHUNK + 3.0) + shift for shift in (0.0, 1.0, 5.0)]
    weights, _ = rule([Update({"x": v}, 1, 1, 0.5) for v in values], {}, before={})
    assert torch.equal(weights["x"], values[1])


@pytest.mark.parametrize("n_garbage", [1, 2])
def test_fewer_than_half_of_the_sites_cannot_move_it_beyond_the_others(n_garbage: int) -> None:
    before = network(0)
    honest = [near(before, seed) for seed in range(1, 4)]
    garbage = [{name: torch.full_like(t, 1_000_000) for name, t in before.items()}] * n_garbage
    weights, _ = rule(updates_of([*honest, *garbage]), {}, before=before)
    for name, tensor in weights.items():
        stacked = torch.stack([h[name] for h in about(honest, weights["norm.running_mean"])])
        assert (tensor <= stacked.amax(dim=0)).all()
        assert (tensor >= stacked.amin(dim=0)).all()


def test_numbers_of_cases_do_not_count() -> None:
    rows = ([1.0, 9.0], [2.0, 8.0], [7.0, 7.0])
    few, many = (rule(by_hand(*rows, n_cases=cases), {}, before={})[0] for cases in ((1, 1, 1), (500, 1, 3)))
    assert same(few, many)
    assert few["x"].tolist() == [2.0, 8.0]
