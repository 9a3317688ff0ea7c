"""nnU-Net's own U-Nets, with a plain or a residual encoder, as its plan describes them.

Isensee et al., nnU-Net, Nature Methods 18 (2021) 203-211; residual encoders: Isensee et al., nnU-Net Revisited, MICCAI 2024.

The library builds the network and draws its weights; here its parts are put in a row. It knows most tensors under two to
four names (the decoder holds the encoder again, each convolution block holds its layers twice); here each has one.
`to_library` and `from_library` translate between both, so that weights go to nnU-Net and come from it.

The stack: `down1` and below leave their input beneath their output, as the skip. With deep supervision the outputs of `up`
stages stay on the stack too, so that after `up0` it holds one map per head, coarsest first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from concilium.errors import ContractError
from concilium.networks import Stack, Stage, Stages, bare
from concilium.networks._plan import LAYERS, arguments_of, check_plan
from concilium.nnunet_parts import ConvDropoutNormReLU, get_network_from_plans


class _Down(Stage):
    """One resolution of the encoder; leaves its input beneath its output where it is a skip."""

    takes = 1

    def __init__(self, block: nn.Module, *, skip: bool) -> None:
        super().__init__()
        self.block = block
        self.leaves = 2 if skip else 1

    def forward(self, *maps: Tensor) -> Stack:
        (x,) = maps
        y: Tensor = self.block(x)
        return (x, y) if self.leaves == 2 else (y,)


class _Up(Stage):
    """One resolution of the decoder: takes the skip, the `riding` outputs of coarser `up` stages, of which it reads the last."""

    def __init__(self, upsample: nn.Module, block: nn.Module, *, riding: int) -> None:
        super().__init__()
        self.upsample, self.block = upsample, block
        self.takes, self.leaves = 1 + max(riding, 1), 1 + riding

    def forward(self, *maps: Tensor) -> Stack:
        skip, *coarser = maps
        y: Tensor = self.block(torch.cat((self.upsample(coarser[-1]), skip), dim=1))
        return (*coarser, y) if self.leaves > 1 else (y,)


class _Head(Stage):
    """Logits in place of the map that lies beneath `finer` others."""

    def __init__(self, conv: nn.Module, *, finer: int) -> None:
        super().__init__()
        self.conv = conv
        self.takes = self.leaves = 1 + finer

    def forward(self, *maps: Tensor) -> Stack:
        own, *finer = maps
        return (self.conv(own), *finer)


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    base_features: int | None = None,
    deep_supervision: bool = True,
) -> Stages:
    """The network of one configuration of nnU-Net's plan, with the weights that nnU-Net draws from the same torch seed.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration, e.g. `plans["configurations"]["3d_fullres"]`, with what it inherits filled in.
        base_features: features at full resolution. Planning has used it already; here it is checked against the plan.
        deep_supervision: logits at every resolution of the decoder, instead of the finest only.

    Returns:
        Stages `stem` (residual encoder), `down0`, `down1`, ..., `up1`, `up0`, ..., `head1`, `head0`.

    Raises:
        StudyError: the plan asks for another network or layer, or for another width than `base_features`.
    """
    check_plan(plan, base_features)
    return _stages(_library(plan, n_channels, n_labels), deep_supervision=deep_supervision)


def to_library(
    tensors: Mapping[str, Tensor],
    *,
    plan: Mapping[str, Any],
    n_channels: int,
    n_labels: int,
) -> dict[str, Tensor]:
    """The same tensors under all of nnU-Net's names, complete for its `load_state_dict`; aliases are one and the same tensor.

    Where the network was built without deep supervision, the heads that nnU-Net always has are filled with zeros: it does
    not use them without deep supervision, and can train them from there.

    Raises:
        ContractError: a tensor is missing, not of this network, or of another shape.
    """
    ours, shapes = _names(plan, n_channels, n_labels)
    extra = _extra_heads(shapes)
    if tensors.keys().isdisjoint(extra):
        _check(tensors, {name: shape for name, shape in shapes.items() if name not in extra}, "concilium's nnunet")
        some = next(iter(tensors.values()))
        tensors = {**tensors, **{name: some.new_zeros(shapes[name]) for name in extra}}
    _check(tensors, shapes, "concilium's nnunet")
    return {theirs: tensors[name] for theirs, name in ours.items()}


def from_library(
    tensors: Mapping[str, Tensor],
    *,
    plan: Mapping[str, Any],
    n_channels: int,
    n_labels: int,
    deep_supervision: bool = True,
) -> dict[str, Tensor]:
    """The tensors of an nnU-Net state dict under our names, each once; `_orig_mod.` and `module.` before a name are ignored.

    Without `deep_supervision` the heads below full resolution are left out.

    Raises:
        ContractError: a tensor is missing, not of this network, of another shape, or differs between two of its names.
    """
    ours, shapes = _names(plan, n_channels, n_labels)
    given: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if (name := bare(key)) in given:
            raise ContractError(
                f"Tensor {name} is given twice, with and without a prefix. One is allowed. Give one state dict."
            )
        given[name] = tensor
    _check(given, {theirs: shapes[name] for theirs, name in ours.items()}, "nnU-Net")
    first: dict[str, str] = {}
    for theirs, name in ours.items():
        if not _same(given[first.setdefault(name, theirs)], given[theirs]):
            raise ContractError(
                f"{first[name]} and {theirs} differ. They are two names of one tensor in nnU-Net and must be equal. "
                "Export the state dict from the network again."
            )
    left_out = set() if deep_supervision else set(_extra_heads(shapes))
    return {name: given[first[name]] for name in shapes if name not in left_out}


def names_elsewhere(
    *, plan: Mapping[str, Any], n_channels: int, n_labels: int, there: Collection[str] = ()
) -> dict[str, str]:
    """Our name of every tensor, by each of nnU-Net's names for it."""
    return _names(plan, n_channels, n_labels)[0]


