"""Some of the windows of an image, as parties that segment together ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concilium.data.windows import Some, predict_logits


class Seen(nn.Module):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.given.append(image.clone())
        return image.new_zeros(image.shape[0], 2, *image.shape[2:])


def windows(plan: Any, image: Tensor, *, mirror: bool, some: Some | None = None) -> list[Tensor]:
    seen = Seen()
    predict_logits(
        seen, image, plan, labels={"background": 0, "x": 1}, device=torch.device("cpu"), mirror=mirror,
        precision="float32", some=some,
    )  # fmt: skip
    return seen.given


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 100, 70), (1, 1, 16, 16)])
def test_some_windows_are_those_of_all_and_few_more_are_made(
    shape: tuple[int, ...], mirror: bool, make_plan: Callable[..., Any]
) -> None:
    plan_2d = make_plan(n_dims=2, n_channels=1)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    every = windows(plan_2d, image, mirror=mirror)
    each = 4 if mirror else 1
    for start in range(0, len(every), 3):
        some = Some(start, 5)
        given = windows(plan_2d, image, mirror=mirror, some=some)
        assert some.n_windows == len(every)
        wanted = every[start : start + 5]
        mine = given[start - some.first :][: len(wanted)]
        assert len(mine) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
        assert len(given) <= len(wanted) + 2 * (each - 1), "no pass over the whole image"
