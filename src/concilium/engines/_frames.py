"""Frames over mutually authenticated TLS connections: what the server's end and a site's end have in common.

A site dials two connections, one for each way (`down` to it, `up` from it): one thread reads from a connection or writes to it,
never two at once, which OpenSSL does not allow. A frame is a head (`>BIQ`: kind, bytes of the heading, bytes of the body), a
heading (JSON) and a body (a packed message, or nothing). A beat has neither. Bodies are read piece by piece, so that a reader
sees life in a long one, and may put it on disk.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from threading import Lock
from typing import Any

from concilium.errors import ContractError

HEAD = struct.Struct(">BIQ")
HEADING_LIMIT = 1 << 16
PIECE = 1 << 20
"""Bytes that are read or written at a time."""
VERSION = 1
"""Of the frames; both ends must have the same."""
SERVER = "server"
"""Name in the server's certificate, and of its kit."""
BEAT_S = 2.0
"""Each end says so often that it is there."""


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    """A site introduces this life of itself: version, epoch, and which way the connection is for."""
    WELCOME = 2
    """The server answers with the run."""
    REQUEST = 3
    REPLY = 4
    CANCEL = 5
    BEAT = 6
    BYE = 7
    """The run is over."""


@dataclass(frozen=True)
class Frame:
    """A frame whose body is still to be read: exactly `size` bytes, by `pieces`."""

    kind: Kind
    heading: dict[str, Any]
    size: int


@dataclass(frozen=True)
class Certificates:
    """Files of one party: the authority that all trust, and its own certificate and key."""

    authority: Path
    certificate: Path
    key: Path


class Line:
    """One end of a connection. After the greeting one end only writes, and from any thread, the other only reads, from one."""

    def __init__(self, connection: ssl.SSLSocket, *, heard: Callable[[], None] = lambda: None) -> None:
        self._connection = connection
        self._writing = Lock()
        self._closed = False
        self._heard = heard
        """Called whenever something has come."""

    def write(self, kind: Kind, heading: dict[str, Any] | None = None, body: bytes | memoryview = b"") -> None:
        """Send a frame.

        Raises:
            OSError: the connection is gone.
        """
        text = json.dumps(heading).encode() if heading else b""
        view = memoryview(body)
        with self._writing:
            self._check_open()
            self._connection.sendall(HEAD.pack(kind, len(text), len(view)) + text)
            for start in range(0, len(view), PIECE):
                self._check_open()
                self._connection.sendall(view[start : start + PIECE])

    def beat(self) -> None:
        """Send a beat, unless a frame is under way, which says as much."""
        if self._writing.acquire(blocking=False):
            try:
                self._check_open()
                self._connection.sendall(HEAD.pack(Kind.BEAT, 0, 0))
            finally:
                self._writing.release()

    def read(self, *, limit: int) -> Frame:
        """The head of the next frame.

        Raises:
            OSError: the connection is gone.
            ContractError: what comes is no frame, or one of more than `limit` bytes.
        """
        kind, n_heading, size = HEAD.unpack(self._exactly(HEAD.size))
        if kind not in set(Kind) or n_heading > HEADING_LIMIT or size > limit:
            raise ContractError(
                f"A frame of kind {kind} with {n_heading} + {size} bytes came. Allowed are known kinds with up to "
                f"{HEADING_LIMIT} + {limit} bytes. Both ends must have this version."
            )
        try:
            heading = json.loads(self._exactly(n_heading)) if n_heading else {}
        except (ValueError, RecursionError) as e:
            raise ContractError(
                f"A frame's heading is no JSON ({e}). Expected a table. Both ends must have this version."
            ) from e
        if not isinstance(heading, dict):
            raise ContractError(
                f"A frame's heading is no table but a {type(heading).__name__}. Both ends must have this version."
            )
        return Frame(Kind(kind), heading, size)

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The body of the frame that was just read, in pieces that are overwritten by the next.

        Raises:
            OSError: the connection is gone.
        """
        buffer = memoryview(bytearray(min(size, PIECE)))
        while size:
            n = self._into(buffer[: min(size, len(buffer))])
            yield buffer[:n]
            size -= n

    def body(self, size: int) -> bytes:
        """The body of the frame that was just read, in memory."""
        return bytes(self._exactly(size))

    def close(self) -> None:
        """End the connection; whoever reads from it or writes to it finds it gone."""
        self._closed = True
        with suppress(OSError):  # it is gone already
            # not the socket's own: that forgets its encryption first, and a thread that is writing would go on in plain text
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)
        with self._writing:
            self._connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionError("This end has closed the connection.")

    def _exactly(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view, n = memoryview(buffer), 0
        while n < size:
            n += self._into(view[n : n + PIECE])
        return buffer

    def _into(self, view: memoryview) -> int:
        n = self._connection.recv_into(view)
        self._check_open()  # what came while it was being closed may not have been decrypted
        if n == 0:
            raise ConnectionError("The other end has closed the connection.")
        self._heard()
        return n


def tls(files: Certificates, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 where both ends must show a certificate of the same authority; a site also checks the server's host name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(files.authority)
    context.load_cert_chain(files.certificate, files.key)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def peer_name(connection: ssl.SSLSocket) -> str:
    """The common name in the certificate of the other end, which the authority has signed."""
    subject: Any = (connection.getpeercert() or {}).get("subject", ())
    return str(dict(pair for part in subject for pair in part).get("commonName", ""))
