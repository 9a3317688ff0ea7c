"""Segment-Anything as stages: what is added to it begins as nothing, and changes nothing that it should not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from concilium.errors import ContractError, StudyError
from concilium.network_sizes import plan_for, sizes_of
from concilium.networks import Stages, cut_apart
from concilium.networks.sam import build, merged, prompted

SMALL: dict[str, Any] = {
    "width": 16, "depth": 3, "heads": 2, "patch": 4, "image_size": 32, "window": 3, "whole_image_blocks": (1,),
    "decoder_features": 16,
}  # fmt: skip
PLAN, VOLUMES = plan_for((32, 32)), plan_for((8, 32, 32))


def made(n_channels: int = 3, n_labels: int = 2, plan: dict[str, Any] = PLAN, **options: Any) -> Stages:
    torch.manual_seed(0)
    network = build(n_channels=n_channels, n_labels=n_labels, plan=plan, **SMALL | options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "relative" in name:
                p.normal_(std=0.5)  # zero at first, and so without effect
    return network


def alike(network: Stages, plain: Stages) -> Stages:
    """The network with the weights of another, and its own for what that one lacks."""
    network.load_state_dict(network.state_dict() | plain.state_dict())
    return network


def image(*size: int, n: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(2))


def shake(network: Stages, *names: str) -> None:
    """Values for tensors that are zero at first."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if any(n in name for n in names):
                p.normal_(std=0.3)


# ------------------------------------------------------------------------------------------------------------ how large


def test_as_many_parameters_as_published() -> None:
    """FedFMS's FedSAM with ViT-B, and the authors' ViT-L; counted, not run."""
    assert sizes_of("sam", labels=2).whole.parameters == 93_735_472
    assert sizes_of("sam", labels=2, options={"size": "vit_l"}).whole.parameters == 312_342_832
    with torch.device("meta"):
        network = build(n_channels=3, n_labels=2, plan=PLAN)
    n = {name: sum(p.numel() for p in network[name].parameters()) for name in network.names}
    prompts = sum(p.numel() for name, p in network.named_parameters() if ".prompts." in name)
    decoder = n["decoder"] + n["head0"] - prompts
    assert (sum(n.values()) - decoder - prompts, prompts, decoder) == (89_670_912, 6_220, 4_058_340)


@pytest.mark.parametrize(("depth_too", "expected"), [(False, 11_159_268), (True, 14_709_732)])
def test_adapters_and_decoder_have_as_many_as_fedmsa(depth_too: bool, expected: int) -> None:
    plan = VOLUMES if depth_too else PLAN
    with torch.device("meta"):
        network = build(n_channels=3, n_labels=2, plan=plan, adapt="adapters", through_plane=depth_too)
    named = dict(network.named_parameters())
    adapters = sum(p.numel() for n, p in named.items() if ".adapter" in n)
    decoder = sum(p.numel() for n, p in named.items() if n.startswith(("decoder.", "head0.")) and ".prompts." not in n)
    assert adapters == 12 * (3 if depth_too else 2) * 295_872
    assert adapters + decoder == expected


# ---------------------------------------------------------------------------------------------------------- what is added

ADDED: dict[str, dict[str, Any]] = {
    "adapters": {"adapt": "adapters"},
    "low rank": {"adapt": "lora", "rank": 3},
    "through the plane": {"adapt": "adapters", "through_plane": True, "plan": VOLUMES},
}


@pytest.mark.parametrize("options", ADDED.values(), ids=ADDED.keys())
def test_at_first_the_output_is_that_of_the_plain_network(options: dict[str, Any]) -> None:
    plan = options.get("plan", PLAN)
    plain = made(plan=plan)
    network = alike(made(**options), plain)
    x = image(*(5, 24, 32)[-len(plan["patch_size"]) :])
    assert torch.allclose(network(x)[0], plain(x)[0], rtol=0, atol=1e-6)
    added = set(network.state_dict()) - set(plain.state_dict())
    assert added
    assert all(".adapter" in n or ".lora" in n for n in added)
    network(x)[0].square().mean().backward()
    moved = {n for n, p in network.named_parameters() if n in added and p.grad is not None and bool(p.grad.any())}
    assert moved == {n for n in added if ".up." in n}, "the first step moves the last layers, and these the others"
    shake(network, ".adapter", ".lora")
    assert not torch.allclose(network(x)[0], plain(x)[0], rtol=0, atol=1e-3)


