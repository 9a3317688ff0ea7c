"""Defences: what is done at the end of the front to a map before it leaves its site. One file here: one defence.

    defend(*, n_channels: int, n_axes: int, ...options) -> Defence

builds the defence of one float map (B, n_channels, *spatial), `n_axes` of them spatial, with new weights from torch's generator
where it learns any. Maps of whole numbers (places within a pooling window) pass untouched. A study's `[[defences]]` are applied
in their order, as stages of the network (`defence0`, `defence1`, ...) that the front ends with; what the receiver does
(`restore0`) is the body's. So the whole network computes what its parts do, and every tensor has one owner.

What keeps to the contract: `send` changes no map in place, keeps its spatial size, passes gradients, and does the same in
training, in evaluation and in prediction (dropout stays on). What it draws is drawn from torch's generators, which the site seeds
from a key of the step, and where the server must not know it from a secret of the site too. Settings that change nothing leave
every bit.

A file may also have

    check(*, batch_size: int, ...options) -> None

called before anything trains: it raises a `StudyError` where the study's batches are not enough for it; and

    lapse(**options) -> str

says in words what the defence leaves open with these options, or nothing: it stands in a run's warnings and in the dossier.

What a defence is worth only an attack can tell that was trained against it; none here is said to be private.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from concilium import catalog
from concilium.messages import Guard, PlugIn
from concilium.networks import GUARD, Kinds, Stack, Stage, Stages, cut_apart
from concilium.networks._fusion import FRONTS, Fronts, Received, fronts_of, shapes_left

RESTORE = "restore"
"""Begins the name of the stages in which the receiver undoes what of a defence can be undone."""


@dataclass(frozen=True)
class Defence:
    """What is done to one map."""

    send: Callable[[Tensor], Tensor]
    """At the site: (B, n_channels, *spatial) -> the map that leaves. A module where it has weights."""
    n_channels: int
    """Of the map that leaves."""
    receive: nn.Module | None = None
    """At the receiver: the map that left -> one of as many channels as there were."""
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None
    """Image batch, map that leaves -> what is added to the loss at the site."""


class _Called(nn.Module):
    """A function as a module, the same in every mode."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, m: Tensor) -> Tensor:
        return self.function(m)


class OnMaps(Stage):
    """A stage that does something to each of the top maps, or nothing."""

    def __init__(self, each: Sequence[nn.Module | None], kinds: Kinds, penalties: Sequence[Any] = ()) -> None:
        super().__init__()
        self.takes = self.leaves = len(each)
        self.kinds = kinds
        self.penalties = tuple(penalties)
        """For each map what it adds to the loss, or nothing."""
        self.maps = nn.ModuleList(nn.Identity() if one is None else one for one in each)

    def forward(self, *maps: Tensor) -> Stack:
        return tuple(one(m) for one, m in zip(self.maps, maps, strict=True))


def guarded(build: Callable[..., Stages], guard: Guard, *, image: tuple[int, ...]) -> Callable[..., Stages]:
    """What builds the network with the defences of `guard` where the front of its cut ends; without any, `build` itself.

    Args:
        image: shape (B, C, *patch) of what the network takes, to learn how many channels maps have.
    """
    if not guard.defences:
        return build

    def built(**how: Any) -> Stages:
        return defended(build(**how), guard, image=image)

    return built


def defended(network: Stages, guard: Guard, *, image: tuple[int, ...]) -> Stages:
    """The network with these defences in it; the weights that it had are the same ones.

    Raises:
        StudyError: the network cannot be cut so, or a defence not be had for its maps.
    """
    if (fronts := fronts_of(network)) is not None:
        return _defended_fronts(network, fronts, guard, image)
    parts = cut_apart(network, guard.cut, reveal_labels=guard.reveal_labels)
    left = shapes_left(parts.front, image)[-len(parts.taken) :]
    at_site, at_server = guards_of(parts.taken, left, guard.defences)
    front = {n: parts.front[n] for n in parts.front.names}
    rest = {n: part[n] for part in (parts.body, parts.tail) for n in part.names}
    made = Stages({**front, **at_site, **at_server, **rest}, network.cuts)
    made.mirror_axes = network.mirror_axes
    return made


