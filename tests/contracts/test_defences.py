"""What every defence keeps to (see `concilium.defences`). Its signature: tests/test_catalog.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from concilium import catalog
from concilium.defences import Defence, OnMaps, defended, guards_of, lapses
from concilium.messages import Guard, PlugIn
from concilium.networks import Stages, cut_apart
from concilium.networks.unet import build as unet

NEUTRAL: dict[str, dict[str, Any]] = {
    "dropout": {"share": 0.0},
    "gaussian": {"scale": 0.0, "bound": 1e30},
    "laplace": {"scale": 0.0, "bound": 1e30},
    "nopeek": {"weight": 0.0},
    "project": {"channels": 64},
    "quantise": {"bits": 24},
}
"""Settings with which each changes nothing."""
WIDTH = 6
every = pytest.mark.parametrize("name", catalog.names("defences"))
in_2d_and_3d = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])


def made(name: str, dims: int, **options: Any) -> Defence:
    filled, problems = catalog.fill("defences", name, options, "[[defences]]")
    assert not problems
    found = catalog.load("defences", name)(n_channels=WIDTH, n_axes=dims, **filled)
    assert isinstance(found, Defence)
    return found


def a_map(dims: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, WIDTH, *(8, 6, 4)[:dims], generator=generator) * 2


def test_each_has_settings_that_change_nothing() -> None:
    assert set(NEUTRAL) == set(catalog.names("defences"))


@every
@in_2d_and_3d
def test_neutral_settings_leave_every_bit_and_add_nothing(name: str, dims: int) -> None:
    defence, m = made(name, dims, **NEUTRAL[name]), a_map(dims).requires_grad_()
    sent = defence.send(m)
    assert torch.equal(sent, m)
    assert (defence.receive, defence.penalty, defence.n_channels) == (None, None, WIDTH)
    (gradient,) = torch.autograd.grad(sent.sum(), m)
    assert torch.equal(gradient, torch.ones_like(m))


@every
@in_2d_and_3d
def test_shapes_are_kept_gradients_pass_and_the_input_is_left_alone(name: str, dims: int) -> None:
    defence, m = made(name, dims), a_map(dims)
    before = m.clone()
    m.requires_grad_()
    sent = defence.send(m)
    back = sent if defence.receive is None else defence.receive(sent)
    assert sent.shape == (4, defence.n_channels, *m.shape[2:])
    assert back.shape == m.shape
    assert torch.equal(m.detach(), before)
    loss = back.square().sum()
    if defence.penalty is not None:
        loss = loss + defence.penalty(torch.randn(4, 2, *m.shape[2:], generator=torch.Generator().manual_seed(1)), sent)
    loss.backward()
    assert m.grad is not None
    assert m.grad.isfinite().all()
    assert m.grad.ne(0).float().mean() > 0.2


@every
def test_what_it_does_is_a_function_of_the_generators_state(name: str) -> None:
    defence, m = made(name, 2), a_map(2)
    torch.manual_seed(5)
    first = defence.send(m)
    torch.manual_seed(5)
    assert torch.equal(first, defence.send(m))


@every
def test_it_does_the_same_in_evaluation_as_in_training(name: str) -> None:
    stage = guards_of(("features",), [a_map(2)], [plug_in(name)])[0]["defence0"]
    torch.manual_seed(5)
    trained = stage.train()(a_map(2))
    torch.manual_seed(5)
    assert torch.equal(trained[0], stage.eval()(a_map(2))[0])
    changes = name != "nopeek"
    assert torch.equal(trained[0], a_map(2)) != changes


@every
def test_maps_without_a_gradient_or_channels_pass_untouched(name: str) -> None:
    whole, frame = torch.arange(24, dtype=torch.uint8).reshape(1, 1, 4, 6), torch.empty(1, 0, 8, 8)
    maps = (whole, frame, a_map(2)[:1])
    at_site, at_server = guards_of(("places", "features", "features"), maps, [plug_in(name)])
    left = at_site["defence0"](*maps)
    assert left[0] is whole
    assert left[1] is frame
    for stage in at_server.values():
        assert isinstance(stage, OnMaps)
        left = stage(*left)
        assert left[0] is whole
        assert left[1] is frame


@every
@pytest.mark.parametrize("cut", [("shallow",), ("deep",), ("down0", "up0")], ids=" ".join)
def test_the_whole_network_computes_what_its_parts_do(name: str, cut: tuple[str, ...]) -> None:
    """The parts hold all tensors once; the defence is the front's, what its receiver undoes the body's."""
    bare = network()
    guard = Guard((plug_in(name), plug_in("project", channels=2)), cut, reveal_labels=True)
    whole = defended(copy.deepcopy(bare), guard, image=(1, 2, 16, 16))
    parts = cut_apart(whole, cut, reveal_labels=True)
    owned = [set(part.state_dict()) for part in (parts.front, parts.body, parts.tail)]
    assert sum(map(len, owned)) == len(set.union(*owned)) == len(whole.state_dict())
    assert [n for n in parts.front.names if n.startswith("defence")] == ["defence0", "defence1"]
    assert parts.body.names[0] == "restore1"
    assert {n: t for n, t in whole.state_dict().items() if n in bare.state_dict()}.keys() == bare.state_dict().keys()
    image = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(5)
    stack = parts.front.run((image,))
    n = parts.body.reach()
    assert {m.shape[1] for m in stack[-n:] if m.is_floating_point()} == {2}
    there = parts.body.run(stack[-n:])
    apart = parts.tail.run((*stack[:-n], *there))[::-1]
    torch.manual_seed(5)
    together = whole(image)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@every
def test_neutral_defences_in_a_network_change_no_bit_of_it(name: str) -> None:
    bare = network()
    guard = Guard((PlugIn(name, NEUTRAL[name]),), ("deep",))
    image = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(defended(copy.deepcopy(bare), guard, image=(1, 2, 16, 16))(image)[0], bare(image)[0])


def plug_in(name: str, **options: Any) -> PlugIn:
    return PlugIn(name, catalog.fill("defences", name, options, "[[defences]]")[0])


def network() -> Stages:
    torch.manual_seed(1)
    return unet(
        n_channels=2,
        n_labels=3,
        plan={"architecture": {"arch_kwargs": {"strides": [[1, 1], [2, 2], [2, 2]]}}},
        deep_supervision=False,
        base_features=4,
        levels=3,
    )


def test_dropout_that_is_off_at_prediction_drops_in_training_only_and_says_so() -> None:
    (stage,) = guards_of(("features",), [a_map(2)], [plug_in("dropout", at_prediction=False)])[0].values()
    assert torch.equal(stage.eval()(a_map(2))[0], a_map(2))
    assert float((stage.train()(a_map(2))[0] == 0).float().mean()) > 0.3
    assert lapses("m", [plug_in("dropout"), plug_in("gaussian")]) == []
    (text,) = lapses("m", [plug_in("dropout", at_prediction=False)])
    assert text.startswith("m: dropout with at_prediction = false drops nothing in validation and prediction")