def test_low_rank_is_merged_into_plain_weights() -> None:
    network = made(adapt="lora", rank=3)
    shake(network, ".lora")
    weights = network.state_dict()
    before = {n: t.clone() for n, t in weights.items()}
    plain = made()
    plain.load_state_dict(merged(weights))
    assert torch.allclose(network(image(32, 32))[0], plain(image(32, 32))[0], rtol=0, atol=1e-5)
    assert all(torch.equal(weights[n], before[n]) for n in before), "what was given is as it was"
    changed = {n for n, t in plain.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if n.endswith(".inputs.weight")}
    double = {n: t.double() for n, t in weights.items()}
    assert all(torch.equal(double[n], before[n].double()) for n in merged(double))
    assert merged(before | plain.state_dict()).keys() == plain.state_dict().keys()


def test_weights_without_low_rank_are_merged_to_themselves() -> None:
    weights = made(adapt="adapters").state_dict()
    assert merged(weights).keys() == weights.keys()
    assert all(torch.equal(t, weights[n]) for n, t in merged(weights).items())


def test_slices_know_of_their_neighbours_only_through_their_adapter() -> None:
    x = image(5, 16, 16)
    y = x.clone()
    y[:, :, 1] += 1
    for through, reach in ((False, {1}), (True, {0, 1, 2})):
        network = made(plan=VOLUMES, adapt="adapters", through_plane=through, depth=1, whole_image_blocks=())
        shake(network, ".adapter")
        apart = (network(x)[0] - network(y)[0]).abs().amax((0, 1, 3, 4))
        assert {i for i, d in enumerate(apart) if d > 1e-6} == reach


