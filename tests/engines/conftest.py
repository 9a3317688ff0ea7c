"""Two ends of a real connection on this machine: certificates, sites in threads, and a wire between that can be cut."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from concilium.engines import _dial, _hub
from concilium.engines._dial import Dialler
from concilium.engines._frames import Certificates

PATIENCE_S = 30.0
"""Only against hanging: the machine may be busy."""


def wait_until(condition: Callable[[], Any], what: str = "") -> Any:
    """The first value of the condition that is true."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"did not happen: {what or condition}")


@pytest.fixture
def soon() -> Callable[..., Any]:
    return wait_until


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Whatever a test has started has ended when it is over."""
    before = set(threading.enumerate())
    yield

    def left() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in before and t.name != "tqdm_monitor"]

    wait_until(lambda: not left(), "the threads ended")


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends beat often, so that silence can be told soon."""
    monkeypatch.setattr(_hub, "BEAT_S", 0.2)
    monkeypatch.setattr(_dial, "BEAT_S", 0.2)


# -------------------------------------------------------------------------------------------------------- certificates


@dataclass(frozen=True)
class Authority:
    """Issues certificates into a folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def issue(self, name: str) -> Certificates:
        """A certificate for this common name, good for 127.0.0.1, and its key."""
        own = ec.generate_private_key(ec.SECP256R1())
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        files = Certificates(*(self.folder / f for f in ("root.pem", f"{name}.crt", f"{name}.key")))
        if not files.authority.is_file():
            files.authority.write_bytes(self._signed("root", self.key, x509.BasicConstraints(ca=True, path_length=1)))
        files.certificate.write_bytes(self._signed(name, own, address))
        plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        files.key.write_bytes(own.private_bytes(*plain))
        return files

    def _signed(self, name: str, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, "root"))
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
            now + datetime.timedelta(days=1)
        )
        signed = builder.add_extension(extension, critical=False).sign(self.key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody here trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))


# --------------------------------------------------------------------------------------------------------------- sites

Handler = Callable[[bytes, dict[str, Any], Callable[[], bool]], bytes]


@dataclass
class SiteThread:
    """A site in a thread. As a real one it answers a request once, and gives the same reply when it is asked again."""

    name: str
    files: Certificates
    port: int
    handler: Handler
    host: str = "127.0.0.1"
    patience_s: float = PATIENCE_S
    lives: list[tuple[str, int]] = field(default_factory=list)
    """Run and epoch of each."""
    effects: Counter[int] = field(default_factory=Counter)
    """How often the handler was called, by number of the request."""
    said: list[str] = field(default_factory=list)
    error: BaseException | None = None
    """What `serve` has raised."""
    stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> SiteThread:
        """Dial."""
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return self

    @property
    def ended(self) -> bool:
        """Whether `serve` has returned or raised."""
        return not self.thread.is_alive()

    def _serve(self) -> None:
        dialler = Dialler(
            self.files,
            (self.host, self.port),
            patience_s=self.patience_s,
            stopped=self.stop.is_set,
            say=self.said.append,
        )
        try:
            dialler.serve(self._begin)
        except BaseException as e:
            self.error = e

    def _begin(self, run: str, epoch: int) -> Handler:
        self.lives.append((run, epoch))
        given: dict[int, bytes] = {}

        def answer(packed: bytes, heading: dict[str, Any], cancelled: Callable[[], bool]) -> bytes:
            number = heading["sequence"]
            if number not in given:
                self.effects[number] += 1
                given[number] = self.handler(packed, heading, cancelled)
            return given[number]

        return answer


@pytest.fixture
def join(authority: Authority) -> Iterator[Callable[..., SiteThread]]:
    """`join(name, port, handler)`: a site that has dialled; ended with the test."""
    sites: list[SiteThread] = []

    def make(name: str, port: int, handler: Handler = lambda packed, *_: packed[::-1], **options: Any) -> SiteThread:
        sites.append(SiteThread(name, authority.issue(name), port, handler, **options).start())
        return sites[-1]

    yield make
    for site in sites:
        site.stop.set()
    for site in sites:
        site.thread.join(PATIENCE_S)
        assert site.ended, f"{site.name} has not ended"


# ---------------------------------------------------------------------------------------------------------------- wire


class Wire:
    """Passes bytes between sites and the server, until it is cut."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.refusing = False
        """Whether new connections are turned away."""
        self.seen: list[bytes] = []
        """What has passed from the site, if `watched`."""
        self.watched = False
        self.flowing = threading.Event()
        """While it is not set nothing passes, and nobody is told."""
        self.flowing.set()
        self.on_dialled: Callable[[], None] = lambda: None
        """Called before a connection is passed on."""
        self._counting = threading.Lock()
        self._cut_after: dict[str, int] = {}
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *which: int) -> None:
        """Break these connections, in the order in which they were made; without numbers, all."""
        pairs = list(self._pairs)
        for pair in [pairs[i] for i in which] if which else pairs:
            self._end(pair)

    def cut_after(self, way: str, n_bytes: int) -> None:
        """Break everything once so many more bytes have passed `down` (to the site) or `up`."""
        self._cut_after[way] = n_bytes

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.flowing.set()
        self.cut()

    @property
    def n_cuts_due(self) -> int:
        return len(self._cut_after)

    def _end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._counting:
            if pair in self._pairs:
                self._pairs.remove(pair)
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.on_dialled()
            try:
                if self.refusing:
                    raise ConnectionRefusedError
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._pairs.append((near, far))
            for way, source, sink in (("up", near, far), ("down", far, near)):
                threading.Thread(target=self._pass, args=(way, source, sink, (near, far)), daemon=True).start()

    def _pass(
        self, way: str, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.watched and way == "up":
                    self.seen.append(data)
                self.flowing.wait()
                sink.sendall(data)
                if self._is_due(way, len(data)):
                    self.cut()
        self._end(pair)

    def _is_due(self, way: str, n_bytes: int) -> bool:
        with self._counting:
            if way in self._cut_after:
                self._cut_after[way] -= n_bytes
            return self._cut_after.get(way, 1) <= 0 and self._cut_after.pop(way) <= 0


@pytest.fixture
def wire_to() -> Iterator[Callable[[int], Wire]]:
    """`wire_to(port)`: a wire to a server on this port; closed with the test."""
    wires: list[Wire] = []

    def make(port: int) -> Wire:
        wires.append(Wire(port))
        return wires[-1]

    yield make
    for wire in wires:
        wire.close()
