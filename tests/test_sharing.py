"""Which tensors travel: roles and patterns, and what networks of unequal plans have in common, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from concilium.aggregation import Sum
from concilium.errors import ContractError, StudyError
from concilium.messages import Described, PlugIn
from concilium.networks import Stages, as_stages, make_network, names_elsewhere
from concilium.sharing import Table, all_but, described, kept_of, match, named, shared_now, table_of

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def plan(n_stages: int, kernels: Mapping[int, int] | None = None, *, features: int = 4) -> dict[str, Any]:
    """nnU-Net's architecture of so many stages; `kernels`: stage -> extent along the first axis, where that is not 3."""
    kernel = [[(kernels or {}).get(i, 3), 3, 3] for i in range(n_stages)]
    return {
        "architecture": {
            "network_class_name": PLAIN,
            "arch_kwargs": {
                "n_stages": n_stages,
                "features_per_stage": [min(features * 2**i, 8 * features) for i in range(n_stages)],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": kernel,
                "strides": [[1, 1, 1]] + [[1 if k[0] == 1 else 2, 2, 2] for k in kernel[1:]],
                "n_conv_per_stage": [2] * n_stages,
                "n_conv_per_stage_decoder": [2] * (n_stages - 1),
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }
    }


def network(p: Mapping[str, Any], n_labels: int = 3) -> Stages:
    return make_network(PlugIn("nnunet"), n_channels=1, n_labels=n_labels, plan=p, deep_supervision=True)


def tables(*networks: Stages) -> dict[str, Table]:
    return {f"s{i}": table_of(described(n, frozenset())) for i, n in enumerate(networks)}


def common(networks: tuple[Stages, ...], mode: Any, elsewhere: Any = None) -> dict[frozenset[str], set[str]]:
    """Sites -> the names, at the first of them, of what they share."""
    sharing = match(tables(*networks), mode=mode, elsewhere=elsewhere or {})
    found: dict[frozenset[str], set[str]] = {}
    for block in sharing.blocks:
        found.setdefault(block.sites, set()).update(block.names[min(block.sites)].values())
    return found


def of(net: Stages, *starts: str) -> set[str]:
    return {name for name in net.state_dict() if name.startswith(starts)}


# ---------------------------------------------------------------------------------------------------- roles and patterns


def test_roles_are_these_tensors() -> None:
    net = network(plan(4))
    names = set(net.state_dict())
    assert named(net, ["norms"], where="") == {n for n in names if ".norm." in n}
    assert named(net, ["heads"], where="") == of(net, "head")
    assert named(net, ["stem"], where="") == of(net, "down0.")
    assert named(net, ["decoder"], where="") == of(net, "up", "head")
    assert named(net, ["up0.*", "heads"], where="") == of(net, "up0.", "head")
    with pytest.raises(StudyError, match="'statistics' is no tensor"):
        named(net, ["statistics"], where="[sharing] keep")


def test_a_norm_that_is_known_by_two_names_is_found_by_the_one_that_counts() -> None:
    norm = nn.BatchNorm2d(4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(1, 4, 1), norm)
            self.again = norm

    net = as_stages(Twice())
    assert named(net, ["norms"], where="") == {n for n in net.state_dict() if ".first.1." in n}
    assert len(named(net, ["statistics"], where="")) == 3


def test_to_keep_everything_is_refused() -> None:
    with pytest.raises(StudyError, match="keeps all"):
        kept_of(network(plan(4)), ["down*", "decoder"])


# ----------------------------------------------------------------------------------------------- networks of unequal plans


@pytest.fixture(scope="module")
def depths() -> tuple[Stages, ...]:
    """Of 4, 5 and 6 stages."""
    return network(plan(4)), network(plan(5)), network(plan(6))


def test_by_resolution_networks_of_other_depth_share_both_ends(depths: tuple[Stages, ...]) -> None:
    """Stages are 4, 8, 16, 32, 32, 32 features wide; the deepest stage of each has no way back, so no `up` of its own."""
    four, five, six = depths
    everyone, deeper = frozenset({"s0", "s1", "s2"}), frozenset({"s1", "s2"})
    assert common(depths, "resolution") == {
        everyone: set(four.state_dict()),
        deeper: of(five, "down4.", "up3.", "head3."),
    }
    assert of(six, "down5.", "up4.", "head4.").isdisjoint(set().union(*common(depths, "resolution").values()))


def test_by_intersection_only_what_all_have(depths: tuple[Stages, ...]) -> None:
    assert common(depths, "intersection") == {frozenset({"s0", "s1", "s2"}): set(depths[0].state_dict())}


def test_by_published_names_decoders_of_other_depth_do_not_meet(depths: tuple[Stages, ...]) -> None:
    """nnU-Net counts its decoder from the bottom: what has the same name there is at another resolution, and mostly of another
    shape. Between 5 and 6 stages, whose two deepest are equally wide, only that of the bottom differs."""
    elsewhere = {
        f"s{i}": names_elsewhere(PlugIn("nnunet"), n_channels=1, n_labels=3, plan=plan(4 + i)) for i in range(3)
    }
    found = common(depths, "published", elsewhere)
    four, five, _ = depths
    everyone = found[frozenset({"s0", "s1", "s2"})]
    assert of(four, "down") <= everyone
    assert not {n for n in everyone if n.startswith("up") and n.endswith("conv.weight")}
    assert of(five, "down4.") <= found[frozenset({"s1", "s2"})]


def test_another_kernel_is_another_tensor() -> None:
    """(1, 3, 3) at full resolution against (3, 3, 3): the convolutions there, and what is up- and downsampled by it."""
    cube, flat = network(plan(5)), network(plan(5, {0: 1}))
    (shared,) = common((cube, flat), "resolution").values()
    other = {n for n, t in cube.state_dict().items() if t.shape != flat.state_dict()[n].shape}
    assert shared == set(cube.state_dict()) - other
    assert {n.split(".")[0] for n in other} == {"down0", "up0"}
    assert all(n.endswith("conv.weight") for n in other)


def test_other_labels_are_other_heads() -> None:
    two, four = network(plan(5), 2), network(plan(5), 4)
    (shared,) = common((two, four), "resolution").values()
    assert shared == set(two.state_dict()) - of(two, "head")


def test_prefixes_of_compiled_and_parallel_networks_do_not_matter() -> None:
    net = network(plan(4))
    told = tables(net)["s0"]
    compiled = {f"_orig_mod.module.{name}": about for name, about in told.items()}
    sharing = match({"a": told, "b": compiled}, mode="resolution", elsewhere={})
    (block,) = sharing.blocks
    assert block.names["b"] == {key: f"_orig_mod.module.{key}" for key in told}


def test_each_tensor_counts_once(depths: tuple[Stages, ...]) -> None:
    """nnU-Net knows most by two to four names."""
    elsewhere = {
        f"s{i}": names_elsewhere(PlugIn("nnunet"), n_channels=1, n_labels=3, plan=plan(4 + i)) for i in range(3)
    }
    sharing = match(tables(*depths), mode="published", elsewhere=elsewhere)
    for site in ("s0", "s1", "s2"):
        names = [own for b in sharing.blocks if site in b.names for own in b.names[site].values()]
        assert len(names) == len(set(names))
        keys = [key for b in sharing.blocks if site in b.names for key in b.names[site]]
        assert len(keys) == len(set(keys)) == len(names)


def test_kernels_along_other_axes_are_other_tensors() -> None:
    """A plan may turn images so that thick slices come first: then equal shapes lie along other axes of the patient."""
    net = network(plan(4))
    told = {site: tables(net)["s0"] for site in ("a", "b", "c")}
    axes = {"a": (0, 1, 2), "b": (2, 0, 1), "c": (0, 1, 2)}
    sharing = match(told, mode="resolution", elsewhere={}, axes=axes)
    kernels = {n for n, t in net.state_dict().items() if t.ndim > 2}
    assert set(sharing.names("b")) == set(net.state_dict()) - kernels
    assert set(sharing.names("a")) == set(sharing.names("c")) == set(net.state_dict())
    assert {block.sites for block in sharing.blocks} == {frozenset("abc"), frozenset("ac")}


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(StudyError, match="none in common"):
        match({"a": {"x": ((2,), "float32")}, "b": {"x": ((3,), "float32")}}, mode="resolution", elsewhere={})


def test_a_name_in_two_shapes_is_two_tensors() -> None:
    shapes = {"a": (2,), "b": (2,), "c": (3,), "d": (3,)}
    sharing = match({s: {"x": (shape, "float32")} for s, shape in shapes.items()}, mode="resolution", elsewhere={})
    assert {block.sites for block in sharing.blocks} == {frozenset("ab"), frozenset("cd")}
    assert len({key for block in sharing.blocks for key in block.like}) == 2


def test_the_order_of_sites_does_not_matter(depths: tuple[Stages, ...]) -> None:
    told = tables(*depths)
    there = match(told, mode="resolution", elsewhere={})
    back = match(dict(reversed(told.items())), mode="resolution", elsewhere={})
    for site in told:
        assert there.names(site) == back.names(site)


def test_two_tensors_of_one_shape_are_not_confused(depths: tuple[Stages, ...]) -> None:
    """Each comes back under the name that it was sent by: the mean of equal networks is that network, tensor by tensor."""
    sharing = match(tables(*depths), mode="resolution", elsewhere={})
    values = {f"s{i}": {n: torch.randn_like(t) for n, t in net.state_dict().items()} for i, net in enumerate(depths)}
    server: dict[str, torch.Tensor] = {}
    for block in sharing.blocks:
        total = Sum()
        for site in sorted(block.sites):
            total.add({key: values[site][own] for key, own in block.names[site].items()}, 1)
        server |= total.mean()
    for site in values:
        for own, tensor in sharing.for_site(server, site).items():
            having = [values[s][own] for s in values if own in sharing.names(s)]
            assert torch.allclose(tensor, torch.stack(having).mean(0), atol=1e-6), (site, own)


def test_what_was_shared_in_a_round_counts_those_that_answered(depths: tuple[Stages, ...]) -> None:
    sharing = match(tables(*depths), mode="resolution", elsewhere={})
    told = shared_now(sharing.blocks, ("s0", "s1"), sharing.sizes)
    assert told.keys() == {"s0", "s1"}
    assert told["s0"] == (1.0, ("s1",))
    n_four = sum(t.numel() for t in depths[0].state_dict().values())
    n_five = sum(t.numel() for t in depths[1].state_dict().values())
    assert told["s1"] == (pytest.approx(n_four / n_five), ("s0",))
    assert shared_now(sharing.blocks, ("s2",), sharing.sizes)["s2"] == (0.0, ())


# -------------------------------------------------------------------------------------------------------- at the site


def test_a_site_shares_what_the_study_does_not_keep_and_nothing_else() -> None:
    net = network(plan(4))
    kept = kept_of(net, ["norms"])
    shared = sorted(set(net.state_dict()) - kept)
    assert all_but(net, kept, shared[:3]) == frozenset(net.state_dict()) - set(shared[:3])
    for wrong in (sorted(kept)[0], "nothing"):
        with pytest.raises(ContractError, match="Allowed: tensors of this network"):
            all_but(net, kept, [wrong])


@pytest.mark.parametrize(
    "told",
    [
        Described(("a",), ((1,), (2,)), ("float32",), 3),
        Described(("a", "a"), ((1,), (2,)), ("float32", "float32"), 3),
        Described(("a",), ((1,),), ("complex64",), 3),
    ],
)
def test_a_table_that_does_not_hold_together_is_refused(told: Described) -> None:
    with pytest.raises(ContractError):
        table_of(told)
