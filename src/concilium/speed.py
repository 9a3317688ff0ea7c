"""How fast machines train a network: as a study tells, or as this one turns out to be where a step is timed on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from concilium.loads import Load, parties_of, party_step, split_step, whole_step
from concilium.messages import Training
from concilium.networks import Stages, cut_apart
from concilium.networks._fusion import FRONTS
from concilium.optimization import device_named, make_optimizer
from concilium.study import ForecastTable

Seconds: TypeAlias = tuple[float, float, float, float]
"""Of a step at the site and at the server, and of the optimisers there."""
MOST = 30e9
"""Operations of a step that is timed, at most, where the patch can be made smaller."""


@dataclass(frozen=True)
class Speed:
    """Seconds that an operation takes on a site's machine and on the server's, and those that the optimisers take of a step."""

    site: float
    server: float
    site_optimizer: float = 0.0
    server_optimizer: float = 0.0

    def of_site(self, load: Load) -> float:
        return self.site * load.flops + self.site_optimizer

    def of_server(self, load: Load) -> float:
        return self.server * load.flops + self.server_optimizer


def speed_of(
    told: ForecastTable, device: str, clock: Callable[[Tensor], Seconds], batch: Sequence[int], site: Load, server: Load
) -> Speed:
    """As a study tells it, else as it is on this machine, where a step is timed on images small enough.

    Args:
        clock: times a step on these images.
        batch: shape of the images of a whole step, which asks for these loads.
    """
    if told.site_gflops is not None and told.server_gflops is not None:
        return Speed(1e-9 / told.site_gflops, 1e-9 / told.server_gflops)
    n = min(2, batch[0])  # a norm over the batch needs two
    shape = _smaller((n, *batch[1:]), site.flops * n / batch[0])
    share = prod(shape) / prod(batch)
    images = torch.zeros(shape, device=device_named(device))
    clock(images)  # what is set up the first time is not counted
    at_site, at_server, of_site, of_server = clock(images)
    here = Speed(at_site / max(1, site.flops * share), at_server / max(1, server.flops * share), of_site, of_server)
    ours = here if told.site_gflops is None else replace(here, site=1e-9 / told.site_gflops, site_optimizer=0.0)
    return ours if told.server_gflops is None else replace(ours, server=1e-9 / told.server_gflops, server_optimizer=0.0)


def _smaller(shape: tuple[int, ...], flops: float) -> tuple[int, ...]:
    """The shape with its longest axis halved until a step is small enough, as long as a network can still be expected to fit."""
    sizes = list(shape)
    while flops > MOST:
        axis = max(range(2, len(sizes)), key=lambda i: sizes[i])
        if sizes[axis] % 64:
            break
        sizes[axis] //= 2
        flops /= 2
    return tuple(sizes)


class _Clock:
    """Adds up the seconds spent within its context."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    @contextmanager
    def running(self) -> Iterator[None]:
        began = self._now()
        yield
        self.seconds += self._now() - began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def time_whole(network: Callable[..., Stages], training: Training, images: Tensor) -> Seconds:
    """Seconds of a step at the site and at the server, and of their optimisers."""
    built = network(deep_supervision=training.deep_supervision).to(images.device)
    clock, of_optimizer = _Clock(images.device), _Clock(images.device)
    whole_step(built, images, training, at_site=clock.running)
    optimizer = make_optimizer(built, training)
    with of_optimizer.running():
        optimizer.step()
    return clock.seconds, 0.0, of_optimizer.seconds, 0.0


def time_parties(
    network: Callable[..., Stages], training: Training, images: Tensor, *, after: str, labels: str
) -> Seconds:
    """The same of a network of several parties: of them all together, and of one's optimiser in the mean."""
    built = network(deep_supervision=training.deep_supervision and after == FRONTS).to(images.device)
    cut = parties_of(built, after=after, labels=labels)
    clocks = [_Clock(images.device) for _ in range(4)]
    at = dict.fromkeys(cut.own, clocks[0].running)
    party_step(cut, images, training, at=at, at_tail=nullcontext, at_server=clocks[1].running)
    for part, clock in (*((own.held, clocks[2]) for own in cut.own.values()), (cut.body, clocks[3])):
        if any(True for _ in part.parameters()):
            optimizer = make_optimizer(part, training)
            with clock.running():
                optimizer.step()
    at_sites, at_server, of_sites, of_server = (clock.seconds for clock in clocks)
    return at_sites, at_server, of_sites / len(cut.own), of_server


def time_split(
    network: Callable[..., Stages], training: Training, images: Tensor, *, cut: tuple[str, ...], reveal_labels: bool
) -> Seconds:
    """The same where the network is cut."""
    built = network(deep_supervision=training.deep_supervision and reveal_labels).to(images.device)
    parts = cut_apart(built, cut, reveal_labels=reveal_labels)
    clocks = [_Clock(images.device) for _ in range(4)]
    split_step(parts, images, training, at_site=clocks[0].running, at_server=clocks[1].running)
    for part, clock in zip((parts.at_site, parts.body), clocks[2:], strict=True):
        optimizer = make_optimizer(part, training)
        with clock.running():
            optimizer.step()
    at_site, at_server, of_site, of_server = (clock.seconds for clock in clocks)
    return at_site, at_server, of_site, of_server
