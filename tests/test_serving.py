"""What the server does to the maps of a window when it serves a vertical model."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from concilium.networks import Stages
from concilium.networks._fusion import FUSE, Fuse
from concilium.serving import _Between


@pytest.mark.parametrize("how", ["mean", "max"])
def test_whoever_is_not_there_does_not_count(how: Literal["mean", "max"]) -> None:
    """Not as zeros either, which would halve the mean, and be the maximum of what is below."""
    a, c = -torch.rand(1, 2, 4, 4), -torch.rand(1, 2, 4, 4)
    body = Stages({FUSE: Fuse(("a", "b", "c"), [2], 2, how)})
    between = _Between(("a", "b", "c"), body, torch.device("cpu"), "float32", "float32")
    expected = (a + c) / 2 if how == "mean" else torch.maximum(a, c)
    torch.testing.assert_close(between((a, c), ["a", "c"]), (expected,))
    (alone,) = between((a,), ["a"])
    assert torch.equal(alone, a)
    (every,) = between((a, a, a), ["a", "b", "c"])
    torch.testing.assert_close(every, a)