def _library(plan: Mapping[str, Any], n_channels: int, n_labels: int) -> Any:
    arguments = arguments_of(plan)
    return get_network_from_plans(
        plan["architecture"]["network_class_name"],
        arguments,
        [key for key in LAYERS if key in arguments],
        n_channels,
        n_labels,
        allow_init=True,
        deep_supervision=True,
    )


def _stages(network: Any, *, deep_supervision: bool) -> Stages:
    """The parts of the library's network in a row; takes the network apart."""
    _own_once(network)
    encoder, decoder = network.encoder, network.decoder
    stages: dict[str, Stage] = {}
    if getattr(encoder, "stem", None) is not None:
        stages["stem"] = _Down(encoder.stem, skip=False)
    for level, block in enumerate(encoder.stages):
        stages[f"down{level}"] = _Down(block, skip=level > 0)
    top = len(decoder.stages) - 1  # the library counts the decoder from the bottleneck, stages count from the input
    for i, (upsample, block) in enumerate(zip(decoder.transpconvs, decoder.stages, strict=True)):
        stages[f"up{top - i}"] = _Up(upsample, block, riding=i if deep_supervision else 0)
    for i, conv in enumerate(decoder.seg_layers):
        if deep_supervision or i == top:
            stages[f"head{top - i}"] = _Head(conv, finer=top - i)
    return Stages(stages)


def _own_once(network: nn.Module) -> None:
    """Replace each convolution block, which holds its layers twice, by the sequence that it runs, its layers named.

    Of the two names the speaking one stays (`conv`, `norm`): which tensors are shared is decided by name.
    """
    for parent in list(network.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, ConvDropoutNormReLU):
                names = {id(layer): n for n, layer in block.named_children()}  # each once, by its first name
                layers = OrderedDict((names[id(layer)], layer) for layer in block.all_modules)
                parent.add_module(name, nn.Sequential(layers))


def _names(plan: Mapping[str, Any], n_channels: int, n_labels: int) -> tuple[dict[str, str], dict[str, torch.Size]]:
    """Our name of every tensor by each of the library's names for it, and the shape of every tensor by our name."""
    with torch.device("meta"):
        network = _library(plan, n_channels, n_labels)
    theirs = network.state_dict(keep_vars=True)  # the tensors themselves: the same object is the same tensor
    ours = _stages(network, deep_supervision=True).state_dict(keep_vars=True)
    name_of = {id(tensor): name for name, tensor in ours.items()}
    return {key: name_of[id(tensor)] for key, tensor in theirs.items()}, {name: t.shape for name, t in ours.items()}


def _extra_heads(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("head") and not name.startswith("head0.")]


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _check(given: Mapping[str, Tensor], expected: Mapping[str, torch.Size], of: str) -> None:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    wrong = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    found = {"missing": missing, "not of this network": unexpected, "of another shape": wrong}
    if problems := [f"{what}: {', '.join(names)}" for what, names in found.items() if names]:
        raise ContractError(
            f"{len(given)} tensors do not fit the plan ({'; '.join(problems)}). Exactly the {len(expected)} tensors of {of} are "
            "allowed. Check that plan, channels, labels and weights belong together."
        )
