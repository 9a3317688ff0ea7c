"""The server's end of the connections: sites dial in, are known by their certificates, and are asked.

A site is lost that is not connected for `absence_s`, or connected and not heard of for `silence_s` (a long computation may keep
it from beating). Within that time it may dial in again in the same life (`epoch`): the request at hand is then sent again, and
the site answers it once. A site that comes in a new life has lost what it knew.
"""

from __future__ import annotations

import queue
import secrets
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from concilium import wire
from concilium.engines._frames import BEAT_S, VERSION, Certificates, Frame, Kind, Line, peer_name, tls
from concilium.errors import ContractError

HANDSHAKE_S = 20.0


@dataclass(frozen=True)
class News:
    """What happened: `here` (a site came, or came in a new life), `reply`, or `gone`."""

    event: str
    site: str
    sequence: int = -1
    reply: Path | None = None
    """The file with the packed reply; `None` where nobody waits for it any more."""
    at: float = field(default_factory=time.monotonic)
    """When, however late it is read."""


@dataclass
class _Place:
    """What the hub knows of one site. `changed` guards all of it."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    epoch: int = -1
    lines: dict[str, Line] = field(default_factory=dict)
    """Way -> connection."""
    heard: float = 0.0
    gone: bool = False
    """Silent for too long in this life; only a new one counts again."""
    waiting: tuple[int, dict[str, Any], bytes] | None = None
    """Number, heading and body of the request at hand."""
    cancels: list[int] = field(default_factory=list)

    def hear(self) -> None:
        """Something has come."""
        self.heard = time.monotonic()

    def hang_up(self) -> None:
        """Close both connections; the site may dial again, and its absence counts from now."""
        if self.lines:
            self.hear()
        for line in self.lines.values():
            line.close()
        self.lines.clear()
        self.changed.notify_all()


class Hub:
    """Listens; `news` tells what happens. Every connection has a thread."""

    def __init__(
        self,
        files: Certificates,
        address: tuple[str, int],
        sites: Collection[str],
        *,
        run: str,
        spool: Path,
        absence_s: float,
        silence_s: float,
    ) -> None:
        self.news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self.refused: list[str] = []
        """Why connections were turned away or ended, for the log."""
        self._places = {site: _Place() for site in sites}
        self._tls = tls(files, server=True)
        self._run, self._spool = run, spool
        self._absence_s, self._silence_s = absence_s, silence_s
        self._closed = threading.Event()
        spool.mkdir(parents=True, exist_ok=True)
        self._listener = socket.create_server(address)
        self.port: int = self._listener.getsockname()[1]
        for work in (self._accept, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def epoch(self, site: str) -> int:
        """Which life the site is in; -1 if it never came."""
        return self._places[site].epoch

    def present(self, site: str) -> bool:
        """Whether the site has come and was heard of lately."""
        place = self._places[site]
        return place.epoch >= 0 and not place.gone

    def send(self, site: str, sequence: int, heading: dict[str, Any], body: bytes) -> None:
        """Send a request; if a connection breaks, it goes again over the next one of the same life."""
        place = self._places[site]
        with place.changed:
            place.waiting = (sequence, heading | {"sequence": sequence}, body)
            place.changed.notify_all()

    def cancel(self, site: str, sequence: int, *, forget: bool) -> None:
        """Ask the site to give up a request; with `forget` nobody waits for its reply."""
        place = self._places[site]
        with place.changed:
            place.cancels.append(sequence)
            if forget and place.waiting is not None and place.waiting[0] == sequence:
                place.waiting = None
            place.changed.notify_all()

    def close(self) -> None:
        """Tell the sites that the run is over, and end."""
        self._closed.set()
        for place in self._places.values():
            with place.changed:
                place.changed.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        until = time.monotonic() + 5
        while any(p.lines for p in self._places.values()) and time.monotonic() < until:
            time.sleep(0.05)  # each writer says farewell, and each site then hangs up
        for place in self._places.values():
            with place.changed:
                place.hang_up()

    # --------------------------------------------------------------------------------------------------------- threads

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._receive, args=(raw,), daemon=True).start()

    def _receive(self, raw: socket.socket) -> None:
        """From a connection's handshake to its end."""
        site, line, place = "", None, None
        connection: socket.socket = raw
        try:
            raw.settimeout(HANDSHAKE_S)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = secured = self._tls.wrap_socket(raw, server_side=True)
            site = peer_name(secured)
            place = self._places.get(site)
            if place is None:
                raise ContractError(
                    f"{site!r} has a certificate. Expected a site of this study: {', '.join(self._places)}. Turned away."
                )
            line = Line(secured, heard=place.hear)
            way = self._greet(site, place, line, line.read(limit=0))
            connection.settimeout(None)
            if way == "up":
                while True:
                    self._take(site, place, line, line.read(limit=wire.LIMIT))
            self._write(place, line)
        except (OSError, ContractError, ValueError, KeyError) as e:
            if not self._closed.is_set():
                self.refused.append(f"{site or 'a stranger'}: {type(e).__name__}: {e}")
        finally:
            if line is not None:
                line.close()
            if place is not None and line is not None:
                with place.changed:
                    if line in place.lines.values():
                        place.hang_up()
            connection.close()

    def _greet(self, site: str, place: _Place, line: Line, hello: Frame) -> str:
        epoch, way = hello.heading.get("epoch"), hello.heading.get("way")
        known = hello.kind is Kind.HELLO and hello.heading.get("version") == VERSION
        if not known or way not in ("up", "down") or not isinstance(epoch, int) or epoch < 0:
            raise ContractError(
                f"It began with {hello.kind.name} {hello.heading}. Expected HELLO of version {VERSION}."
            )
        with place.changed:
            lost = place.gone and epoch == place.epoch
            if not lost and way == "down" and (epoch != place.epoch or "up" not in place.lines):
                raise ContractError(
                    f"The way up of life {epoch} is broken already. Expected both ways. It dials again."
                )
            line.write(Kind.WELCOME, {"run": self._run, "lost": lost})
            if lost:
                raise ContractError(f"Life {epoch} was taken to be lost. Expected a new one. It is told so.")
            if way == "up":  # the first that is dialled: what is left of older connections is dead
                place.hang_up()
            if epoch != place.epoch:
                place.epoch, place.gone, place.waiting, place.cancels = epoch, False, None, []
            place.lines[str(way)] = line
            if way == "down":
                self.news.put(News("here", site))
            place.changed.notify_all()
        return str(way)

    def _take(self, site: str, place: _Place, line: Line, frame: Frame) -> None:
        """Put a reply into a file, if it is waited for."""
        sequence = frame.heading["sequence"] if frame.kind is Kind.REPLY else -1
        with place.changed:
            expected = place.waiting is not None and place.waiting[0] == sequence
        if not expected:
            for _ in line.pieces(frame.size):
                pass
            if frame.kind is Kind.REPLY:
                self.news.put(News("reply", site, sequence))
            return
        path = self._spool / f"{sequence:09d}-{secrets.token_hex(4)}.reply"
        with path.open("wb") as file:
            for piece in line.pieces(frame.size):
                file.write(piece)
        with place.changed:
            if place.waiting is not None and place.waiting[0] == sequence:
                place.waiting = None
        self.news.put(News("reply", site, sequence, path))

    def _write(self, place: _Place, line: Line) -> None:
        """Send the request at hand, once over this connection; cancellations; and beats between."""
        sent = -1
        while True:
            with place.changed:
                due = place.changed.wait_for(partial(self._due, place, line, sent), timeout=BEAT_S)
                request = place.waiting if place.waiting is not None and place.waiting[0] != sent else None
                cancels, place.cancels = place.cancels, []
                current = place.lines.get("down") is line
            if self._closed.is_set():
                line.write(Kind.BYE)
                return
            if not current:
                return
            if request is not None:
                sent = request[0]
                line.write(Kind.REQUEST, request[1], request[2])
            for sequence in cancels:
                line.write(Kind.CANCEL, {"sequence": sequence})
            if not due:
                line.beat()

    def _due(self, place: _Place, line: Line, sent: int) -> bool:
        """Whether a connection's writer has something to do."""
        asked = place.waiting is not None and place.waiting[0] != sent
        return self._closed.is_set() or place.lines.get("down") is not line or asked or bool(place.cancels)

    def _watch(self) -> None:
        """Notice silence."""
        while not self._closed.wait(min(1.0, self._absence_s / 4)):
            now = time.monotonic()
            for site, place in self._places.items():
                with place.changed:
                    limit = self._silence_s if len(place.lines) == 2 else self._absence_s
                    if place.epoch >= 0 and not place.gone and now - place.heard > limit:
                        place.gone, place.waiting = True, None
                        place.hang_up()
                        self.news.put(News("gone", site))
