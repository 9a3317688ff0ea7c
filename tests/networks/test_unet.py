"""The plain U-Net: its parts' sizes, its shapes, and its output against one that is written out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from concilium import catalog
from concilium.errors import StudyError
from concilium.networks import CUTS, Stages, cut_apart
from concilium.networks.unet import build

CHANNELS, LABELS = 2, 3
THIN = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 1))


def plan_of(strides: Sequence[Sequence[int]]) -> dict[str, Any]:
    """All that a U-Net reads of nnU-Net's plan."""
    return {"architecture": {"arch_kwargs": {"strides": [list(s) for s in strides]}}}


def isotropic(dims: int, levels: int) -> list[tuple[int, ...]]:
    return [(1,) * dims, *[(2,) * dims] * (levels - 1)]


def made(strides: Sequence[Sequence[int]], **options: Any) -> Stages:
    torch.manual_seed(0)
    return build(n_channels=CHANNELS, n_labels=LABELS, plan=plan_of(strides), **{"base_features": 4, **options})


def n_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


PLANS = {"2D": isotropic(2, 4), "3D": isotropic(3, 3), "anisotropic": THIN}
SIZES = {"2D": (32, 24), "3D": (8, 12, 8), "anisotropic": (4, 16, 8)}
every_plan = pytest.mark.parametrize("kind", PLANS)
every_norm = pytest.mark.parametrize("norm", ["instance", "group", "batch"])


@pytest.mark.parametrize(
    ("cut", "front", "body", "tail"), [("shallow", 928, 7_752_800, 9_445), ("deep", 28_768, 7_661_248, 73_157)]
)
def test_the_parts_of_the_usual_u_net(cut: str, front: int, body: int, tail: int) -> None:
    """32 features, batch norm, colour pictures, five labels. At the front, `shallow`: 3 * 32 * 9 weights, 2 * 32 of the norm."""
    plan = plan_of(isotropic(2, 7))
    parts = cut_apart(build(n_channels=3, n_labels=5, plan=plan, norm="batch"), (cut,))
    assert [n_parameters(part) for part in (parts.front, parts.body, parts.tail)] == [front, body, tail]
    assert parts.at_site.names == parts.front.names + parts.tail.names


def test_what_the_named_cuts_leave_at_the_site() -> None:
    net = made(isotropic(2, 3))
    names = ("down0", "encode0", "down1", "encode1", "down2", "encode2", "up1", "decode1", "up0", "decode0", "head0")
    assert net.names == names
    sites = {cut: cut_apart(net, (cut,)).at_site.names for cut in CUTS}
    assert sites["shallow"] == ("down0", "decode0", "head0")
    assert sites["deep"] == ("down0", "encode0", "down1", "decode1", "up0", "decode0", "head0")


@every_plan
@every_norm
def test_features_double_and_maps_shrink_by_the_plans_strides(kind: str, norm: str) -> None:
    net = made(PLANS[kind], norm=norm)
    stack: tuple[Tensor, ...] = (torch.randn(2, CHANNELS, *SIZES[kind]),)
    size = SIZES[kind]
    for level, stride in enumerate(PLANS[kind]):
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        stack = (*stack[:-1], *net[f"down{level}"](stack[-1]))
        stack = (*stack[:-1], *net[f"encode{level}"](stack[-1]))
        assert stack[-1].shape == (2, 4 * 2**level, *size)
        assert len(stack) == level + 1, "one skip for each level above"
    (logits,) = net(torch.randn(2, CHANNELS, *SIZES[kind]))
    assert logits.shape == (2, LABELS, *SIZES[kind])


@pytest.mark.parametrize(("levels", "made_levels"), [(2, 2), (3, 3), (4, 4), (5, 4), (9, 4)])
def test_no_more_levels_than_the_plan_has(levels: int, made_levels: int) -> None:
    net = made(isotropic(2, 4), levels=levels)
    downs = [n for n in net.names if n.startswith("down")]
    assert downs == [f"down{level}" for level in range(made_levels)]
    assert len([n for n in net.names if n.startswith("up")]) == made_levels - 1


