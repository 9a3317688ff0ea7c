"""A network is an ordered list of named stages over a stack of maps. One file here: one network, `build(...) -> Stages`.

    build(*, n_channels: int, n_labels: int, plan: Mapping[str, Any], deep_supervision: bool, ...options) -> Stages

`plan` is the configuration of nnU-Net's plan (`plans.json`); a network that does not need it ignores it. All other
keyword-only parameters are options of the study's `[network]` table.

A stage takes the top `takes` maps of the stack and leaves `leaves` in their place. Names count resolution from the input:
`down0` is full resolution, `up0` its way back, `head0` the logits at full resolution, `head1` those of deep supervision one
level below. Heads come last, coarsest first, and `head0` is always there. Every tensor has one owner and one key. A network
that is no list of stages is one stage, `whole` (`as_stages`); of a tensor that it knows by several names the first is the key.

A file may also have `names_elsewhere(*, plan, n_channels, n_labels) -> Mapping[str, str]`: our name of a tensor by each name that
it has in published weights of this network, for studies that start from these.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn

from concilium import catalog
from concilium.errors import ContractError, StudyError
from concilium.messages import PlugIn

Stack = tuple[Tensor, ...]
"""Maps, each (B, C, *spatial); the top is the last."""


class Stage(nn.Module):
    """One step: takes the top `takes` maps and leaves `leaves` maps."""

    takes: int
    leaves: int

    def forward(self, *maps: Tensor) -> Stack:
        """The maps that replace those taken."""
        raise NotImplementedError


class Stages(nn.Module):
    """An ordered list of named stages. Called with an image (B, C, *spatial), it returns its logits, finest first."""

    mirror_axes: tuple[int, ...] | None = None
    """Spatial axes along which images may be mirrored to predict; `None`: all."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        super().__init__()
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
            stack = (*stack[:rest], *left)
        return stack

    def forward(self, image: Tensor) -> Stack:
        logits = self.run((image,))
        return logits[::-1]

    @property
    def split_points(self) -> tuple[str, ...]:
        """Stages after which the network may be split: all before the first head, since logits never cross a cut."""
        return tuple(name for name in self.names[:-1] if not name.startswith("head"))

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


CUTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "shallow": (("down0", "up0"), ("down0", "up1")),
    "deep": (("down1", "up1"),),
}
"""Split points with a name: as near to the ends as may be, and one resolution deeper. The first pair that is allowed counts."""


def cut_apart(network: Stages, cut: tuple[str, ...], *, reveal_labels: bool = False) -> Parts:
    """Front, body and tail of a network, cut after two stages or at a named cut (one of `CUTS`).

    Where the tail is nothing but heads, the server can compute the labels from the gradients that it gets, since it knows the
    weights of the heads (`tests/attacks`). Such a cut is not possible unless `reveal_labels`.

    Raises:
        StudyError: the network cannot be cut so; the possible split points are listed.
    """
    points = network.split_points
    heads = [name for name in points if _only_heads(network, name) and not reveal_labels]
    for after in CUTS.get(cut[0], ()) if len(cut) == 1 else (cut,):
        fits = len(after) == 2 and list(after) == [name for name in points if name in after]
        if fits and after[-1] not in heads:
            return Parts(*network.split(*after))
    leak = (
        f" After {', '.join(heads)} only with reveal_labels = true: the server can compute the labels." if heads else ""
    )
    known = ", ".join(name for name in points if name not in heads) or "none, the network is one stage"
    raise StudyError(
        f"[protocol] cut = {list(cut)} is not possible. Allowed: {', '.join(CUTS)}, or two of these in this order: {known}."
        f"{leak} Choose from these, or another network."
    )


def _only_heads(network: Stages, after: str) -> bool:
    """Whether nothing but heads comes after the stage."""
    return all(name.startswith("head") for name in network.names[network.names.index(after) + 1 :])


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
        del tensors[f"{prefix}network.{name}"]


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


def names_elsewhere(network: PlugIn, *, n_channels: int, n_labels: int, plan: Mapping[str, Any]) -> Mapping[str, str]:
    """Our names of the network's tensors by those of published weights, where the network knows such names."""
    module = inspect.getmodule(catalog.load("networks", network.name))
    known = getattr(module, "names_elsewhere", None)
    return {} if known is None else known(plan=plan, n_channels=n_channels, n_labels=n_labels)


def bare(name: str) -> str:
    """A tensor's name without what `torch.compile` and `DistributedDataParallel` put before it."""
    while name.startswith(("_orig_mod.", "module.")):
        name = name.partition(".")[2]
    return name


def as_stages(network: nn.Module) -> Stages:
    """The network itself, or, where it is no list of stages, one stage called `whole` around it."""
    return network if isinstance(network, Stages) else Stages({"whole": Whole(network)})
