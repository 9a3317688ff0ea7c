"""Plans as nnU-Net writes them, its own network for each, and what the tests of our network do with both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from concilium.networks import Stages
from concilium.networks.nnunet import build, from_library, to_library

CHANNELS, LABELS = 2, 3


def configuration(
    *, dims: int, levels: int = 3, residual: bool = False, anisotropic: bool = False, **changed: Any
) -> dict[str, Any]:
    """As nnU-Net's planner writes it, with 4 features at full resolution."""
    thin = [[1] + [3] * (dims - 1)], [[1] + [2] * (dims - 1)]
    kernels, strides = [[3] * dims] * levels, [[1] * dims] + [[2] * dims] * (levels - 1)
    if anisotropic:
        kernels, strides = thin[0] + kernels[1:], strides[:1] + thin[1] + strides[2:]
    arguments: dict[str, Any] = {
        "n_stages": levels,
        "features_per_stage": [4 * 2**i for i in range(levels)],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": kernels,
        "strides": strides,
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [2] * levels,
        "n_conv_per_stage_decoder": [2] * (levels - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
            "arch_kwargs": arguments | changed,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }
    }


PLANS = {
    "plain 2D": configuration(dims=2, levels=4),
    "plain 3D": configuration(dims=3),
    "plain 3D anisotropic": configuration(dims=3, anisotropic=True),
    "residual 2D": configuration(dims=2, levels=4, residual=True),
    "residual 3D": configuration(dims=3, residual=True),
    "residual 3D anisotropic": configuration(dims=3, residual=True, anisotropic=True),
    "plain 2D with dropout and batch norm": configuration(
        dims=2, dropout_op="torch.nn.Dropout2d", dropout_op_kwargs={"p": 0.5}, norm_op="torch.nn.BatchNorm2d"
    ),
    "plain 2D, norm after activation": configuration(dims=2, nonlin_first=True),
}


@pytest.fixture(params=PLANS.values(), ids=PLANS.keys())
def plan(request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = request.param
    return chosen


def made(plan: Mapping[str, Any], **options: Any) -> Stages:
    return build(n_channels=CHANNELS, n_labels=LABELS, plan=plan, **options)


def library(plan: Mapping[str, Any], *, deep_supervision: bool = True) -> nn.Module:
    architecture = plan["architecture"]
    network: nn.Module = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        CHANNELS,
        LABELS,
        deep_supervision=deep_supervision,
    )
    return network


def exported(tensors: Mapping[str, Tensor], plan: Mapping[str, Any]) -> dict[str, Tensor]:
    return to_library(tensors, plan=plan, n_channels=CHANNELS, n_labels=LABELS)


def imported(tensors: Mapping[str, Tensor], plan: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
    return from_library(tensors, plan=plan, n_channels=CHANNELS, n_labels=LABELS, **options)


def scramble(network: nn.Module) -> None:
    """No tensor keeps a value that another also has (nnU-Net starts biases, norms and last residual norms at 0 and 1)."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)


def image(plan: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(12)
    dims = len(plan["architecture"]["arch_kwargs"]["kernel_sizes"][0])
    return torch.randn(2, CHANNELS, *([16] * dims if dims == 2 else [8] * dims), dtype=dtype)


def weighted(logits: Sequence[Tensor]) -> Tensor:
    """A scalar to which every voxel of every head adds with its own weight."""
    generator = torch.Generator().manual_seed(13)
    return torch.stack([(y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in logits]).sum()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def small() -> dict[str, Any]:
    """A plain 2D network of four resolutions."""
    return PLANS["plain 2D"]


@pytest.fixture
def nnunet() -> SimpleNamespace:
    """The functions and plans of this file."""
    functions = (configuration, made, library, exported, imported, scramble, image, weighted, same)
    return SimpleNamespace(plans=PLANS, n_labels=LABELS, **{function.__name__: function for function in functions})
