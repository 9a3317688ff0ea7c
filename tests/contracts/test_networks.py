"""What every network of the folder keeps to (see `concilium.networks`)."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import concilium.networks
from concilium import catalog
from concilium.errors import ContractError, StudyError
from concilium.networks import Kinds, Stack, Stage, Stages, are_of_kinds, as_stages, cut_apart

FILES = [m.name for m in pkgutil.iter_modules(concilium.networks.__path__) if not m.name.startswith("_")]
NAMES = [name for name in FILES if name != "nnunet_trainer"]  # one stage: tests/local_updates/test_nnunet_trainer.py
FLAT = {"cgnet", "deeplabv3", "deeplabv3plus", "ducknet", "refinenet", "swin_unet"}  # published for pictures
CHANNELS, LABELS = 2, 3

every_network = pytest.mark.parametrize("name", NAMES)
in_2d_and_3d = pytest.mark.parametrize(
    ("name", "dims"), [pytest.param(n, d, id=f"{n} {d}D") for n in NAMES for d in ((2,) if n in FLAT else (2, 3))]
)
with_and_without = pytest.mark.parametrize("deep_supervision", [True, False], ids=["deep", "finest only"])


def plan(dims: int) -> dict[str, Any]:
    """One configuration as nnU-Net's planner writes it, with three resolutions and 4 features at the finest."""
    return {
        "patch_size": [16] * dims,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 16],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[3] * dims] * 3,
                "strides": [[1] * dims, [2] * dims, [2] * dims],
                "n_conv_per_stage": [2, 2, 2],
                "n_conv_per_stage_decoder": [2, 2],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def build_of(name: str) -> Callable[..., Stages]:
    build: Callable[..., Stages] = importlib.import_module(f"concilium.networks.{name}").build
    return build


def small(name: str) -> dict[str, Any]:
    """Options that make a network as small as it gets; full sizes are counted in `tests/test_described.py`, not run."""
    few = {"base_features": 4, "refine_features": 4, "head_features": 4, "window": 3}
    options = catalog.options("networks", name)
    if name == "fused":  # made of another network, of which it has all properties
        return {"of": "unet", "options": {"base_features": 4}}
    if name == "sam":
        encoder = {"width": 8, "depth": 3, "heads": 2, "window": 3, "whole_image_blocks": (1,), "patch": 4}
        return encoder | {"image_size": 32, "decoder_features": 16}
    blocks = {"blocks": tuple(min(n, 4) for n in options["blocks"].default)} if "blocks" in options else {}
    return {option: n for option, n in few.items() if option in options} | blocks


def made(name: str, dims: int = 2, deep_supervision: bool = True, **options: Any) -> Stages:
    torch.manual_seed(0)
    known = {"n_channels": CHANNELS, "n_labels": LABELS, "plan": plan(dims), "deep_supervision": deep_supervision}
    return build_of(name)(**known, **small(name) | options)


def image(*size: int) -> Tensor:
    return torch.randn(2, CHANNELS, *size, generator=torch.Generator().manual_seed(1))


def test_networks_are_found() -> None:
    assert "nnunet" in NAMES


@pytest.mark.parametrize("name", FILES)
def test_options_are_keyword_only_and_documented(name: str) -> None:
    build = build_of(name)
    parameters = inspect.signature(build).parameters
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values())
    assert {"n_channels", "n_labels", "plan", "deep_supervision"} <= parameters.keys()
    module = inspect.getmodule(build)
    assert module is not None
    assert module.__doc__
    assert build.__doc__
    options = parameters.keys() - {"plan"}
    assert all(f"{option}:" in build.__doc__ for option in options), f"say what each of {sorted(options)} is"


@every_network
@with_and_without
def test_heads_come_last_and_coarsest_first(name: str, deep_supervision: bool) -> None:
    names = made(name, deep_supervision=deep_supervision).names
    heads = [n for n in names if n.startswith("head")]
    assert names[len(names) - len(heads) :] == tuple(heads)
    assert names[-1] == "head0"
    levels = [int(n.removeprefix("head")) for n in heads]
    assert levels == sorted(levels, reverse=True)
    assert len(set(levels)) == len(levels)
    if not deep_supervision:
        assert heads == ["head0"]
    assert all(re.fullmatch(r"[a-z]+\d*", n) for n in names)


@in_2d_and_3d
@with_and_without
def test_every_tensor_has_one_owner_and_one_name(name: str, dims: int, deep_supervision: bool) -> None:
    net = made(name, dims, deep_supervision)
    tensors = net.state_dict()
    assert tensors
    storages = {t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}
    assert len(storages) == sum(1 for t in tensors.values() if t.numel())
    registered = [id(m) for _, m in net.named_modules(remove_duplicate=False)]
    assert len(registered) == len(set(registered))


