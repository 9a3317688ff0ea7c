"""The trimmed mean over sites, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import about, by_hand, mean_of, near, network, updates_of
from scipy import stats

from concilium.aggregation.median import rule as median
from concilium.aggregation.trimmed_mean import left_out, rule


def test_by_hand() -> None:
    """Of 1, 2, 4, 9, 100 the ends go: (2 + 4 + 9) / 3 = 5. Each element has its own ends."""
    updates = by_hand([1.0, 9.0], [2.0, 100.0], [100.0, 2.0], [9.0, 1.0], [4.0, 4.0])
    weights, state = rule(updates, {}, before={})
    assert weights["x"].tolist() == [5.0, 5.0]
    assert state == {}


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("n_sites", [10, 15])
def test_it_is_scipys(n_sites: int, share: float) -> None:
    networks = [network(seed) for seed in range(n_sites)]
    weights, _ = rule(updates_of(networks), {}, before=network(99), share=share)
    networks = about(networks, weights["norm.running_mean"])
    for name in ("conv.weight", "norm.running_mean", "norm.running_var"):
        stacked = np.stack([n[name].double().numpy() for n in networks])
        np.testing.assert_allclose(weights[name].numpy(), stats.trim_mean(stacked, share, axis=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("n_sites", "share", "expected"),
    [
        (1, 0.2, 0), (2, 0.2, 0), (3, 0.2, 1), (4, 0.2, 1), (9, 0.2, 1), (10, 0.2, 2), (100, 0.29, 29), (5, 0.49, 2),
        (4, 0.49, 1), (3, 0.01, 1), (100, 0.0, 0), (3, 0.0, 0),
    ],
)  # fmt: skip
def test_how_many_are_left_out(n_sites: int, share: float, expected: int) -> None:
    assert left_out(n_sites, share) == expected


def test_without_trimming_it_is_the_unweighted_mean() -> None:
    updates = updates_of([network(seed) for seed in range(4)], n_cases=(5, 5, 5, 5))
    weights, _ = rule(updates, {}, before=network(99), share=0.0)
    for name, tensor in mean_of(updates).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-7)


def test_of_three_sites_it_is_the_median() -> None:
    updates = updates_of([network(seed) for seed in range(3)])
    (a, _), (b, _) = (r(updates, {}, before=network(99)) for r in (rule, median))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_garbage_of_a_fifth_of_the_sites_moves_nothing_beyond_the_others() -> None:
    before = network(0)
    honest = [near(before, seed) for seed in range(1, 9)]
    garbage = [{name: torch.full_like(t, sign * 1_000_000) for name, t in before.items()} for sign in (1, -1)]
    weights, _ = rule(updates_of([garbage[0], *honest, garbage[1]]), {}, before=before)
    for name, tensor in weights.items():
        stacked = torch.stack([h[name] for h in about(honest, weights["norm.running_mean"])])
        assert (tensor <= stacked.amax(dim=0)).all()
        assert (tensor >= stacked.amin(dim=0)).all()
