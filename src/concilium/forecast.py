"""What a study will cost, from shapes alone: nothing is computed, and no memory is taken for the network or its maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from concilium.loads import Parties, parties_of
from concilium.networks import Stages, cut_apart
from concilium.networks._fusion import FRONTS, without_fronts
from concilium.optimization import autocast
from concilium.transport import size_of


@dataclass(frozen=True)
class SiteCost:
    """Of one site, in a round where nothing else is said."""

    up: int
    """Bytes that it sends."""
    down: int
    """Bytes that it receives."""
    memory: int
    """Most bytes of tensors at a time."""
    seconds: float
    """Of computing."""
    steps: int
    besides_up: int = 0
    """Bytes that it sends outside of rounds, in the whole run (`besides.py`)."""
    besides_down: int = 0
    """Bytes that it receives outside of rounds."""


@dataclass(frozen=True)
class Cost:
    """Of one way to train, in a round."""

    protocol: str
    variant: str
    """Of `splitfed`."""
    cut: tuple[str, ...]
    transport: str
    sites: Mapping[str, SiteCost]
    server_memory: int
    server_seconds: float
    """Of computing, for all sites."""
    seconds: float
    """Of the round."""
    rounds: int
    name: str = ""
    """Of the study's variant; none: of the study itself."""


@dataclass(frozen=True)
class SplitBytes:
    """Bytes of tensors that a site sends (`up`) and receives (`down`) in split training, without headers.

    A step sends the maps of the front up and those of the body down, and the gradient of every float map the other way. A round
    begins and ends with the weights of front and tail.
    """

    step_up: int
    step_down: int
    weights: int

    def round(self, steps: int) -> tuple[int, int]:
        """Bytes up and down in a round of so many steps."""
        return steps * self.step_up + self.weights, steps * self.step_down + self.weights


@dataclass(frozen=True)
class Crossing:
    """Tensors with shapes and no values: what crosses the cuts in a step, and what sites hold."""

    sent: Sequence[Tensor]
    """Maps of the front."""
    left: Sequence[Tensor]
    """What the body leaves; some may be of those that came."""
    at_site: Mapping[str, Tensor]
    """Front and tail."""


def crossing_of(
    network: Callable[..., Stages],
    cut: tuple[str, ...],
    *,
    batch: tuple[int, ...],
    precision: str,
    reveal_labels: bool = False,
) -> Crossing:
    """Run front and body of this network, cut so, on images of shape `batch` (B, C, *patch), without computing anything.

    Raises:
        StudyError: the network cannot be cut so.
    """
    with FakeTensorMode(), torch.device("cpu"):
        whole = network() if reveal_labels else network(deep_supervision=False)
        parts = cut_apart(whole, cut, reveal_labels=reveal_labels)
        with autocast(torch.device("cpu"), precision):
            stack = parts.front.run((torch.empty(batch),))
            sent = stack[len(stack) - parts.body.reach() :]
            left = parts.body.run(sent)
        return Crossing(sent, left, parts.at_site.state_dict())


def split_bytes(
    network: Callable[..., Stages], cut: tuple[str, ...], *, transport: str = "float32", **how: Any
) -> SplitBytes:
    """What travels in split training of this network; `how`: as for `crossing_of`.

    Raises:
        StudyError: the network cannot be cut so.
    """
    crossing = crossing_of(network, cut, **how)
    weights = sum(t.numel() * t.element_size() for t in crossing.at_site.values())
    return SplitBytes(*step_bytes(crossing.sent, crossing.left, transport), weights)


def party_bytes(
    network: Callable[..., Stages],
    *,
    batch: tuple[int, ...],
    precision: str,
    after: str,
    labels: str,
    transport: str = "float32",
    stay: bool = False,
) -> dict[str, SplitBytes]:
    """Of each party what it sends and receives in vertical training; `after`, `labels`: as for `loads.party_loads`.

    A party sends its maps and receives their gradients. Whoever has the labels receives besides what the tail takes, and sends
    the gradient of that. A step that a party is left out of is not in it. With `stay` the weights of fronts do not travel.
    """
    cut, sent, left = _of_parties(network, batch, precision=precision, after=after, labels=labels)
    found = {}
    for name, own in cut.own.items():
        up, down = step_bytes(sent.get(name, ()), (), transport)
        if name == labels:
            more_down, more_up = step_bytes(left, (), transport)
            up, down = up + more_up, down + more_down
        held = without_fronts(own.held.state_dict()) if stay else own.held.state_dict()
        weights = sum(t.numel() * t.element_size() for t in held.values())
        found[name] = SplitBytes(up, down, weights)
    return found


def look_bytes(
    network: Callable[..., Stages],
    *,
    image: tuple[int, ...],
    precision: str,
    after: str,
    labels: str,
    transport: str = "float32",
) -> dict[str, tuple[int, int]]:
    """Of each party what it sends and receives when a window (1, C, *patch) is segmented; no gradients travel.

    The other arguments: as for `party_bytes`.
    """
    cut, sent, left = _of_parties(network, image, precision=precision, after=after, labels=labels)
    down = _travel(left, transport)
    return {name: (_travel(sent.get(name, ()), transport), down if name == labels else 0) for name in cut.own}


def _of_parties(
    network: Callable[..., Stages], batch: tuple[int, ...], *, precision: str, after: str, labels: str
) -> tuple[Parties, Mapping[str, Sequence[Tensor]], Sequence[Tensor]]:
    """The parties' parts, the maps of each front of such a batch, and what comes to the tail: shapes without values."""
    with FakeTensorMode(), torch.device("cpu"):
        whole = network() if after == FRONTS else network(deep_supervision=False)
        cut = parties_of(whole, after=after, labels=labels)
        image = torch.empty(batch)
        with autocast(torch.device("cpu"), precision):
            sent = {name: cut.own[name].front.run((image[:, list(places)],)) for name, places in cut.channels.items()}
            left = cut.body.run(tuple(m for maps in sent.values() for m in maps))
    return cut, sent, left


def step_bytes(sent: Sequence[Tensor], left: Sequence[Tensor], transport: str = "float32") -> tuple[int, int]:
    """Bytes up and down in a step, where the front sends these maps and the body leaves those; it may leave some that came."""
    back = [m for m in left if all(m is not came for came in sent)]
    up = _travel(sent, transport) + _travel(back, transport, gradients=True)
    return up, _travel(back, transport) + _travel(sent, transport, gradients=True)


def _travel(maps: Sequence[Tensor], transport: str, *, gradients: bool = False) -> int:
    """Size of these maps, or of their gradients, as they travel."""
    return sum(size_of(m, transport, gradient=gradients) for m in maps)
