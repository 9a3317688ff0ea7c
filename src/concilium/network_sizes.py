"""How large a network is, whole and in parts: parameters and operations, counted from shapes alone, without running it.

Operations are those of convolutions and matrix products in one pass forward over one image, a multiplication and an addition
being two (`torch.utils.flop_counter`); norms, activations, pooling and interpolation are not counted.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from concilium import catalog
from concilium.errors import StudyError
from concilium.forecast import step_bytes
from concilium.messages import PlugIn
from concilium.networks import Kinds, Parts, Stack, Stages, cut_apart, make_network
from concilium.nnunet_parts import get_pool_and_conv_props

if TYPE_CHECKING:
    import pandas

LEAST = 4
"""Voxels that the coarsest map has along each axis, at least: nnU-Net's rule."""
WIDEST = {2: 512, 3: 320}
"""Most features of nnU-Net's own networks, by number of axes."""
NEEDS_A_TRAINER = "nnunet_trainer"
"""A network that only a study can build."""
MADE_OF_ANOTHER = "fused"
"""Network whose size is that of the network it is made of, and of its parties."""


@dataclass(frozen=True)
class Part:
    """Parameters, and operations in one pass forward over one image."""

    parameters: int
    flops: int


@dataclass(frozen=True)
class CutSizes:
    """A network cut in three."""

    name: str
    """`shallow`, `deep`, or the stages after which it is cut."""
    after: tuple[str, str]
    front: Part
    body: Part
    tail: Part
    up: int
    """Bytes that a site sends for one image in training, in float32: maps of the front, gradients of those of the body."""
    down: int
    """Bytes that it receives."""


@dataclass(frozen=True)
class StageSizes:
    """One stage, and what is on the stack after it."""

    name: str
    size: Part
    stack: tuple[tuple[int, ...], ...]
    """Shapes (C, *spatial), the lowest first."""
    kinds: Kinds
    split_point: bool


