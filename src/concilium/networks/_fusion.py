"""A network whose image is spread over parties: a front for each party's channels, and one `fuse` stage where their maps meet.

After Roth et al. 2022, Split-U-Net (arXiv:2208.10553): institutes hold different modalities of the same patients. The network is
a list of stages like any other (`fronts`, `fuse`, and what follows the cut of the network that it is made of), so that it also
trains in one place; `vertical` gives each front to its party.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from concilium.errors import ContractError, StudyError
from concilium.networks import Kinds, Stack, Stage, Stages, cut_apart
from concilium.networks._layers import CONVOLUTIONS

T = TypeVar("T")
How: TypeAlias = Literal["concat", "mean", "max"]
FRONTS, FUSE = "fronts", "fuse"
"""Names of the two stages."""
OF_FRONTS = f"{FRONTS}.*"
"""Pattern of the names of the fronts' tensors."""


class Fronts(Stage):
    """Every party's front on its own channels of the image; leaves the maps of the first party, then those of the next."""

    takes = 1

    def __init__(self, fronts: Mapping[str, Stages], channels: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self._modules.update(fronts)  # a party may be called as an attribute of a module is, such as `training`
        self.channels = {name: list(places) for name, places in channels.items()}
        self.each = len(_left(next(iter(fronts.values()))))
        """Maps of a party."""
        self.leaves = self.each * len(fronts)

    @property
    def parties(self) -> tuple[str, ...]:
        return tuple(self._modules)

    def of(self, party: str) -> Stages:
        """A party's front."""
        return cast(Stages, self._modules[party])

    def forward(self, *maps: Tensor) -> Stack:
        (image,) = maps
        return tuple(m for name in self.parties for m in self.of(name).run((image[:, self.channels[name]],)))


class Received(Stage):
    """What the receiver does to the maps of each party before they meet."""

    def __init__(self, parties: Mapping[str, Stages], each: int) -> None:
        super().__init__()
        self._modules.update(parties)
        self.each = each
        self.takes = self.leaves = each * len(parties)

    def forward(self, *maps: Tensor) -> Stack:
        received: list[Tensor] = []
        for i, stages in enumerate(self._modules.values()):
            received += cast(Stages, stages).run(maps[i * self.each : (i + 1) * self.each])
        return tuple(received)


class Fuse(Stage):
    """One stack of maps from those of all parties: concatenated and mixed by a 1×1 convolution, their mean, or their maximum.

    Where a party is `absent`, the mean and the maximum are those of the others, and to the convolution its maps are zeros.
    """

    def __init__(self, parties: Sequence[str], features: Sequence[int], dims: int, how: How) -> None:
        super().__init__()
        self.parties, self.how = tuple(parties), how
        self.takes, self.leaves = len(parties) * len(features), len(features)
        mixed = [CONVOLUTIONS[dims](len(parties) * n, n, 1) if n else nn.Identity() for n in features]
        self.mixing = nn.ModuleList(mixed if how == "concat" else [])
        self.absent: frozenset[str] = frozenset()

    def forward(self, *maps: Tensor) -> Stack:
        there = [i for i, party in enumerate(self.parties) if party not in self.absent]
        if not there:
            raise ContractError(f"All of {', '.join(self.parties)} are absent. At least one must be there. Name fewer.")
        groups = [maps[i :: self.leaves] for i in range(self.leaves)]
        return tuple(self._fused(i, group, there) for i, group in enumerate(groups))

    def _fused(self, place: int, group: Sequence[Tensor], there: Sequence[int]) -> Tensor:
        first = group[there[0]]
        if first.shape[1] == 0:  # a frame: it tells a size; another tensor, since it is not a party's any more
            return first.clone()
        if self.how == "concat":
            given = [m if i in there else torch.zeros_like(first) for i, m in enumerate(group)]
            return cast(Tensor, self.mixing[place](torch.cat(given, dim=1)))
        found = torch.stack([group[i] for i in there])
        return found.mean(0) if self.how == "mean" else found.amax(0)


@dataclass(frozen=True)
class Own:
    """What a party has of the network."""

    front: Stages
    tail: Stages | None
    """Where the labels are."""
    held: nn.Module
    """Both, under the names that their tensors have in the whole."""


def fused(
    build: Callable[[int], Stages],
    parties: Mapping[str, Sequence[int]],
    *,
    cut: tuple[str, ...],
    how: How,
    patch_size: Sequence[int],
    reveal_labels: bool,
) -> Stages:
    """The network with a front for each party, up to the first stage of `cut`, where the maps are fused.

    Args:
        build: the network for so many channels, with new weights.
        parties: name -> places of its channels in the image.
        cut: as in `cut_apart`.
        how: how maps are fused.
        patch_size: [voxels] along the plan's axes.
        reveal_labels: whether the second stage of the cut may be right before the heads.

    Raises:
        StudyError: there are no parties, or the network cannot be cut so, or maps of whole numbers would meet.
    """
    if not parties or not all(parties.values()):
        raise StudyError(
            f"[network] parties = {dict(parties)} is not allowed. Allowed: one party or more, each with one channel or more. "
            "Correct it."
        )
    whole = {name: build(len(places)) for name, places in parties.items()}
    cuts = {name: cut_apart(network, cut, reveal_labels=reveal_labels) for name, network in whole.items()}
    first = next(iter(cuts.values()))
    if "places" in (kinds := _left(first.front)):
        raise StudyError(
            f"[protocol] cut = {list(cut)} is not possible where parties are fused: after {first.front.names[-1]} there are maps "
            f"of whole numbers ({', '.join(kinds)}), which have no mean. Allowed: a cut above, or a network without them, such "
            "as unet. Choose one."
        )
    if trains := next((network.trains for network in whole.values() if network.trains), ()):
        raise StudyError(
            f"A network of which only {', '.join(trains)} train was to have a front for each party. No file of weights fits "
            "such a network, so that all else would stay as it was drawn, the new stage that fuses too. Allowed: a network that "
            "trains as a whole, such as sam with adapt = 'none'. Choose one."
        )
    features = [m.shape[1] for m in shapes_left(first.front, (1, len(next(iter(parties.values()))), *patch_size))]
    stages: dict[str, Stage] = {FRONTS: Fronts({name: c.front for name, c in cuts.items()}, parties)}
    stages[FUSE] = Fuse(tuple(parties), features, len(patch_size), how)
    stages |= {name: part[name] for part in (first.body, first.tail) for name in part.names}
    last = first.body.names[-1]
    return Stages(stages, {"shallow": ((FRONTS, last),), "deep": ((FUSE, last),)})


def fronts_of(network: Stages) -> Fronts | None:
    """The stage of the parties' fronts; `None` of a network that has none."""
    stage = network[FRONTS] if FRONTS in network.names else None
    return stage if isinstance(stage, Fronts) else None


def without_fronts(weights: Mapping[str, T]) -> dict[str, T]:
    """Of what is known by names of tensors, that which is of no front."""
    return {name: t for name, t in weights.items() if not name.startswith(f"{FRONTS}.")}


def tail_of(network: Stages) -> str:
    """The stage after which the tail of a fused network begins, by the cut that it was made with."""
    return network.cuts["shallow"][0][1]


def own_part(network: Stages, party: str, *, tail_after: str, labelled: bool) -> Own:
    """What a party has: its front, and where the labels are the tail, which begins after the stage `tail_after`.

    Raises:
        ContractError: the network has no such party, or is none of several parties.
    """
    fronts = fronts_of(network)
    if fronts is None or not (labelled or party in fronts.parties):
        known = ", ".join(fronts.parties) if fronts else "none"
        raise ContractError(f"{party} is no party of this network. Its parties are {known}. Correct the study.")
    front = fronts.of(party) if party in fronts.parties else Stages({})
    held, of_fronts = nn.Module(), nn.Module()
    if front.names:
        of_fronts._modules[party] = front
        held._modules[FRONTS] = of_fronts
    tail = network.split(tail_after)[-1] if labelled else None
    if tail is not None:
        held._modules.update(tail._modules)
    return Own(front, tail, held)


def without(networks: Sequence[Stages], parties: Sequence[str], channels: Sequence[str]) -> tuple[str, ...]:
    """Tell these networks which parties are missing; the channels that these have.

    Raises:
        StudyError: a network has no such party, or no other.
    """
    lacking: set[str] = set()
    for network in networks if parties else ():
        fronts = fronts_of(network)
        known = fronts.parties if fronts else ()
        if fronts is None or not set(parties) < set(known):
            raise StudyError(
                f"{', '.join(parties)} cannot be missing. Allowed: some, not all, of the parties of the network, which are "
                f"{', '.join(known) or 'none: its channels have one front'}. Name those."
            )
        cast(Fuse, network[FUSE]).absent = frozenset(parties)
        lacking |= {channels[place] for party in parties for place in fronts.channels[party]}
    return tuple(lacking)


def shapes_left(front: Stages, image: tuple[int, ...]) -> Stack:
    """What a front leaves of images of this shape (B, C, *spatial), the lowest first: shapes, and no values."""
    tensors = {n: t.to("meta") for n, t in (*front.named_parameters(), *front.named_buffers())}
    was = front.training
    try:  # a norm over the batch refuses to train on one image
        logits = functional_call(front.eval(), tensors, (torch.empty(image, device="meta"),))
    finally:
        front.train(was)
    return cast(Stack, logits[::-1])


def _left(front: Stages) -> Kinds:
    return front.kinds_after(("image",))
