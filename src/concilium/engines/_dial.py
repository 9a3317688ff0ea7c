"""A site's end of the connections: it dials out, takes requests one at a time, and answers.

No port is open at a site. Connections that break are dialled again, in the same life, until `patience_s` has passed without.
"""

from __future__ import annotations

import queue
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from concilium import wire
from concilium.engines._frames import BEAT_S, SERVER, VERSION, Certificates, Frame, Kind, Line, peer_name, tls
from concilium.errors import ContractError, EngineError

Answer = Callable[[bytes, dict[str, Any], Callable[[], bool]], bytes]
"""(packed request, its heading, whether it was cancelled) -> packed reply."""
DIAL_S = 20.0
DEAF_S = 60.0
"""A server that sends nothing for so long, not even beats, is dialled again."""


class Dialler:
    """A site's connections; `serve` returns when the server says that the run is over.

    A life (`epoch`) ends with the process, or when the server has taken the site to be lost: what it knew is stale then.
    """

    def __init__(
        self,
        files: Certificates,
        address: tuple[str, int],
        *,
        patience_s: float,
        stopped: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._tls, self._address, self._epoch = tls(files, server=False), address, secrets.randbits(48)
        self._patience_s, self._stopped, self._say = patience_s, stopped, say
        self._down: Line | None = None
        self._up: Line | None = None
        self._heard = time.monotonic()
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._over = threading.Event()
        self._lost: Exception | None = None

    def serve(self, begin: Callable[[str, int], Answer]) -> None:
        """Answer requests until the run is over; `begin` gets the run's id and the epoch, and gives what answers in this life.

        Raises:
            EngineError: the server could not be reached for too long, or is not the one of this kit.
        """
        run = self._connect()
        try:
            self._work(run, begin)
        finally:
            self._over.set()
            self._hang_up()
        if self._lost is not None:
            raise self._lost

    def _work(self, run: str, begin: Callable[[str, int], Answer]) -> None:
        epoch, answer = self._epoch, begin(run, self._epoch)
        for work in (lambda: self._listen(run), self._beat):
            threading.Thread(target=work, daemon=True).start()
        while not self._stopped():
            try:
                heading, body = self._requests.get(timeout=0.2)
            except queue.Empty:
                if self._over.is_set():
                    return
                continue
            if epoch != self._epoch:
                epoch, answer = self._epoch, begin(run, self._epoch)
            number = heading["sequence"]
            reply = answer(body, heading, partial(self._is_cancelled, number))
            del body
            self._say_up(partial(Line.write, kind=Kind.REPLY, heading={"sequence": number}, body=reply))

    def _say_up(self, write: Callable[[Line], None]) -> None:
        """Write to the server; if that fails, both connections are dialled again, and the server asks again."""
        up, down = self._up, self._down
        if up is None:
            return
        try:
            write(up)
        except OSError:
            if down is not None:
                down.close()

    # ------------------------------------------------------------------------------------------------------- internals

    def _is_cancelled(self, number: int) -> bool:
        return number in self._cancelled or self._over.is_set() or self._stopped()

    def _connect(self) -> str:
        """Dial until somebody answers; the run's id."""
        until = time.monotonic() + self._patience_s
        wait = 0.2
        while True:
            try:
                self._up, _ = self._dial("up")
                self._down, run = self._dial("down")
                self._heard = time.monotonic()
                return run
            except (OSError, ContractError, KeyError) as e:
                self._hang_up()
                self._say(f"no connection ({type(e).__name__}: {e})")
                if time.monotonic() > until or self._stopped() or self._over.is_set():
                    host, port = self._address
                    raise EngineError(
                        f"The server at {host}:{port} could not be reached for {self._patience_s:.0f} s ({type(e).__name__}). "
                        "Expected it to listen there, with this kit's certificates. Check that it runs and that outgoing "
                        "connections to that port are allowed."
                    ) from e
                time.sleep(wait * random.uniform(0.5, 1.0))  # sites must not all dial at once
                wait = min(2 * wait, 10.0)

    def _dial(self, way: str) -> tuple[Line, str]:
        connection: socket.socket = socket.create_connection(self._address, timeout=DIAL_S)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = secured = self._tls.wrap_socket(connection, server_hostname=self._address[0])
            if peer_name(secured) != SERVER:  # a site's certificate is of the same authority
                raise ContractError(f"{peer_name(secured)!r} answered. Expected {SERVER!r}. Do not go on.")
            line = Line(secured, heard=self._hear)
            line.write(Kind.HELLO, {"version": VERSION, "epoch": self._epoch, "way": way})
            welcome = line.read(limit=0)
            if welcome.heading.get("lost"):
                self._epoch = secrets.randbits(48)
                raise ConnectionResetError("The server has taken this site to be lost: it begins a new life.")
            if welcome.kind is not Kind.WELCOME:
                raise ContractError(f"The server answered {welcome.kind.name}. Expected WELCOME. Install one version.")
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return line, str(welcome.heading["run"])

    def _hear(self) -> None:
        self._heard = time.monotonic()

    def _hang_up(self) -> None:
        for line in (self._down, self._up):
            if line is not None:
                line.close()
        self._down = self._up = None

    def _listen(self, run: str) -> None:
        """Read until the run is over; dial again when the connection breaks."""
        while not self._over.is_set():
            try:
                down = self._down
                if down is None:
                    raise ConnectionError("closed")
                self._take(down, down.read(limit=wire.LIMIT))
            except (OSError, ContractError, KeyError, ValueError) as e:
                if self._over.is_set():
                    return
                self._say(f"connection lost ({type(e).__name__})")
                self._hang_up()
                try:
                    if self._connect() != run:
                        raise EngineError(f"The server is at another run than {run}. Its run has ended. Join again.")
                except EngineError as lost:
                    self._lost = lost
                    self._over.set()

    def _take(self, line: Line, frame: Frame) -> None:
        match frame.kind:
            case Kind.REQUEST:
                self._requests.put((frame.heading, line.body(frame.size)))
            case Kind.CANCEL:
                self._cancelled.add(frame.heading["sequence"])
            case Kind.BYE:
                self._over.set()

    def _beat(self) -> None:
        """Say that this site is there, and notice when the server is not."""
        while not self._over.wait(BEAT_S):
            self._say_up(Line.beat)
            down = self._down
            if down is not None and time.monotonic() - self._heard > DEAF_S:
                down.close()  # the connection stands, but nothing comes: dial again
