"""A network is an ordered list of named stages over a stack of maps. One file here: one network, `build(...) -> Stages`.

    build(*, n_channels: int, n_labels: int, plan: Mapping[str, Any], deep_supervision: bool, ...options) -> Stages

`plan` is the configuration of nnU-Net's plan (`plans.json`), and `regions`: whether labels are regions, which may overlap; a
network ignores what it does not need. All other keyword-only parameters are options of the study's `[network]` table.

A stage takes the top `takes` maps of the stack and leaves `leaves` in their place. Names count resolution from the input:
`down0` is full resolution, `up0` its way back, `head0` the logits at full resolution, `head1` those of deep supervision one
level below. Heads come last, coarsest first, and `head0` is always there. Every tensor has one owner and one key. A network
that is no list of stages is one stage, `whole` (`as_stages`); of a tensor that it knows by several names the first is the key.

Where `down0`, `up0`, ... do not fit, `build` says itself where the cuts with a name are: `Stages(stages, cuts={"shallow": ...,
"deep": ...})`, each a list of pairs as in `CUTS`. A stage that leaves anything but features says so (`Stage.kinds`). Where it
leaves the image or a linear map of it (an input pyramid, an input that is pooled and joined further down), there is no split
point after it, nor after any later stage until the last such map is taken: those stages run at the site. A map of whole numbers
(places within a pooling window) is uint8 and has no gradient. A map without channels (B, 0, *spatial), `_layers.frame_of`, only
tells a size: that of the image, say, for a network whose finest map is coarser.

A file may also have, for studies that start from published weights, `names_elsewhere(*, plan, n_channels, n_labels, there)
-> Mapping[str, str]`: our name of a tensor by each name that it has in these, of whose names `there` are the given file's;
`refitted(name, tensor, shape) -> Tensor | None`: a tensor of ours that was made for images of another size, in this shape; and
`added(name) -> bool`: whether published weights cannot have it. And `folded(options) -> (options, weights -> weights)`: the
same network without what was added. And `trains(**options) -> tuple[str, ...]`: which tensors train, unless a study says it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from concilium import catalog
from concilium.errors import ContractError, StudyError
from concilium.messages import PlugIn

Stack = tuple[Tensor, ...]
"""Maps, each (B, C, *spatial); the top is the last."""
Kind: TypeAlias = Literal["features", "places", "image"]
"""Float maps that may cross a cut; whole numbers, without gradient; the image or a linear map of it, which never crosses."""
Kinds: TypeAlias = tuple[Kind, ...]
WHOLE = torch.uint8
"""Type of maps of whole numbers."""

CUTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "shallow": (("down0", "up0"), ("down0", "up1")),
    "deep": (("down1", "up1"),),
}
"""Split points with a name: as near to the ends as may be, and one resolution deeper. The first pair that is allowed counts."""
GUARD = "defence"
"""Begins the names of the stages with which a defended front ends (`concilium.defences`)."""


class Stage(nn.Module):
    """One step: takes the top `takes` maps and leaves `leaves` maps."""

    takes: int
    leaves: int
    kinds: Kinds = ()
    """What it leaves, the lowest first; empty: features only."""

    def forward(self, *maps: Tensor) -> Stack:
        """The maps that replace those taken."""
        raise NotImplementedError

    def kinds_after(self, kinds: Kinds) -> Kinds:
        """What is on the stack after it, of what was there before."""
        kind: Kind = "features"
        return (*kinds[: max(len(kinds) - self.takes, 0)], *(self.kinds or (kind,) * self.leaves))


class Stages(nn.Module):
    """An ordered list of named stages. Called with an image (B, C, *spatial), it returns its logits, finest first."""

    mirror_axes: tuple[int, ...] | None = None
    """Spatial axes along which images may be mirrored to predict; `None`: all."""
    trains: tuple[str, ...] = ()
    """As `[training] tensors` of a study that does not say what trains; empty: all."""

    def __init__(self, stages: Mapping[str, Stage], cuts: Mapping[str, tuple[tuple[str, str], ...]] = CUTS) -> None:
        super().__init__()
        self.cuts = cuts
        for name, stage in stages.items():
            self.add_module(name, stage)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._modules)

    def __getitem__(self, name: str) -> Stage:
        return cast(Stage, self._modules[name])

    def run(self, stack: Stack) -> Stack:
        """Apply the stages to a stack of maps."""
        for name in self.names:
            stage = self[name]
            rest = len(stack) - stage.takes
            if rest < 0:
                raise ContractError(
                    f"Stage {name} takes {stage.takes} maps, but {len(stack)} are there. Check the split point."
                )
            left = stage(*stack[rest:])
            if len(left) != stage.leaves:
                raise ContractError(
                    f"Stage {name} left {len(left)} maps. It must leave {stage.leaves}. Correct its `leaves`."
                )
            if not are_of_kinds(left, kinds := stage.kinds_after(())):
                raise ContractError(
                    f"Stage {name} left maps of type {', '.join(str(m.dtype) for m in left)}. It said {', '.join(kinds)}: "
                    f"whole numbers as {WHOLE}, all others float. Correct its `kinds`, or what it leaves."
                )
            stack = (*stack[:rest], *left)
        return stack

    def forward(self, image: Tensor) -> Stack:
        return self.run((image,))[::-1]

    @property
    def split_points(self) -> tuple[str, ...]:
        """Stages after which the network may be split: before the first head; neither logits nor the image ever cross a cut."""
        carrying = self.carrying
        return tuple(n for n in self.names[:-1] if not n.startswith("head") and n not in carrying)

    @property
    def carrying(self) -> tuple[str, ...]:
        """Stages after which the image, or a linear map of it, is on the stack for a later stage."""
        found, kinds = [], cast(Kinds, ("image",))
        for name in self.names:
            kinds = self[name].kinds_after(kinds)
            if "image" in kinds:
                found.append(name)
        return tuple(found)

    def kinds_after(self, kinds: Kinds) -> Kinds:
        """What is on the stack after these stages, of what was there before."""
        for name in self.names:
            kinds = self[name].kinds_after(kinds)
        return kinds

    def split(self, *after: str) -> list[Stages]:
        """The parts between the split points, each 'after stage NAME'; they share the tensors of this network."""
        points = self.split_points
        if list(after) != [name for name in points if name in after]:
            raise ContractError(
                f"Split points {', '.join(after)} are not possible. Allowed, each once and in this order: "
                f"{', '.join(points) or 'none, the network is one stage'}. Choose from these."
            )
        edges = [0, *(self.names.index(name) + 1 for name in after), len(self.names)]
        return [Stages({n: self[n] for n in self.names[i:j]}) for i, j in pairwise(edges)]

    def reach(self) -> int:
        """How many maps of the incoming stack these stages touch; those below stay where they are."""
        height = lowest = 0
        for name in self.names:
            height -= self[name].takes
            lowest = min(lowest, height)
            height += self[name].leaves
        return -lowest


@dataclass(frozen=True)
class Parts:
    """A network cut in three: `front` and `tail` for a site, `body` for the server. They share its tensors."""

    front: Stages
    body: Stages
    tail: Stages

    @property
    def at_site(self) -> Stages:
        """Front and tail under the names of the whole; to be held and trained, not to be run."""
        return Stages({n: part[n] for part in (self.front, self.tail) for n in part.names})

    @property
    def taken(self) -> Kinds:
        """What the body takes from the front, the lowest first."""
        return self.front.kinds_after(("image",))[-self.body.reach() :]

    @property
    def left(self) -> Kinds:
        """What the body leaves for the tail in its place."""
        return self.body.kinds_after(self.taken)


def cut_apart(network: Stages, cut: tuple[str, ...], *, reveal_labels: bool = False) -> Parts:
    """Front, body and tail of a network, cut after two stages or at a cut with a name (one of `network.cuts`).

    Where the tail is nothing but heads, the server can compute the labels from the gradients that it gets, since it knows the
    weights of the heads (`tests/attacks`). Such a cut is not possible unless `reveal_labels`.

    Raises:
        StudyError: the network cannot be cut so; the possible split points are listed.
    """
    points = network.split_points
    last = next((n for n in reversed(network.names) if not n.startswith("head")), "")  # nothing but heads follows it
    heads = [] if reveal_labels else [name for name in points if name == last]
    for after in network.cuts.get(cut[0], ()) if len(cut) == 1 else (cut,):
        fits = len(after) == 2 and list(after) == [name for name in points if name in after]
        if fits and after[-1] not in heads:
            return Parts(*network.split(_behind_guards(network, after[0]), after[1]))
    leak = f" After {', '.join(heads)} only with reveal_labels = true: the server can compute the labels." * bool(heads)
    if carrying := network.carrying:
        leak += f" After {', '.join(carrying)} the image itself, or a linear map of it, would cross: never."
    known = ", ".join(name for name in points if name not in heads) or "none, the network is one stage"
    raise StudyError(
        f"[protocol] cut = {list(cut)} is not possible. Allowed: {', '.join(network.cuts)}, or two of these in this order: "
        f"{known}.{leak} Choose from these, or another network."
    )


def are_of_kinds(maps: Sequence[Tensor], kinds: Kinds) -> bool:
    """Whether these maps are as many as said, whole numbers in `WHOLE`, and float all others."""
    return len(maps) == len(kinds) and all(
        m.dtype == WHOLE if kind == "places" else m.is_floating_point() for m, kind in zip(maps, kinds, strict=True)
    )


def _behind_guards(network: Stages, after: str) -> str:
    """The last of the defences that follow the stage, or the stage itself."""
    names = network.names
    guards = takewhile(lambda name: name.startswith(GUARD), names[names.index(after) + 1 :])
    return (after, *guards)[-1]


class Whole(Stage):
    """A network that is no list of stages, as one stage: it runs, and cannot be split."""

    takes = 1
    leaves = 1

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._aliases = _aliases(network)
        self.register_state_dict_post_hook(_drop_aliases)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_aliases)  # type: ignore[no-untyped-call]

    def forward(self, *maps: Tensor) -> Stack:
        out = self.network(*maps)
        finest = out[0] if isinstance(out, Sequence) else out
        return (cast(Tensor, finest),)


def _aliases(network: nn.Module) -> dict[str, str]:
    """Every further name of a tensor, and the first."""
    first: dict[int, str] = {}
    tensors = network.state_dict(keep_vars=True)  # the tensors themselves: the same object is the same tensor
    owners = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: owner for name, owner in owners.items() if name != owner}


def _drop_aliases(stage: Whole, tensors: dict[str, Any], prefix: str, _: Any) -> None:
    for name in stage._aliases:
        tensors.pop(f"{prefix}network.{name}", None)  # it may be hidden already (`freezing.py`)


def _add_aliases(stage: Whole, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, owner in stage._aliases.items():
        if (key := f"{prefix}network.{owner}") in tensors:
            tensors.setdefault(f"{prefix}network.{name}", tensors[key])


def make_network(
    network: PlugIn, *, n_channels: int, n_labels: int, plan: Mapping[str, Any], deep_supervision: bool
) -> Stages:
    """The network that a study names, with new weights from torch's generator."""
    build = catalog.load("networks", network.name)
    options = dict(network.options) | {"deep_supervision": deep_supervision}
    return as_stages(cast(nn.Module, build(n_channels=n_channels, n_labels=n_labels, plan=plan, **options)))


def names_elsewhere(
    network: PlugIn, *, n_channels: int, n_labels: int, plan: Mapping[str, Any], there: Collection[str] = ()
) -> Mapping[str, str]:
    """Our names of the network's tensors by those of published weights, where the network knows such names."""
    known = beside_build(network, "names_elsewhere")
    return {} if known is None else known(plan=plan, n_channels=n_channels, n_labels=n_labels, there=there)


def beside_build(network: PlugIn, function: str) -> Any:
    """What the network's file has beside `build` by this name, or `None`."""
    return getattr(inspect.getmodule(catalog.load("networks", network.name)), function, None)


def bare(name: str) -> str:
    """A tensor's name without what `torch.compile` and `DistributedDataParallel` put before it."""
    while name.startswith(("_orig_mod.", "module.")):
        name = name.partition(".")[2]
    return name


def as_stages(network: nn.Module) -> Stages:
    """The network itself, or, where it is no list of stages, one stage called `whole` around it."""
    return network if isinstance(network, Stages) else Stages({"whole": Whole(network)})
