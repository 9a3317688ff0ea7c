"""A network is an ordered list of named stages over a stack of maps. One file here: one network, `build(...) -> Stages`.

    build(*, n_channels: int, n_labels: int, plan: Mapping[str, Any], deep_supervision: bool, ...options) -> Stages

`plan` is the configuration of nnU-Net's plan (`plans.json`); a network that does not need it ignores it. All other
keyword-only parameters are options of the study's `[network]` table.

A stage takes the top `takes` maps of the stack and leaves `leaves` in their place. Names count resolution from the input:
`down0` is full resolution, `up0` its way back, `head0` the logits at full resolution, `head1` those of deep supervision one
level below. Heads come last, coarsest first, and `head0` is always there. Every tensor has one owner and one key. A network
that is no list of stages is one stage, `whole` (`as_stages`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn

from concilium import catalog
from concilium.errors import ContractError
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


class Whole(Stage):
    """A network that is no list of stages, as one stage: it runs, and cannot be split."""

    takes = 1
    leaves = 1

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *maps: Tensor) -> Stack:
        out = self.network(*maps)
        finest = out[0] if isinstance(out, Sequence) else out
        return (cast(Tensor, finest),)


def make_network(
    network: PlugIn, *, n_channels: int, n_labels: int, plan: Mapping[str, Any], deep_supervision: bool
) -> Stages:
    """The network that a study names, with new weights from torch's generator."""
    build = catalog.load("networks", network.name)
    options = dict(network.options) | {"deep_supervision": deep_supervision}
    return as_stages(cast(nn.Module, build(n_channels=n_channels, n_labels=n_labels, plan=plan, **options)))


def as_stages(network: nn.Module) -> Stages:
    """The network itself, or, where it is no list of stages, one stage called `whole` around it."""
    return network if isinstance(network, Stages) else Stages({"whole": Whole(network)})
