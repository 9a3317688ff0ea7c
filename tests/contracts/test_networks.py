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
from concilium.errors import ContractError
from concilium.networks import Stages, as_stages

FILES = [m.name for m in pkgutil.iter_modules(concilium.networks.__path__) if not m.name.startswith("_")]
NAMES = [name for name in FILES if name != "nnunet_trainer"]  # one stage: tests/local_updates/test_nnunet_trainer.py
CHANNELS, LABELS = 2, 3

every_network = pytest.mark.parametrize("name", NAMES)
in_2d_and_3d = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])
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


def made(name: str, dims: int = 2, deep_supervision: bool = True) -> Stages:
    torch.manual_seed(0)
    return build_of(name)(n_channels=CHANNELS, n_labels=LABELS, plan=plan(dims), deep_supervision=deep_supervision)


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


@every_network
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


@every_network
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
