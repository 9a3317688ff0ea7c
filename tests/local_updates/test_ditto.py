"""Ditto: the shared network is as ever, and the site's own lies where loss and distance balance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concilium.data.patches import Batch
from concilium.local_updates import Local, take
from concilium.local_updates.ditto import step

Make = Callable[..., Any]


def network(seed: int = 0) -> nn.Module:
    """Draws dropout, and keeps running statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)).train()


def lent(seed: int = 0, received: Any = None, personal: Local | None = None) -> Local:
    made = network(seed)
    optimizer = torch.optim.SGD(made.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    start = received or {n: t.clone() for n, t in made.state_dict().items()}
    return Local(made, optimizer, loss, nullcontext, start, 12.0, personal=personal)


def loss(logits: Any, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(logits, batch.labels[0][:, 0].long())


def batch(seed: int) -> Batch:
    image = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return Batch(image, ((image > 0).float(),))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_each_network_draws_as_if_it_were_alone(weight: float) -> None:
    """To the bit: the shared one is `plain` whatever the weight, the other with weight 0 is a network that trains alone."""
    local = lent()
    local = lent(personal=lent(seed=1, received=local.received))
    shared, alone = lent(), lent(seed=1)
    for number in range(4):
        torch.manual_seed(number)
        told = step(local, batch(number), weight=weight)
        for one in (alone, shared):
            torch.manual_seed(number)
            last = take(one, batch(number))
        assert torch.equal(told, last), "the loss is that of the shared network"
    assert same(local.network, shared.network)
    assert local.personal is not None
    assert same(local.personal.network, alone.network) == (weight == 0)


def test_the_sites_own_ends_where_loss_and_distance_balance(parabola: Make, nothing: Batch) -> None:
    """The minimum of a / 2 (v - o)^2 + weight / 2 (v - w)^2, for the weights w that came, not for those it trains beside."""
    site = parabola([1.0, -3.0], [2.0, 0.5])
    came = torch.tensor([4.0, 4.0], dtype=torch.float64)
    local = site.lend(came, {})
    for _ in range(400):
        step(local, nothing, weight=1.5)
    torch.testing.assert_close(
        site.own.w.detach(), (site.curvature * site.optimum + 1.5 * came) / (site.curvature + 1.5)
    )
    torch.testing.assert_close(site.network.w.detach(), site.optimum)


def test_a_large_weight_makes_it_the_shared_one(parabola: Make, nothing: Batch) -> None:
    site = parabola([1.0], [2.0], rate=1e-3)
    local = site.lend(torch.tensor([4.0], dtype=torch.float64), {})
    for _ in range(200):
        step(local, nothing, weight=900.0)
    assert float(site.own.w.detach()) == pytest.approx(4.0, abs=0.01)