def test_a_volume_is_its_slices() -> None:
    network, flat = made(plan=VOLUMES), made()
    flat.load_state_dict(network.state_dict())
    x = image(3, 21, 30)
    (logits,) = network(x)
    assert logits.shape == (2, 2, 3, 21, 30)
    for i in range(3):
        assert torch.allclose(logits[:, :, i], flat(x[:, :, i])[0], atol=1e-6)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for again in (False, True):
        network = made(checkpointing=again, adapt="adapters").train()
        shake(network, ".adapter")
        network(image(20, 28))[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


def test_checkpointing_keeps_less() -> None:
    kept: dict[bool, int] = {False: 0, True: 0}
    for again in kept:

        def keep(values: Tensor, again: bool = again) -> Tensor:
            kept[again] += values.numel()
            return values

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
            made(checkpointing=again).train()(image(32, 32))
    assert kept[True] < kept[False] / 2


def test_what_gets_no_gradient_is_what_prompts_need() -> None:
    network = made().train()
    network(image(32, 32))[0].square().mean().backward()
    without = {n for n, p in network.named_parameters() if p.grad is None}
    spare = {n for n, _ in network.named_parameters() if ".prompts." in n or n.startswith("head0.quality")}
    others = {n for n, _ in network.named_parameters() if n.startswith(tuple(f"head0.masks.{i}." for i in (1, 2, 3)))}
    assert without - others == spare


# ------------------------------------------------------------------------------------------------------------ intensities


@pytest.mark.parametrize(
    ("told", "option", "factor"),
    [
        ({"normalization_schemes": ["ZScoreNormalization"] * 3}, "plan", None),
        ({"normalization_schemes": ["CTNormalization"] * 3}, "plan", None),
        ({"normalization_schemes": ["RGBTo01Normalization"] * 3}, "plan", 255),
        ({"normalization_schemes": ["NoNormalization"] * 3}, "plan", 1),
        ({"resize": {"size": [32, 32], "intensity": "zscore"}}, "plan", None),
        ({"resize": {"size": [32, 32], "intensity": "0-1"}}, "plan", 255),
        ({"resize": {"size": [32, 32], "intensity": [0, 255]}}, "plan", 255),
        ({"normalization_schemes": ["ZScoreNormalization"] * 3}, "0-1", 255),
        ({}, "plan", None),
    ],
)
def test_pixels_are_as_segment_anything_expects(told: dict[str, Any], option: str, factor: float | None) -> None:
    mean, deviation = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    x = image(4, 4)
    pixels = made(plan=PLAN | told, intensity=option)["embed"].pixels  # type: ignore[operator]
    expected = x if factor is None else (factor * x - mean[:, None, None]) / deviation[:, None, None]
    assert torch.allclose(pixels(x), expected, atol=1e-5)  # type: ignore[operator]


def test_grey_is_all_colours_and_many_channels_are_mixed() -> None:
    x = image(16, 16, channels=1)
    grey, colours = made(1, intensity="0-1"), made(3, intensity="0-1")
    colours.load_state_dict(grey.state_dict())
    assert torch.allclose(grey(x)[0], colours(x.expand(-1, 3, -1, -1))[0], atol=1e-6)
    many = made(5)
    y = image(16, 16, channels=5)
    assert torch.allclose(many["embed"].pixels(y), y.mean(1, keepdim=True).expand(-1, 3, -1, -1), atol=1e-6)  # type: ignore[operator]
    assert many.state_dict().keys() - colours.state_dict().keys() == {"embed.pixels.mix.weight"}


def test_channels_that_differ_are_each_taken_as_they_are() -> None:
    schemes = ["ZScoreNormalization", "NoNormalization"]
    pixels = made(2, plan=PLAN | {"normalization_schemes": schemes})["embed"].pixels  # type: ignore[operator]
    x = torch.tensor([0.5, 114.495]).reshape(1, 2, 1, 1)
    assert torch.allclose(pixels(x), torch.full((1, 3, 1, 1), 0.25), atol=1e-5)  # type: ignore[operator]
    with pytest.raises(
        StudyError, match=r"intensity = 'plan' is not possible: the plan says zscore, 0-255 for 2 channels"
    ):
        made(1, plan=PLAN | {"normalization_schemes": schemes})


# ----------------------------------------------------------------------------------------------------------------- labels


def test_background_is_zero_and_regions_have_none() -> None:
    x = image(16, 16)
    assert not made(n_labels=4)(x)[0][:, 0].any()
    assert made(n_labels=4)(x)[0][:, 1:].abs().amax((0, 2, 3)).min() > 0
    regions = made(n_labels=2, plan=PLAN | {"regions": True})
    (logits,) = regions(x)
    assert logits.abs().amax((0, 2, 3)).min() > 0
    assert regions["head0"].labels.weight.shape == (2, 4, 1, 1)  # type: ignore[union-attr]
    one = made(n_labels=1, plan=PLAN | {"regions": True})
    one.load_state_dict(made().state_dict())
    assert torch.equal(one(x)[0][:, 0], made()(x)[0][:, 1])


# ------------------------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    "options", [{}, {"checkpointing": True}, *ADDED.values()], ids=["plain", "checkpointing", *ADDED.keys()]
)
def test_split_gradients_are_those_of_the_whole(options: dict[str, Any]) -> None:
    """Float64, cut at every pair of names, gradients handed over as between site and server."""
    plan = options.get("plan", PLAN)
    network = made(**options).double().train()
    shake(network, ".adapter", ".lora")
    x = image(*(3, 17, 23)[-len(plan["patch_size"]) :]).double()
    weights = torch.randn_like(network(x)[0])
    (network(x)[0] * weights).sum().backward()
    whole = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    for cut in (("shallow",), ("deep",), ("block1", "block2"), ("embed", "block2")):
        network.zero_grad(set_to_none=True)
        parts = cut_apart(network, cut)
        front = parts.front.run((x,))
        home, sent = front[:-1], front[-1].detach().requires_grad_()
        (left,) = parts.body.run((sent,))
        received = left.detach().requires_grad_()
        (logits,) = parts.tail.run((*home, received))
        (logits * weights).sum().backward()
        left.backward(received.grad)
        front[-1].backward(sent.grad)
        found = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        assert found.keys() == whole.keys()
        assert max(float((found[n] - whole[n]).abs().max()) for n in whole) < 1e-9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, r"width = 16, heads = 3, .* is not allowed\. Allowed: a width that is a multiple of heads"),
        ({"image_size": 30}, r"image_size = 30, patch = 4"),
        ({"whole_image_blocks": (3,)}, r"whole_image_blocks = \[3\] is not allowed\. .* blocks from 0 to 2"),
        ({"decoder_features": 24}, r"decoder_features = 24 is not allowed\. Allowed: multiples of 16"),
        ({"rank": 0}, r"rank = 0, .* is not allowed\. Allowed: 1 or more rank"),
        ({"through_plane": True, "adapt": "adapters"}, r"through_plane = true is not possible .* patches of 2 axes"),
        ({"through_plane": True, "plan": VOLUMES}, r"through_plane = true is not possible with adapt = 'none'"),
        ({"depth": 0}, r"depth = 0, .* is not allowed"),
    ],
)
def test_what_is_not_possible_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        made(**options)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"boxes": torch.zeros(2, 3)},
        {"points": torch.zeros(2, 1, 2), "boxes": torch.zeros(3, 4)},
        {"boxes": torch.zeros(1, 4), "positive": torch.ones(1, 1)},
        {"points": torch.zeros(1, 1, 2), "positive": torch.ones(1, 2)},
    ],
    ids=str,
)
def test_prompts_that_do_not_fit_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=r"An image \(1, 3, 16, 16\) and prompts .* do not fit\. Allowed: an image"):
        prompted(made(), image(16, 16, n=1), **asked)


def test_prompts_on_an_image_of_any_size() -> None:
    with torch.no_grad():
        answers = prompted(made(n_labels=3), image(18, 27, n=1), boxes=torch.tensor([[1.0, 2.0, 9.0, 9.0]] * 3))
    assert answers.masks.shape == (3, 4, 18, 27)
    assert answers.logits.shape == (3, 3, 18, 27)
    assert answers.quality.shape == (3, 4)
