"""Weights that go to nnU-Net and come from it, and plans that are refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from concilium.errors import ContractError, StudyError

UNETS = "dynamic_network_architectures.architectures.unet."


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_ignored(nnunet: SimpleNamespace, small: dict[str, Any], prefix: str) -> None:
    theirs = nnunet.library(small).state_dict()
    assert nnunet.same(
        nnunet.imported({prefix + name: t for name, t in theirs.items()}, small), nnunet.imported(theirs, small)
    )


def test_a_name_given_with_and_without_prefix_is_refused(nnunet: SimpleNamespace, small: dict[str, Any]) -> None:
    theirs = nnunet.library(small).state_dict()
    name = next(iter(theirs))
    with pytest.raises(ContractError, match=f"{name} is given twice"):
        nnunet.imported(theirs | {f"module.{name}": theirs[name]}, small)


def test_aliases_that_disagree_are_refused(nnunet: SimpleNamespace, small: dict[str, Any]) -> None:
    theirs = nnunet.library(small).state_dict()
    for alias in ("decoder.encoder.stages.1.0.convs.0.norm.weight", "decoder.stages.0.convs.1.all_modules.0.weight"):
        with pytest.raises(ContractError, match=f"{alias} differ"):
            nnunet.imported(theirs | {alias: theirs[alias] + 1}, small)


def test_equal_aliases_may_hold_nan(nnunet: SimpleNamespace, small: dict[str, Any]) -> None:
    theirs = {name: torch.full_like(t, torch.nan) for name, t in nnunet.library(small).state_dict().items()}
    assert all(t.isnan().all() for t in nnunet.imported(theirs, small).values())


def test_zeros_fill_the_heads_that_we_do_not_have(nnunet: SimpleNamespace, small: dict[str, Any]) -> None:
    theirs = nnunet.exported(nnunet.made(small, deep_supervision=False).double().state_dict(), small)
    heads = {name: t for name, t in theirs.items() if name.startswith("decoder.seg_layers.")}
    assert {name.split(".")[2] for name, t in heads.items() if not t.any() and name.endswith("weight")} == {"0", "1"}
    assert all(t.dtype == torch.float64 for t in heads.values())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda ours: {n: t for n, t in ours.items() if n != "down1.block.0.convs.0.norm.bias"},
            "missing: down1.block.0.convs.0.norm.bias",
        ),
        (lambda ours: {n: t for n, t in ours.items() if n != "head1.conv.bias"}, "missing: head1.conv.bias"),
        (
            lambda ours: {n: t for n, t in ours.items() if not n.startswith("head")},
            "missing: head0.conv.weight, head0.conv.bias",
        ),
        (lambda ours: ours | {"up9.upsample.weight": torch.zeros(1)}, "not of this network: up9.upsample.weight"),
        (
            lambda ours: ours | {"head0.conv.bias": torch.zeros(7)},
            r"of another shape: head0.conv.bias \(7,\) instead of \(3,\)",
        ),
        (lambda ours: {}, "0 tensors do not fit"),
    ],
    ids=["missing", "one head missing", "all heads missing", "unexpected", "wrong shape", "nothing"],
)
def test_tensors_that_do_not_fit_our_names_are_named(
    nnunet: SimpleNamespace, small: dict[str, Any], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str
) -> None:
    with pytest.raises(ContractError, match=told):
        nnunet.exported(change(nnunet.made(small).state_dict()), small)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda theirs: {n: t for n, t in theirs.items() if n != "decoder.seg_layers.0.bias"},
            "missing: decoder.seg_layers.0.bias",
        ),
        (lambda theirs: theirs | {"encoder.stem.weight": torch.zeros(1)}, "not of this network: encoder.stem.weight"),
        (
            lambda theirs: theirs | {"decoder.seg_layers.2.bias": torch.zeros(2)},
            r"decoder.seg_layers.2.bias \(2,\) instead of \(3,\)",
        ),
    ],
    ids=["missing", "unexpected", "wrong shape"],
)
def test_tensors_that_do_not_fit_nnunets_names_are_named(
    nnunet: SimpleNamespace, small: dict[str, Any], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str
) -> None:
    with pytest.raises(ContractError, match=told):
        nnunet.imported(change(nnunet.library(small).state_dict()), small)


def test_translating_draws_no_random_number(nnunet: SimpleNamespace, small: dict[str, Any]) -> None:
    theirs, before = nnunet.library(small).state_dict(), torch.get_rng_state()
    nnunet.exported(nnunet.imported(theirs, small), small)
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------------------- plans that are refused


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ({"network_class_name": UNETS + "ResidualUNet"}, r"PlainConvUNet and .*ResidualEncoderUNet"),
        ({"network_class_name": "elsewhere.PlainConvUNet"}, r"network is elsewhere\.PlainConvUNet"),
        ({"_kw_requires_import": ["conv_op", "block"]}, r"block imported\. Only conv_op, norm_op, dropout_op, nonlin"),
    ],
    ids=["other network", "same name elsewhere", "other import"],
)
def test_other_architectures_are_refused(
    nnunet: SimpleNamespace, small: dict[str, Any], architecture: dict[str, Any], told: str
) -> None:
    with pytest.raises(StudyError, match=told):
        nnunet.made({"architecture": small["architecture"] | architecture})


def test_a_plan_without_architecture_is_refused(nnunet: SimpleNamespace) -> None:
    with pytest.raises(StudyError, match=r"holds inherits_from\. It must hold architecture"):
        nnunet.made({"inherits_from": "3d_fullres"})


def test_a_plan_of_one_resolution_is_refused(nnunet: SimpleNamespace) -> None:
    with pytest.raises(StudyError, match="At least 2"):
        nnunet.made(nnunet.configuration(dims=2, levels=1))


@pytest.mark.parametrize(
    "name", ["os.system", "torch.nn.functional.relu", "torch.nn.init.normal_", "subprocess.ReLU", "torch.nn.Parameter"]
)
def test_a_plan_runs_no_code_but_layers_of_torch(nnunet: SimpleNamespace, name: str) -> None:
    with pytest.raises(StudyError, match=r"nonlin is .* layer of torch.nn"):
        nnunet.made(nnunet.configuration(dims=2, nonlin=name, nonlin_kwargs={"command": "exit"}))


def test_base_features_must_agree_with_the_plan(nnunet: SimpleNamespace, small: dict[str, Any]) -> None:
    nnunet.made(small, base_features=4)
    with pytest.raises(StudyError, match=r"base_features 8 disagrees .* 4, 8, 16, 32 features"):
        nnunet.made(small, base_features=8)


@pytest.mark.parametrize(("dims", "widths"), [(2, [256, 512, 512]), (3, [256, 320, 320])])
def test_base_features_double_up_to_nnunets_limit(nnunet: SimpleNamespace, dims: int, widths: list[int]) -> None:
    with torch.device("meta"):
        nnunet.made(nnunet.configuration(dims=dims, features_per_stage=widths), base_features=256)
        with pytest.raises(StudyError, match="disagrees"):
            nnunet.made(nnunet.configuration(dims=dims, features_per_stage=[256, 512, 1024]), base_features=256)
