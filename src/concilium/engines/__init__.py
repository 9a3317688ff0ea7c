"""Engines deliver requests to sites and bring their replies. One file here: one engine, `connect(...) -> Engine`.

An engine has at most one request outstanding per site. Every request gives exactly one reply or failure by its deadline; a later
reply is dropped and counted. A request that several sites share is packed once. Packed replies wait on disk, and one is unpacked
at a time, so the server's memory does not grow with the number of sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a process that only waits for a study need not load torch
    from concilium.messages import Failure, Reply, Request


@dataclass(frozen=True)
class SiteInfo:
    """What the server knows of a site before it asks. `role`: `site`, or in a simulation also `test` and `pooled`."""

    name: str
    role: str


def role_of(name: str) -> str:
    """What a name stands for: `pooled` and `test`, which no site of a study may be called, or a `site`."""
    return name if name in ("pooled", "test") else "site"


@dataclass
class Traffic:
    """Bytes of messages to a site (`down`) and from it (`up`), as packed for the network."""

    down: int = 0
    up: int = 0


class Engine(Protocol):
    """What a protocol may use."""

    sites: Mapping[str, SiteInfo]
    traffic: Mapping[str, Traffic]

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        """Send; returns at once."""

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        """The replies as they arrive, until nothing is outstanding."""

    def cancel(self, sites: Iterable[str]) -> None:
        """Ask sites to give up what they are doing; each still gives its one reply or failure."""

    def close(self) -> None:
        """End; outstanding requests are cancelled."""


def ask(
    engine: Engine, requests: Mapping[str, Request], *, deadline_s: float | None = None
) -> Iterator[tuple[str, Reply | Failure]]:
    """Send the requests, then yield the replies as they arrive."""
    engine.send(requests, deadline_s=deadline_s)
    return engine.replies()