def test_one_head_with_and_without_deep_supervision() -> None:
    with_it, without = (made(isotropic(2, 3), deep_supervision=on) for on in (True, False))
    assert with_it.names == without.names
    assert len(with_it(torch.randn(1, CHANNELS, 16, 16))) == 1


@pytest.mark.parametrize("options", [{"levels": 1}, {"levels": 0}, {"base_features": 0}, {"base_features": -4}])
def test_no_width_and_too_few_levels_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(StudyError, match=r"is not allowed\. Allowed: 2 or more levels, 1 or more features"):
        made(isotropic(2, 3), **options)


def test_an_unknown_norm_is_refused_where_the_study_is_read() -> None:
    _, problems = catalog.fill("networks", "unet", {"norm": "layer"}, "[network]")
    assert len(problems) == 1
    assert "'instance', 'group', 'batch'" in problems[0]


# ------------------------------------------------------------------------------------------------------ written out by hand


def normalised(x: Tensor, kind: str, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the image, a group of 8 channels, or the batch; then scaled and shifted."""
    spatial = tuple(range(2, x.ndim))
    broadcast = (1, -1, *[1] * len(spatial))
    if kind == "group":
        n = x.shape[1]
        size = 8 if n % 8 == 0 else n
        grouped = x.reshape(x.shape[0], n // size, size, *x.shape[2:])
        axes = tuple(range(2, grouped.ndim))
        mean, variance = grouped.mean(axes, keepdim=True), grouped.var(axes, correction=0, keepdim=True)
        z = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    else:
        axes = spatial if kind == "instance" else (0, *spatial)
        z = (x - x.mean(axes, keepdim=True)) / (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()
    return z * weight.reshape(broadcast) + bias.reshape(broadcast)


def by_hand(w: Mapping[str, Tensor], x: Tensor, strides: Sequence[Sequence[int]], norm: str) -> Tensor:
    dims = x.ndim - 2
    convolve = {2: functional.conv2d, 3: functional.conv3d}[dims]
    transpose = {2: functional.conv_transpose2d, 3: functional.conv_transpose3d}[dims]
    pool = {2: functional.max_pool2d, 3: functional.max_pool3d}[dims]

    def block(y: Tensor, stage: str) -> Tensor:
        y = convolve(y, w[f"{stage}.convolution.weight"], padding=1)
        return normalised(y, norm, w[f"{stage}.norm.weight"], w[f"{stage}.norm.bias"]).clamp(min=0)

    skips: list[Tensor] = []
    for level, stride in enumerate(strides):
        if level:
            skips.append(x)
            x = pool(x, tuple(stride))
        x = block(block(x, f"down{level}"), f"encode{level}")
    for level in reversed(range(len(skips))):
        up = f"up{level}.upsample"
        x = transpose(x, w[f"{up}.weight"], w[f"{up}.bias"], stride=tuple(strides[level + 1]))
        x = block(block(torch.cat((x, skips[level]), 1), f"up{level}"), f"decode{level}")
    return convolve(x, w["head0.convolution.weight"], w["head0.convolution.bias"])


@every_plan
@every_norm
def test_the_output_is_that_of_a_u_net_written_by_hand(kind: str, norm: str) -> None:
    net = made(PLANS[kind], norm=norm).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    image = torch.randn(2, CHANNELS, *SIZES[kind], dtype=torch.float64)
    with torch.no_grad():
        (logits,) = net(image)
        expected = by_hand(dict(net.named_parameters()), image, PLANS[kind], norm)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_the_norms_differ() -> None:
    """Else the test above would not tell which was built."""
    image = torch.randn(2, CHANNELS, 32, 24)
    outputs = [made(PLANS["2D"], norm=norm)(image)[0] for norm in ("instance", "group", "batch")]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(outputs, 2))


@pytest.mark.parametrize(("features", "groups"), [(4, (1, 1, 2)), (12, (1, 3, 6)), (16, (2, 4, 8)), (20, (1, 5, 10))])
def test_groups_of_eight_channels(features: int, groups: tuple[int, ...]) -> None:
    """A width that eight does not divide is one group."""
    net = made(isotropic(2, 3), norm="group", base_features=features)
    assert tuple(net[f"down{level}"].norm.num_groups for level in range(3)) == groups
