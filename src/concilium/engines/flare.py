"""Sites in hospitals, each in a process of its own behind its firewall; messages over mutually authenticated connections.

NVIDIA FLARE provisions the certificates, authorises the job and starts its processes; the messages travel over our own
connections, with FLARE's certificates (decisions/0009). `concilium provision`, `serve` and `join` set up and start both ends.

A deadline counts from when a request is sent. A site whose process is started again comes back in a new life (epoch): it is
prepared anew and brought back to its last snapshot, as in a simulation.
"""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from concilium import wire
from concilium.engines import Engine, SiteInfo, Traffic, role_of
from concilium.engines._delivery import open_reply, require_free
from concilium.engines._frames import Certificates
from concilium.engines._hub import Hub, News
from concilium.engines._recovery import Recovery
from concilium.errors import EngineError, StudyError
from concilium.messages import Failure, Reply, Request, SiteLost, SiteTimeout

ABSENCE_S, SILENCE_S = 20.0, 120.0
"""A site without connections is lost after the one, a connected one that is silent after the other."""


@dataclass(frozen=True)
class Place:
    """Where the server listens, with which certificates, and for how long it waits for the sites before the run begins [s]."""

    files: Certificates
    address: tuple[str, int]
    wait_s: float = 600.0
    absence_s: float = ABSENCE_S
    silence_s: float = SILENCE_S
    stands: Callable[[], bool] = lambda: True
    """Whether what brings the sites here still runs."""


def connect(
    *,
    sites: Mapping[str, Path | None],
    test: Path | None,
    folder: Path,
    run: str,
    workers: int = 1,
    threads: int = 1,
    device: str = "auto",
    cache: Path | None = None,
    pictures: bool = True,
    place: Place | None = None,
    has_test: bool = False,
) -> Engine:
    """The sites of a study, as they dial in; whoever connects closes it. Data, threads and device are each site's own business.

    Args:
        sites: their names count; `test`, `workers`, `threads`, `device`, `cache` and `pictures` are those of a simulation.
        place: where the server listens.
        has_test: one more site, `test`, holds the held-out set.

    Raises:
        StudyError: nobody said where to listen: this engine is started by `concilium serve`.
    """
    if place is None:
        raise StudyError(
            f"[engine] name = 'flare' is not allowed here, for {', '.join(sites)}: `concilium run` works on one machine. Use "
            "`concilium serve` with the server's kit, and `concilium join` at each site."
        )
    roles = {name: role_of(name) for name in (*sites, *(["test"] if has_test else []))}
    engine = Flare(roles, place, run=run, spool=folder / "spool")
    try:
        engine.wait(place)
    except BaseException:
        engine.close()
        raise
    return engine


@dataclass
class _Pending:
    """A request on its way; `until` on the monotonic clock."""

    request: Request
    sequence: int
    deadline_s: float | None
    until: float
    body: bytes = b""
    """Packed; kept while other requests have to go first."""
    first: list[Path] = field(default_factory=list)
    """What the site must be told before, since it was lost."""