@dataclass(frozen=True)
class NetworkSizes:
    """A network, whole and in parts."""

    name: str
    image: tuple[int, ...]
    """Shape (C, *spatial)."""
    n_labels: int
    whole: Part
    cuts: tuple[CutSizes, ...]
    stages: tuple[StageSizes, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> pandas.DataFrame:
        """A row per cut: parameters and operations of each part, bytes for one image in training."""
        import pandas

        return pandas.DataFrame([
            {"network": self.name, "cut": cut.name, "after": " ".join(cut.after)}
            | {f"{part}_{of}": getattr(getattr(cut, part), of) for of in ("parameters", "flops") for part in PARTS}
            | {"bytes_up": cut.up, "bytes_down": cut.down}
            for cut in self.cuts
        ])  # fmt: skip


PARTS = ("front", "body", "tail")


def sizes_of(
    name: str,
    *,
    cut: tuple[str, ...] | None = None,
    size: Sequence[int] = (256, 256),
    channels: int = 3,
    labels: int = 5,
    options: Mapping[str, Any] | None = None,
) -> NetworkSizes:
    """Count a network for images of this size.

    Args:
        name: as in a study's `[network]` table.
        cut: a cut with a name, or the two stages after which the network is cut; omitted: all cuts with a name.
        size: of the image, 2 or 3 axes; how often the network makes maps smaller is nnU-Net's rule for it.
        channels: of the image.
        labels: background included.
        options: the network's own; omitted: its defaults.

    Raises:
        StudyError: there is no such network or option, or the network cannot be built or cut so.
    """
    filled, problems = catalog.fill("networks", name, dict(options or {}), "[network]")
    if name == NEEDS_A_TRAINER:
        problems = [
            f"[network] name = {name!r} is not possible here: its trainer builds it. Count it in a study of yours."
        ]
    if len(size) not in WIDEST or min(*size, channels, labels) < 1:
        problems.append(
            f"An image of {channels} channels and {'×'.join(map(str, size))} voxels with {labels} labels is not possible. "
            "Allowed: 2 or 3 axes, each number 1 or more. Correct it."
        )
    if problems:
        raise StudyError(f"{name} cannot be counted. {' '.join(problems)}")
    plan = plan_for(size, base_features=filled.get("base_features"))
    image = torch.empty(1, channels, *size, device="meta")
    with torch.device("meta"), torch.no_grad():
        network = make_network(
            PlugIn(name, filled), n_channels=channels, n_labels=labels, plan=plan, deep_supervision=False
        )
        network.eval()  # a batch of one image has no statistics of its own
        try:
            stages, stacks = zip(*_each_stage(network, image), strict=True)
        except RuntimeError as e:  # torch's own words for maps that do not fit together
            raise StudyError(
                f"[network] name = {name!r} cannot take images of {'×'.join(map(str, size))} voxels. Allowed: sizes that its "
                f"strides divide, such as {'×'.join(str(-(-n // 32) * 32) for n in size)}. Choose one."
            ) from e
        cuts = [cut] if cut else [(named,) for named in network.cuts if network.split_points]
        maps = dict(zip(network.names, stacks, strict=True))
        counted = tuple(_cut_sizes(cut_apart(network, after), after, stages, maps) for after in cuts)
    return NetworkSizes(name, (channels, *size), labels, _together(stages), counted, stages, filled)


def all_sizes(
    *, options: Mapping[str, Any] | None = None, size: Sequence[int] = (256, 256), **rest: Any
) -> tuple[list[NetworkSizes], list[str]]:
    """Every network, each with those of the options that it has, and why some are missing.

    Raises:
        StudyError: no network has one of the options.
    """
    names = [name for name in catalog.names("networks") if name not in (NEEDS_A_TRAINER, MADE_OF_ANOTHER)]
    given = dict(options or {})
    known = {name: catalog.options("networks", name).keys() for name in names}
    if unknown := [key for key in given if all(key not in keys for keys in known.values())]:
        everywhere = sorted({key for keys in known.values() for key in keys})
        raise StudyError(
            f"[network] {unknown[0]} is not known to any network. {catalog.allowed(unknown[0], everywhere)}"
        )
    found, missing = [], []
    for name in names:
        own = {key: value for key, value in given.items() if key in known[name]}
        try:
            found.append(sizes_of(name, options=own, size=size, **rest))
        except StudyError as e:
            missing.append(f"{name}: {e}")
    return found, missing


def read_options(given: Sequence[str]) -> dict[str, Any]:
    """Options from a command line, `name=value` each, the value as in a TOML file; quotes and brackets may be left out.

    Raises:
        StudyError: one has no value.
    """
    found = {}
    for text in given:
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise StudyError(
                f"--option {text!r} is not allowed. Allowed: name=value, such as base_features=16. Correct it."
            )
        found[name] = _value(f"[{value}]" if "," in value and not value.startswith("[") else value)
    return found


def read_size(text: str) -> tuple[int, ...]:
    """The size of an image from a command line, such as 256x256.

    Raises:
        StudyError: it is none.
    """
    numbers = text.lower().replace("×", "x").split("x")
    if not all(n.strip().isdigit() for n in numbers):
        raise StudyError(f"--size {text!r} is not allowed. Allowed: numbers, such as 256x256 or 96x96x96. Correct it.")
    return tuple(map(int, numbers))


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def plan_for(size: Sequence[int], *, base_features: int | None = None) -> dict[str, Any]:
    """One configuration as nnU-Net's planner writes it for patches of this size and voxels of 1 mm."""
    dims = len(size)
    _, strides, kernels, _, _ = get_pool_and_conv_props([1.0] * dims, list(size), LEAST, 999)
    n = len(strides)
    if n < 2:
        raise StudyError(
            f"An image of {'×'.join(map(str, size))} voxels leaves nothing to pool. Allowed: {2 * LEAST} or more along an axis. "
            "Choose a larger one."
        )
    arguments = {
        "n_stages": n,
        "features_per_stage": [min(WIDEST[dims], (base_features or 32) * 2**i) for i in range(n)],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [list(map(int, kernel)) for kernel in kernels],
        "strides": [list(map(int, stride)) for stride in strides],
        "n_conv_per_stage": [2] * n,
        "n_conv_per_stage_decoder": [2] * (n - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "patch_size": list(size),
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def _each_stage(network: Stages, image: Tensor) -> Iterable[tuple[StageSizes, Stack]]:
    """The size of each stage, and the stack after it."""
    stack: Stack = (image,)
    kinds: Kinds = ("image",)
    points = network.split_points
    for name in network.names:
        one = Stages({name: network[name]})
        with FlopCounterMode(display=False) as counter:
            stack = one.run(stack)
        size = Part(sum(p.numel() for p in one.parameters()), counter.get_total_flops())
        kinds = one.kinds_after(kinds)
        yield StageSizes(name, size, tuple(tuple(m.shape[1:]) for m in stack), kinds, name in points), stack


def _together(stages: Iterable[StageSizes]) -> Part:
    sizes = [s.size for s in stages]
    return Part(sum(s.parameters for s in sizes), sum(s.flops for s in sizes))


def _cut_sizes(parts: Parts, cut: tuple[str, ...], stages: Sequence[StageSizes], maps: Mapping[str, Stack]) -> CutSizes:
    """Sizes of the parts, of those of their stages and the stack after each."""
    after = (parts.front.names[-1], parts.body.names[-1])
    before, behind = (maps[name] for name in after)
    home = len(before) - parts.body.reach()
    front, body, tail = (
        _together(s for s in stages if s.name in part.names) for part in (parts.front, parts.body, parts.tail)
    )
    up, down = step_bytes(before[home:], behind[home:])
    return CutSizes(cut[0] if len(cut) == 1 else " ".join(cut), after, front, body, tail, up, down)