def _defended_fronts(network: Stages, fronts: Fronts, guard: Guard, image: tuple[int, ...]) -> Stages:
    """The network of several parties with these defences at the end of each party's front."""
    ends, receives = {}, {}
    for party in fronts.parties:
        front = fronts.of(party)
        left = shapes_left(front, (1, len(fronts.channels[party]), *image[2:]))
        at_site, at_server = guards_of(front.kinds_after(("image",)), left, guard.defences)
        ends[party] = Stages({**{n: front[n] for n in front.names}, **at_site})
        receives[party] = Stages(at_server)
    stages: dict[str, Stage] = {FRONTS: Fronts(ends, fronts.channels)}
    if any(received.names for received in receives.values()):
        stages[RESTORE] = Received(receives, fronts.each)
    stages |= {n: network[n] for n in network.names if n != FRONTS}
    made = Stages(stages, network.cuts)
    made.mirror_axes = network.mirror_axes
    return made


def guards_of(
    kinds: Kinds, maps: Sequence[Tensor], defences: Sequence[PlugIn]
) -> tuple[dict[str, Stage], dict[str, Stage]]:
    """The stages with which a front ends that leaves such maps, and those with which their receiver begins.

    Args:
        kinds: what the maps are, the lowest first.
        maps: tensors of their shapes.
    """
    at_site: dict[str, Stage] = {}
    at_server: dict[str, Stage] = {}
    widths = [m.shape[1] for m in maps]
    for number, plug_in in enumerate(defences):
        defend = catalog.load("defences", plug_in.name)
        each = [
            defend(n_channels=n, n_axes=m.ndim - 2, **plug_in.options) if kind == "features" and n else None
            for kind, m, n in zip(kinds, maps, widths, strict=True)
        ]
        sends = [one and _module(one.send) for one in each]
        at_site[f"{GUARD}{number}"] = OnMaps(sends, kinds, [one and one.penalty for one in each])
        receives = [one and one.receive for one in each]
        if any(receives):
            at_server = {f"{RESTORE}{number}": OnMaps(receives, kinds), **at_server}
        widths = [one.n_channels if one else n for one, n in zip(each, widths, strict=True)]
    return at_site, at_server


def _module(send: Callable[[Tensor], Tensor]) -> nn.Module:
    return send if isinstance(send, nn.Module) else _Called(send)


def undefended(front: Stages) -> tuple[Stages, Stages]:
    """A front without its defences, and these."""
    first = next((i for i, n in enumerate(front.names) if n.startswith(GUARD)), len(front.names))
    before, after = front.names[:first], front.names[first:]
    return Stages({n: front[n] for n in before}), Stages({n: front[n] for n in after})


def penalty_of(defences: Stages, image: Tensor, sent: Sequence[Tensor]) -> Tensor | None:
    """What defences add to the loss for an image batch and the maps of it that leave; `None` where none adds anything."""
    found = [
        penalty(image, m)
        for name in defences.names
        for penalty, m in zip(cast(OnMaps, defences[name]).penalties, sent, strict=True)
        if penalty is not None
    ]
    return torch.stack(found).mean() if found else None


def check_batches(defences: Sequence[PlugIn], batch_size: int) -> None:
    """Let each defence say whether batches of this size are enough for it.

    Raises:
        StudyError: they are not.
    """
    for plug_in, check in _parts(defences, "check"):
        check(batch_size=batch_size, **plug_in.options)


def lapses(title: str, defences: Sequence[PlugIn]) -> list[str]:
    """What defences of a model leave open by their options."""
    found = [lapse(**plug_in.options) for plug_in, lapse in _parts(defences, "lapse")]
    return [f"{title}: {text}" for text in found if text]


def _parts(defences: Sequence[PlugIn], part: str) -> Iterator[tuple[PlugIn, Callable[..., Any]]]:
    for plug_in in defences:
        module = inspect.getmodule(catalog.load("defences", plug_in.name))
        if (found := getattr(module, part, None)) is not None:
            yield plug_in, found


def described(defences: Sequence[PlugIn]) -> str:
    """The defences in words: `gaussian (scale = 0.5, bound = 3.0), quantise (bits = 4)`."""

    def spelt(options: Mapping[str, Any]) -> str:
        return ", ".join(f"{key} = {value}" for key, value in options.items())

    return ", ".join(f"{d.name} ({spelt(d.options)})" if d.options else d.name for d in defences)