class Flare:
    """The engine; see the module's text."""

    def __init__(self, roles: Mapping[str, str], place: Place, *, run: str, spool: Path) -> None:
        self.sites: Mapping[str, SiteInfo] = {name: SiteInfo(name, role) for name, role in roles.items()}
        self.traffic: Mapping[str, Traffic] = {name: Traffic() for name in roles}
        self.dropped = 0
        """Replies that came after their deadline."""
        shutil.rmtree(spool, ignore_errors=True)
        self._spool = spool
        self._run = run
        self._sequence = 0
        self._epochs: dict[str, int] = {}
        """The life in which each site came; another one is not what the protocol talked to."""
        self._pending: dict[str, _Pending] = {}
        self._failed: list[tuple[str, Failure]] = []
        """Failures that nobody was told yet."""
        self._recovery = Recovery(spool, self.sites)
        self.hub = Hub(
            place.files,
            place.address,
            list(roles),
            run=run,
            spool=spool,
            absence_s=place.absence_s,
            silence_s=place.silence_s,
        )

    def wait(self, place: Place) -> None:
        """Wait until all sites are here, or for so long.

        Raises:
            EngineError: what brings the sites here has ended.
        """
        until = time.monotonic() + place.wait_s
        while time.monotonic() < until and len(self._epochs) < len(self.sites):
            if not place.stands():
                absent = ", ".join(site for site in self.sites if site not in self._epochs)
                raise EngineError(
                    f"FLARE's server has ended before all sites were here; absent: {absent}. Expected it to run on. Look into "
                    "console.log and log.txt in the server's kit."
                )
            with suppress(queue.Empty):
                news = self.hub.news.get(timeout=0.5)
                if news.event == "here":
                    self._epochs[news.site] = self.hub.epoch(news.site)

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        """Send; returns at once.

        Raises:
            ContractError: a site is not known, or has a request outstanding.
        """
        packed: dict[int, bytes] = {}
        require_free(requests, sites=self.sites, pending=self._pending)
        for site, request in requests.items():
            until = float("inf") if deadline_s is None else time.monotonic() + deadline_s
            body = packed[id(request)] if id(request) in packed else wire.pack(request)
            packed[id(request)] = body
            if self.hub.epoch(site) != self._epochs.get(site):
                self._lose(site)  # before this request: its reply is the first to tell of it
            pending = self._pending[site] = _Pending(request, -1, deadline_s, until, body)
            if not self.hub.present(site):
                self._fail(site, SiteLost())
                continue
            pending.first = self._recovery.due(site)
            self._recovery.sending(site, request, body)
            self.traffic[site].down += len(body)
            self._go_on(site, pending)

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        """The replies as they arrive, until nothing is outstanding."""
        while self._pending or self._failed:
            while self._failed:
                yield self._failed.pop(0)
            if not self._pending:
                return
            soon = min(p.until for p in self._pending.values()) - time.monotonic()
            try:
                news = self.hub.news.get(timeout=min(max(soon, 0.0), 60.0))
            except queue.Empty:
                self._overdue(time.monotonic())
                continue
            self._overdue(news.at)  # what came in time counts, however late it is read
            yield from self._on(news)

    def cancel(self, sites: Iterable[str]) -> None:
        """Ask sites to give up; each still gives its one reply or failure."""
        for site in sites:
            if site in self._pending:
                self.hub.cancel(site, self._pending[site].sequence, forget=False)

    def close(self) -> None:
        """Tell the sites that the run is over, and remove the spool."""
        self.hub.close()
        shutil.rmtree(self._spool, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------- internals

    def _go_on(self, site: str, pending: _Pending) -> None:
        """Send what the site must be told first, and then the request."""
        self._sequence += 1
        pending.sequence = self._sequence
        heading = {"run": self._run, "epoch": self._epochs[site], "deadline_s": pending.deadline_s}
        if pending.first:
            self.hub.send(site, self._sequence, heading | {"deadline_s": None}, pending.first.pop(0).read_bytes())
            return
        body, pending.body = pending.body, b""
        self.hub.send(site, self._sequence, heading, body)

    def _lose(self, site: str) -> None:
        """The life that the protocol talked to is over; the next, if it has begun, is the one to talk to."""
        known = self._epochs.get(site)
        self._epochs[site] = self.hub.epoch(site)
        if known is not None:
            self._recovery.lose({site}, told={site} & self._pending.keys())

    def _fail(self, site: str, failure: Failure) -> None:
        """Settle what is outstanding; a site that fails while asked is told of once."""
        if (pending := self._pending.pop(site, None)) is not None:
            self._failed.append((site, failure))
            if pending.body and pending.sequence >= 0:  # it was not brought back yet: once more, then
                self._recovery.lose({site}, told={site})

    def _on(self, news: News) -> Iterator[tuple[str, Reply | Failure]]:
        site, pending = news.site, self._pending.get(news.site)
        match news.event:
            case "reply" if pending is not None and pending.sequence == news.sequence and news.reply is not None:
                reply, size = open_reply(news.reply)
                if pending.body:  # it was one of those that go first
                    if isinstance(reply, Failure):
                        self._fail(site, reply)
                    else:
                        self._go_on(site, pending)
                    return
                del self._pending[site]
                self.traffic[site].up += size
                yield site, self._recovery.settle(site, pending.request, reply)
            case "reply":
                self.dropped += 1
                if news.reply is not None:
                    news.reply.unlink(missing_ok=True)
            case "gone":
                self._lose(site)
                self._fail(site, SiteLost())
            case "here" if self.hub.epoch(site) != self._epochs.get(site):
                self._lose(site)
                self._fail(site, SiteLost())

    def _overdue(self, now: float) -> None:
        for site, pending in list(self._pending.items()):
            if now >= pending.until:
                self.hub.cancel(site, pending.sequence, forget=True)
                self._fail(site, SiteTimeout(pending.deadline_s or 0.0))
