"""nnU-Net's networks as stages, against the library's own with the same weights."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn


def test_same_seed_gives_nnunets_initial_weights(nnunet: SimpleNamespace, plan: dict[str, Any]) -> None:
    torch.manual_seed(5)
    theirs = nnunet.library(plan).state_dict()
    torch.manual_seed(5)
    ours = nnunet.made(plan).state_dict()
    assert nnunet.same(nnunet.exported(ours, plan), theirs)
    torch.manual_seed(6)
    assert not nnunet.same(nnunet.made(plan).state_dict(), ours)


def test_outputs_and_gradients_are_bit_identical(nnunet: SimpleNamespace, plan: dict[str, Any]) -> None:
    ours, theirs = nnunet.made(plan), nnunet.library(plan)
    nnunet.scramble(ours)
    theirs.load_state_dict(nnunet.exported(ours.state_dict(), plan))
    x = nnunet.image(plan)
    torch.manual_seed(1)  # dropout
    y_ours = ours(x)
    torch.manual_seed(1)
    y_theirs = theirs(x)
    assert len(y_ours) == len(y_theirs) == plan["architecture"]["arch_kwargs"]["n_stages"] - 1
    assert all(torch.equal(a, b) for a, b in zip(y_ours, y_theirs, strict=True))
    assert y_ours[0].shape == (2, nnunet.n_labels, *x.shape[2:])

    nnunet.weighted(y_ours).backward()
    nnunet.weighted(y_theirs).backward()
    ours_by_name = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    theirs_by_name = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(ours_by_name) == len(theirs_by_name) == len(list(ours.parameters()))
    buffers = dict(ours.named_buffers())  # so that the names are complete
    in_their_names = nnunet.exported(ours_by_name | buffers, plan)
    assert all(torch.equal(in_their_names[name], grad) for name, grad in theirs_by_name.items())


def test_without_deep_supervision_it_is_nnunet_without(nnunet: SimpleNamespace, plan: dict[str, Any]) -> None:
    ours, theirs = nnunet.made(plan, deep_supervision=False), nnunet.library(plan, deep_supervision=False)
    nnunet.scramble(ours)
    theirs.load_state_dict(nnunet.exported(ours.state_dict(), plan))
    x = nnunet.image(plan)
    torch.manual_seed(1)  # dropout
    (y,) = ours(x)
    torch.manual_seed(1)
    assert torch.equal(y, theirs(x))


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_names_translate_there_and_back(nnunet: SimpleNamespace, plan: dict[str, Any], deep_supervision: bool) -> None:
    ours = nnunet.made(plan, deep_supervision=deep_supervision)
    nnunet.scramble(ours)
    theirs = nnunet.exported(ours.state_dict(), plan)
    assert nnunet.same(nnunet.imported(theirs, plan, deep_supervision=deep_supervision), ours.state_dict())
    reference = nnunet.library(plan).state_dict()
    assert theirs.keys() == reference.keys()
    assert nnunet.same(nnunet.exported(nnunet.imported(reference, plan), plan), reference)
    assert list(nnunet.imported(reference, plan)) == list(nnunet.made(plan).state_dict())


def test_each_tensor_is_there_once(nnunet: SimpleNamespace, plan: dict[str, Any]) -> None:
    theirs = nnunet.library(plan).state_dict()
    distinct = {tensor.data_ptr() for tensor in theirs.values()}
    ours = nnunet.made(plan).state_dict()
    assert len(ours) == len(distinct) < len(theirs)
    assert len({tensor.data_ptr() for tensor in ours.values()}) == len(ours)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["some", "all"])
def test_swapping_two_tensors_of_equal_shape_changes_the_output(
    every: bool, nnunet: SimpleNamespace, small: dict[str, Any]
) -> None:
    """Each tensor with the next one of its shape, or every pair of them."""
    ours, theirs = nnunet.made(small), nnunet.library(small)
    nnunet.scramble(ours)
    tensors, x = ours.state_dict(), nnunet.image(small)
    with torch.no_grad():
        expected = ours(x)
    # The norm after a convolution cancels its bias.
    cancelled = {name for name in tensors if name.endswith(".conv.bias") and not name.startswith("head")}
    pairs = [
        (a, b)
        for a, b in itertools.combinations(sorted(tensors.keys() - cancelled), 2)
        if tensors[a].shape == tensors[b].shape
    ]
    assert len(pairs) > 100
    following = dict(reversed(pairs))  # of all pairs that begin with a tensor the first
    for a, b in pairs if every else following.items():
        theirs.load_state_dict(nnunet.exported(tensors | {a: tensors[b], b: tensors[a]}, small))
        with torch.no_grad():
            swapped = theirs(x)
        assert not all(torch.equal(y, z) for y, z in zip(swapped, expected, strict=True)), (a, b)


# --------------------------------------------------------------------------------------------------- stages and their names


def test_stages_are_named_by_resolution_from_the_input(nnunet: SimpleNamespace) -> None:
    residual = nnunet.made(nnunet.plans["residual 3D"])
    assert residual.names == ("stem", "down0", "down1", "down2", "up1", "up0", "head1", "head0")
    finest_only = nnunet.made(nnunet.plans["plain 3D"], deep_supervision=False)
    assert finest_only.names == ("down0", "down1", "down2", "up1", "up0", "head0")


def test_equal_names_mean_equal_roles_at_any_depth(nnunet: SimpleNamespace) -> None:
    shallow, deep = (nnunet.made(nnunet.configuration(dims=2, levels=levels)).state_dict() for levels in (3, 4))
    assert shallow.keys() < deep.keys()
    assert all(shallow[name].shape == deep[name].shape for name in shallow)


def test_a_layer_is_known_by_its_name(nnunet: SimpleNamespace) -> None:
    modules = nnunet.made(nnunet.plans["residual 2D"]).named_modules()
    norms = [name for name, module in modules if isinstance(module, nn.InstanceNorm2d)]
    assert len(norms) == 1 + (2 * 4 * 2 + 3) + 2 * 3  # stem, blocks and their projections, decoder
    assert all(name.endswith(".norm") for name in norms)


@pytest.mark.parametrize(
    ("name", "x_to_y"), [("down0", (1, 1)), ("down2", (1, 2)), ("up2", (2, 1)), ("up1", (2, 2)), ("up0", (3, 3))]
)
def test_maps_that_carry_a_head_ride_along(
    nnunet: SimpleNamespace, small: dict[str, Any], name: str, x_to_y: tuple[int, int]
) -> None:
    stage = nnunet.made(small)[name]
    assert (stage.takes, stage.leaves) == x_to_y


@pytest.mark.parametrize(("name", "takes"), [("head2", 3), ("head1", 2), ("head0", 1)])
def test_a_head_replaces_its_own_map(nnunet: SimpleNamespace, small: dict[str, Any], name: str, takes: int) -> None:
    stage = nnunet.made(small)[name]
    maps = tuple(torch.zeros(1, stage.conv.in_channels, 2, 2) + i for i in range(takes))
    out = stage(*maps)
    assert stage.takes == stage.leaves == takes == len(out)
    assert out[0].shape[1] == nnunet.n_labels
    assert all(a is b for a, b in zip(out[1:], maps[1:], strict=True))