@in_2d_and_3d
@with_and_without
def test_logits_finest_first_at_two_sizes(name: str, dims: int, deep_supervision: bool) -> None:
    net = made(name, dims, deep_supervision)
    sizes = [(16, 24, 8)[:dims], (32, 16, 16)[:dims]]
    for size in sizes:
        logits = net(image(*size))
        assert logits[0].shape == (2, LABELS, *size)
        assert len(logits) == sum(n.startswith("head") for n in net.names)
        assert all(y.shape[:2] == (2, LABELS) for y in logits)
        voxels = [y[0, 0].numel() for y in logits]
        assert voxels == sorted(voxels, reverse=True)
        assert all(y.isfinite().all() for y in logits)


@every_network
def test_same_seed_same_weights(name: str) -> None:
    a, b = made(name).state_dict(), made(name).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


@every_network
def test_at_each_split_point_the_parts_are_the_whole(name: str) -> None:
    net = made(name).eval()
    x = image(16, 24)
    whole = net(x)
    assert net.split_points
    for point in net.split_points:
        front, rest = net.split(point)
        assert front.reach() == 1
        stack = front.run((x,))
        assert rest.reach() <= len(stack)
        home = len(stack) - rest.reach()
        end = (*stack[:home], *rest.run(stack[home:]))
        assert all(torch.equal(a, b) for a, b in zip(end[::-1], whole, strict=True))
        assert not any(m is x for m in stack), f"the image crosses the cut after {point}"


# --------------------------------------------------------------------------------------------------------------- any size

ANY_SIZE = [n for n in NAMES if n != "nnunet"]  # its planner makes patches that its strides divide


@pytest.mark.parametrize("name", ANY_SIZE)
@pytest.mark.parametrize("size", [(17, 31), (16, 24), (33, 16)], ids=str)
def test_pictures_of_any_size(name: str, size: tuple[int, ...]) -> None:
    (logits,) = made(name)(image(*size))
    assert logits.shape == (2, LABELS, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(ANY_SIZE) - FLAT))
def test_volumes_of_any_size(name: str) -> None:
    (logits,) = made(name, 3)(image(9, 17, 15))
    assert logits.shape == (2, LABELS, 9, 17, 15)


@pytest.mark.parametrize("name", sorted(FLAT))
def test_networks_for_pictures_refuse_volumes(name: str) -> None:
    with pytest.raises(StudyError, match=rf"{name}.* patches of 3 axes\. Allowed: .* Set \[plan\] configuration"):
        made(name, 3)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_a_size_out_of_range_is_refused_with_what_is_allowed(name: str) -> None:
    options = catalog.options("networks", name)
    for option in {"base_features", "levels", "blocks", "window", "head_features", "refine_features"} & options.keys():
        wrong = (0,) * len(options[option].default) if option == "blocks" else 0
        with pytest.raises(StudyError, match=rf"\[network\] .*{option} = .* is not allowed\. Allowed: .*Correct"):
            made(name, **{option: wrong})


@pytest.mark.parametrize("name", [n for n in ANY_SIZE if "norm" in catalog.options("networks", n)])
def test_the_norms_are_those_asked_for(name: str) -> None:
    kinds = {"instance": nn.InstanceNorm2d, "group": nn.GroupNorm, "batch": nn.BatchNorm2d}
    for norm, kind in kinds.items():
        net = made(name, norm=norm)
        found = [type(m) for m in net.modules() if isinstance(m, (*kinds.values(), nn.LayerNorm))]
        assert max(set(found), key=found.count) is kind
        assert set(found) <= {kind, nn.GroupNorm}  # the mean over the image in DeepLab's pyramid
        assert net(image(16, 24))[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------- what crosses a cut


def linear_channels(net: Stages, point: str, x: Tensor, y: Tensor) -> list[tuple[int, int]]:
    """Channels (map, channel) after a stage that are a linear map of the image, but for a constant."""
    names = net.names[: net.names.index(point) + 1]
    front = Stages({n: net[n] for n in names})
    with torch.no_grad():
        stacks = [front.run((z,)) for z in (torch.zeros_like(x), x, y, x - 2 * y)]
    found = []
    for i, (zero, one, two, sum_) in enumerate(zip(*stacks, strict=True)):
        if not zero.is_floating_point():
            continue
        wrong = (sum_ - zero - (one - zero) + 2 * (two - zero)).abs()
        for c in range(zero.shape[1]):
            spread = float((one - zero)[:, c].abs().max())
            if spread > 1e-6 and float(wrong[:, c].max()) < 1e-6 * spread:
                found.append((i, c))
    return found


@every_network
def test_no_channel_that_crosses_is_a_linear_map_of_the_image(name: str) -> None:
    net = made(name).double().eval()
    x, y = image(16, 24).double(), image(16, 24).double().flip(2)
    for point in net.split_points:
        assert not linear_channels(net, point, x, y), point


@pytest.mark.parametrize("name", ["cgnet", "ducknet"])
def test_stages_that_carry_the_image_do(name: str) -> None:
    """So that the test above would see it; and nobody can cut there."""
    net = made(name).double().eval()
    x, y = image(16, 24).double(), image(16, 24).double().flip(2)
    assert net.carrying
    for point in net.carrying:
        assert linear_channels(net, point, x, y), point
        with pytest.raises(StudyError, match=rf"After {', '.join(net.carrying)} the image itself.* never"):
            cut_apart(net, (point, net.split_points[-2]))
        with pytest.raises(ContractError, match="not possible"):
            net.split(point)


@every_network
@pytest.mark.parametrize("cut", ["shallow", "deep"])
def test_the_named_cuts_exist(name: str, cut: str) -> None:
    parts = cut_apart(made(name, deep_supervision=False), (cut,))
    assert parts.front.reach() == 1
    assert not all(n.startswith("head") for n in parts.tail.names), "a stage of its own before the logits"
    assert "image" not in (*parts.taken, *parts.left)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("deeplabv3", "sam")])
