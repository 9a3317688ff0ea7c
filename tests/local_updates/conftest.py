"""A problem whose answer is known: every loss is a parabola."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concilium.data.patches import Batch
from concilium.local_updates import Local

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can share `averaging`

NOTHING = Batch(torch.zeros(1), (torch.zeros(1),))
"""What the loss does not depend on."""


class Point(nn.Module):
    """Weights as they are, whatever the image; and a buffer that no gradient reaches."""

    def __init__(self, w: Sequence[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, image: Tensor) -> tuple[Tensor]:
        self.seen += 1
        return (self.w,)


class Parabola:
    """A site whose loss is curvature / 2 * (w - optimum)^2, over all weights."""

    def __init__(self, optimum: Sequence[float], curvature: Sequence[float], optimizer: Callable[..., Any]) -> None:
        self.optimum, self.curvature = (torch.tensor(x, dtype=torch.float64) for x in (optimum, curvature))
        self.network, self.own = Point([0.0] * len(optimum)), Point([0.0] * len(optimum))
        self.optimizer, self.own_optimizer = (optimizer(n.parameters()) for n in (self.network, self.own))
        self.memory: dict[str, Tensor] = {}

    def loss(self, logits: Sequence[Tensor], batch: Batch) -> Tensor:
        return 0.5 * (self.curvature * (logits[0] - self.optimum) ** 2).sum()

    def lend(self, w: Tensor, control: dict[str, Tensor]) -> Local:
        """What a round that starts from these weights works on."""
        received = {"w": w.clone(), "seen": torch.zeros(3)}
        self.network.load_state_dict(received)
        personal = Local(self.own, self.own_optimizer, self.loss, nullcontext, received, 1e9)
        return Local(
            self.network, self.optimizer, self.loss, nullcontext, received, 1e9, control=control, memory=self.memory,
            personal=personal,
        )  # fmt: skip


@pytest.fixture
def parabola() -> Callable[..., Parabola]:
    """`parabola(optimum, curvature, rate=0.1)`: a site; `optimizer` in place of plain gradient descent."""

    def make(
        optimum: Sequence[float], curvature: Sequence[float], *, rate: float = 0.1, optimizer: Any = torch.optim.SGD
    ) -> Parabola:
        return Parabola(optimum, curvature, lambda parameters: optimizer(parameters, lr=rate))

    return make


@pytest.fixture
def nothing() -> Batch:
    """A batch that no parabola looks at."""
    return NOTHING
