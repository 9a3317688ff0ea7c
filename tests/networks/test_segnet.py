"""SegNet's pooling, whose places are whole numbers within a window, against PyTorch's, whose places are those of the plane."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from concilium.networks.segnet import build, pooled, unpooled

SIZES = {(2, 2): (6, 8), (1, 2, 2): (3, 4, 6), (2, 2, 2): (4, 6, 2), (3, 2): (9, 4)}
POOL = {2: functional.max_pool2d, 3: functional.max_pool3d}
UNPOOL = {2: functional.max_unpool2d, 3: functional.max_unpool3d}


@pytest.mark.parametrize("stride", SIZES, ids=str)
def test_pooling_and_unpooling_are_pytorchs(stride: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *SIZES[stride], requires_grad=True)
    values, places = pooled(x, stride)
    assert places.dtype == torch.uint8
    assert places.max() < torch.tensor(stride).prod()
    expected, flat = POOL[len(stride)](x, stride, stride, return_indices=True)
    assert torch.equal(values, expected)
    y = torch.randn_like(values)
    assert torch.equal(unpooled(y, places, stride), UNPOOL[len(stride)](y, flat, stride, stride))
    weights = torch.randn_like(values)
    (ours,) = torch.autograd.grad((values * weights).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    assert torch.equal(ours, theirs)


def test_windows_that_reach_over_the_edge_hold_what_is_there() -> None:
    x = -torch.arange(1.0, 16.0).reshape(1, 1, 3, 5)
    values, places = pooled(x, (2, 2))
    assert values.tolist() == [[[[-1, -3, -5], [-11, -13, -15]]]]
    assert places.tolist() == [[[[0, 0, 0], [0, 0, 0]]]]


def test_a_place_that_no_window_has_does_no_harm() -> None:
    """It came from somewhere else. A flat index out of range would write elsewhere, or end the process."""
    y, places = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert not unpooled(y, places, (2, 2)).any()


def test_convolutions_are_vggs_and_their_mirror_image() -> None:
    plan = {"architecture": {"arch_kwargs": {"strides": [[1, 1]] + [[2, 2]] * 6}}}
    net = build(n_channels=3, n_labels=5, plan=plan, base_features=2)
    kernels = [tuple(p.shape[:2]) for n, p in net.named_parameters() if p.ndim == 4]
    down = [(2, 3), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (8, 8), (16, 8), *[(16, 16)] * 5]
    assert kernels[:13] == down
    assert kernels[13:] == [*[(i, o) for o, i in reversed(down[1:])], (5, 2)]
    assert net.names[-1] == "head0"