def test_the_finest_skip_stays_at_the_site_with_the_deep_cut(name: str) -> None:
    """It lies beneath what the body reaches (SegNet's places too). DeepLabv3 and Segment-Anything have none."""
    parts = cut_apart(made(name, deep_supervision=False), ("deep",))
    stack = parts.front.run((image(16, 24),))
    home = stack[: len(stack) - parts.body.reach()]
    came_back = [m for m in parts.body.run(stack[len(home) :]) if any(m is sent for sent in stack[len(home) :])]
    assert [m for m in (*home, *came_back) if m.shape[1]]


@every_network
def test_what_stages_leave_is_what_they_say(name: str) -> None:
    net = made(name)
    stack: tuple[Tensor, ...] = (image(16, 24),)
    kinds: Kinds = ("image",)
    for n in net.names:
        stack = Stages({n: net[n]}).run(stack)
        kinds = net[n].kinds_after(kinds)
        assert are_of_kinds(stack, kinds)


def test_places_said_to_be_features_are_noticed() -> None:
    class Liar(Stage):
        takes, leaves = 1, 1

        def forward(self, *maps: Tensor) -> Stack:
            return (maps[0].to(torch.uint8),)

    with pytest.raises(ContractError, match=r"left maps of type torch\.uint8\. It said features"):
        Stages({"head0": Liar()})(image(4, 4))


# ---------------------------------------------------------------------------------------------- networks from elsewhere


class Elsewhere(nn.Module):
    """A network that knows nothing of stages; like nnU-Net's, it may return a list, finest first."""

    def __init__(self, *, as_list: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, LABELS, 3, padding=1)
        self.as_list = as_list

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y: Tensor = self.conv(x)
        return [y, y[..., ::2, ::2]] if self.as_list else y


@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
def test_a_plain_module_runs_as_one_stage(as_list: bool) -> None:
    network = Elsewhere(as_list=as_list)
    net = as_stages(network)
    x = image(16, 16)
    assert net.names == ("whole",)
    (logits,) = net(x)
    assert torch.equal(logits, network.conv(x))
    logits.sum().backward()
    assert network.conv.weight.grad is not None
    assert set(net.state_dict()) == {"whole.network.conv.weight", "whole.network.conv.bias"}


def test_a_network_named_module_and_function_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net_from_elsewhere.py").write_text(
        "from torch import nn\n"
        "def pointwise(*, n_channels, n_labels, plan, deep_supervision, bias=True):\n"
        "    return nn.Conv2d(n_channels, n_labels, 1, bias=bias)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    build = catalog.load("networks", "net_from_elsewhere:pointwise")
    net = as_stages(build(n_channels=CHANNELS, n_labels=LABELS, plan=plan(2), deep_supervision=True, bias=False))
    assert net.names == ("whole",)
    assert net(image(16, 24))[0].shape == (2, LABELS, 16, 24)


def test_a_plain_module_cannot_be_split() -> None:
    net = as_stages(Elsewhere(as_list=False))
    assert net.split_points == ()
    with pytest.raises(ContractError, match="none, the network is one stage"):
        net.split("whole")


def test_stages_stay_as_they_are() -> None:
    net = made("nnunet")
    assert as_stages(net) is net
