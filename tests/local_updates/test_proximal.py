"""FedProx against closed forms, and against the loss with the term written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concilium.data.patches import Batch
from concilium.local_updates import Local
from concilium.local_updates.proximal import step

Make = Callable[..., Any]


def test_many_steps_end_where_loss_and_term_balance(parabola: Make, nothing: Batch) -> None:
    """The minimum of a / 2 (w - o)^2 + mu / 2 (w - w0)^2 is (a o + mu w0) / (a + mu)."""
    site = parabola([1.0, -3.0], [2.0, 0.5])
    start = torch.tensor([4.0, 4.0], dtype=torch.float64)
    local = site.lend(start, {})
    for _ in range(400):
        loss = step(local, nothing, mu=1.5)
    expected = (site.curvature * site.optimum + 1.5 * start) / (site.curvature + 1.5)
    torch.testing.assert_close(site.network.w.detach(), expected)
    torch.testing.assert_close(loss, site.loss([expected], nothing))  # told without the term


class Shared(nn.Module):
    """One weight under two names, one that does not train, one that nothing uses, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(2))
        self.second = self.first
        self.norm = nn.BatchNorm1d(3)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.norm(self.second(self.frozen(self.first(image)))),)


def objective(logits: Any, batch: Batch) -> Tensor:
    return (logits[0] ** 3 - batch.labels[0]).square().mean()


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_the_gradient_is_that_of_the_loss_with_the_term(mu: float) -> None:
    """Each tensor counts once, whatever its names; buffers and what does not train do not count; what is unused stays."""
    torch.manual_seed(0)
    network = Shared()
    received = {n: t.clone() for n, t in network.state_dict().items()}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    batch = Batch(torch.randn(5, 3), (torch.randn(5, 3),))
    local = Local(network, optimizer, objective, nullcontext, received, 1e9)
    step(local, batch, mu=mu)  # moves away from where the round started, so that the term has a gradient
    same = copy.deepcopy(network)
    start = {n: received[n] for n, p in same.named_parameters() if p.requires_grad and n != "unused"}
    moved = {n: p for n, p in same.named_parameters() if n in start}
    loss = objective(same(batch.image), batch)
    term = sum(((moved[n] - t) ** 2).sum() for n, t in start.items())
    expected = torch.autograd.grad(loss + mu / 2 * term, list(moved.values()))
    assert torch.equal(step(local, batch, mu=mu), loss.detach()), "the loss is told without the term"
    now = dict(network.named_parameters())
    for name, gradient in zip(moved, expected, strict=True):
        torch.testing.assert_close(now[name].grad, gradient, rtol=1e-5, atol=1e-7)
    assert network.unused.grad is None, "AdamW would shrink it, as plain training does not"
    assert torch.equal(network.frozen.weight, received["frozen.weight"])
