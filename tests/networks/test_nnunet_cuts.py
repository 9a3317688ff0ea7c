"""nnU-Net's networks cut into parts: what each part reaches, and gradients that return by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from concilium.errors import ContractError
from concilium.networks import Stack, Stage, Stages


def run_apart(
    nnunet: SimpleNamespace, net: Stages, after: Sequence[str], x: Tensor, tamper: Callable[[int, list[Tensor]], None]
) -> Stack:
    """Run the parts as separate parties would: only what a part reaches goes in, detached; gradients return by hand.

    `tamper(i, gradients)` may change what part i receives for the maps that it left.
    """
    stack, records = (x,), []
    for part in net.split(*after):
        home = len(stack) - part.reach()
        incoming = tuple(m.detach().requires_grad_() for m in stack[home:])
        out = part.run(incoming)
        records.append((home, incoming, out))
        stack = (*stack[:home], *out)
    leaves = [y.detach().requires_grad_() for y in stack]
    nnunet.weighted(leaves[::-1]).backward()
    gradients = [y.grad for y in leaves]
    for i, (home, incoming, out) in reversed(list(enumerate(records))):
        received = [g.clone() for g in gradients[home:] if g is not None]
        tamper(i, received)
        torch.autograd.backward(out, received)
        gradients = gradients[:home] + [m.grad for m in incoming]
    return stack[::-1]


def worst_gradient_error(
    nnunet: SimpleNamespace,
    small: dict[str, Any],
    after: Sequence[str],
    tamper: Callable[[int, list[Tensor]], None] = lambda i, g: None,
) -> float:
    """Largest difference of any gradient between apart and whole, relative to the largest gradient, in float64."""
    net = nnunet.made(small).double()
    nnunet.scramble(net)
    x = nnunet.image(small, torch.float64)
    y = net(x)
    nnunet.weighted(y).backward()
    whole = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    apart_y = run_apart(nnunet, net, after, x, tamper)
    apart = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(apart) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(y, apart_y, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in zip(apart, whole, strict=True))
    return difference / max(float(g.abs().max()) for g in whole)


POINTS = ("down0", "down1", "down2", "down3", "up2", "up1", "up0")


def test_every_stage_before_the_heads_is_a_split_point(nnunet: SimpleNamespace, small: dict[str, Any]) -> None:
    assert nnunet.made(small).split_points == POINTS


@pytest.mark.parametrize(
    "after", [(), *itertools.combinations(POINTS, 1), *itertools.combinations(POINTS, 2)], ids=" ".join
)
def test_parts_give_the_gradients_of_the_whole(
    nnunet: SimpleNamespace, small: dict[str, Any], after: tuple[str, ...]
) -> None:
    assert worst_gradient_error(nnunet, small, after) <= 1e-9


@pytest.mark.parametrize("factor", [0.0, 2.0], ids=["dropped", "doubled"])
@pytest.mark.parametrize(
    ("after", "crossing"),
    [(("down1", "up1"), (2, 2)), (("down2", "up0"), (3, 3)), (("down0", "down2"), (1, 3))],
    ids=["down1 up1", "down2 up0", "down0 down2"],
)
def test_a_wrong_gradient_of_any_map_is_noticed(
    nnunet: SimpleNamespace, small: dict[str, Any], after: tuple[str, str], crossing: tuple[int, int], factor: float
) -> None:
    for part, n_maps in enumerate(crossing):
        for position in range(n_maps):

            def tamper(i: int, gradients: list[Tensor], part: int = part, position: int = position) -> None:
                if i == part:
                    gradients[position] *= factor

            assert worst_gradient_error(nnunet, small, after, tamper) > 1e-6, (part, position)


@pytest.mark.parametrize(
    ("after", "reached"),
    [
        (("down1", "up1"), (1, 1, 3)),  # the skip of down0 stays at home while the body runs
        (("down2", "up2"), (1, 1, 3)),
        (("up2", "up1"), (1, 2, 3)),
        (("down3", "up0"), (1, 4, 3)),
    ],
    ids=["down1 up1", "down2 up2", "up2 up1", "down3 up0"],
)
def test_reach_is_the_number_of_maps_that_a_part_touches(
    nnunet: SimpleNamespace, small: dict[str, Any], after: tuple[str, str], reached: tuple[int, ...]
) -> None:
    stack: Stack = (nnunet.image(small),)
    for part, reach in zip(nnunet.made(small).split(*after), reached, strict=True):
        assert part.reach() == reach
        out = part.run(stack[len(stack) - reach :])
        with pytest.raises(ContractError, match="Check the split point"):
            part.run(stack[len(stack) - reach + 1 :])
        stack = (*stack[: len(stack) - reach], *out)


def test_parts_own_all_tensors_together(nnunet: SimpleNamespace, small: dict[str, Any]) -> None:
    net = nnunet.made(small)
    parts = net.split("down1", "up1")
    names = [name for part in parts for name in part.state_dict()]
    assert sorted(names) == sorted(net.state_dict())
    assert all(p is dict(net.named_parameters())[name] for part in parts for name, p in part.named_parameters())


@pytest.mark.parametrize(
    "after", [("up1", "down1"), ("down1", "down1"), ("head1",), ("head0",), ("bottleneck",)], ids=" ".join
)
def test_impossible_split_points_are_refused(
    nnunet: SimpleNamespace, small: dict[str, Any], after: tuple[str, ...]
) -> None:
    with pytest.raises(ContractError, match=r"Split points .*down0, down1, down2, down3, up2, up1, up0\."):
        nnunet.made(small).split(*after)


def test_a_stage_must_leave_what_it_says() -> None:
    class Liar(Stage):
        takes = leaves = 1

        def forward(self, *maps: Tensor) -> Stack:
            return (*maps, *maps)

    with pytest.raises(ContractError, match=r"Stage head0 left 2 maps\. It must leave 1"):
        Stages({"head0": Liar()})(torch.zeros(1))
