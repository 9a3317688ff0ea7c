"""What a study will cost, from shapes alone: nothing is computed, and no memory is taken for the network or its maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from concilium.networks import Stages, cut_apart
from concilium.optimization import autocast
from concilium.transport import size_of


@dataclass(frozen=True)
class SplitBytes:
    """Bytes of tensors that a site sends (`up`) and receives (`down`) in split training, without headers.

    A step sends the maps of the front up and those of the body down, and the gradient of every float map the other way. A round
    begins and ends with the weights of front and tail.
    """

    step_up: int
    step_down: int
    weights: int

    def round(self, steps: int) -> tuple[int, int]:
        """Bytes up and down in a round of so many steps."""
        return steps * self.step_up + self.weights, steps * self.step_down + self.weights


def split_bytes(
    network: Callable[..., Stages],
    cut: tuple[str, ...],
    *,
    batch: tuple[int, ...],
    precision: str,
    reveal_labels: bool = False,
    transport: str = "float32",
) -> SplitBytes:
    """What travels in split training of this network, cut so, on images of shape `batch` (B, C, *patch).

    Raises:
        StudyError: the network cannot be cut so.
    """
    with FakeTensorMode(), torch.device("cpu"):
        whole = network() if reveal_labels else network(deep_supervision=False)
        parts = cut_apart(whole, cut, reveal_labels=reveal_labels)
        with autocast(torch.device("cpu"), precision):
            stack = parts.front.run((torch.empty(batch),))
            sent = stack[len(stack) - parts.body.reach() :]
            left = parts.body.run(sent)
        up, down = step_bytes(sent, left, transport)
        weights = sum(t.numel() * t.element_size() for t in parts.at_site.state_dict().values())
    return SplitBytes(up, down, weights)


def step_bytes(sent: Sequence[Tensor], left: Sequence[Tensor], transport: str = "float32") -> tuple[int, int]:
    """Bytes up and down in a step, where the front sends these maps and the body leaves those; it may leave some that came."""
    back = [m for m in left if all(m is not came for came in sent)]
    up = _travel(sent, transport) + _travel(back, transport, gradients=True)
    return up, _travel(back, transport) + _travel(sent, transport, gradients=True)


def _travel(maps: Sequence[Tensor], transport: str, *, gradients: bool = False) -> int:
    """Size of these maps, or of their gradients, as they travel."""
    return sum(size_of(m, transport, gradient=gradients) for m in maps)
