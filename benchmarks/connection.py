"""How quick messages are between a server and a site: our connections beside a bare gRPC stream, both with mutual TLS.

    python benchmarks/connection.py

Two processes on this machine's loopback, with a kit's certificates. The server sends a body and the site answers with one of the
same size (an exchange), or with a few bytes (a model down), or the other way round (a model up). Ours does what the engine
asks for: a heading, the reply put on disk piece by piece. gRPC's is one bidirectional stream that the site has dialled, with
nothing around it. They take turns. Plain gRPC without TLS is not measured, since nobody may use it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from concilium.deployment.kits import certificates
from concilium.deployment.provision import provision
from concilium.engines._dial import Dialler
from concilium.engines._frames import Certificates
from concilium.engines._hub import Hub

SITE = "north"
KB, MB = 1 << 10, 1 << 20
EXCHANGES = {4 * KB: 200, MB: 60, 16 * MB: 15}
"""Bytes -> how many."""
MODELS = {100 * MB: 5, 400 * MB: 3}
TARGETS = {MB: 5.0, 16 * MB: 5.0, 100 * MB: 2.5, 400 * MB: 2.5}
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def answer(body: bytes) -> bytes:
    """What the site does: `e` sends everything back, `d` says it came, `u` and a number sends so many bytes."""
    if body[:1] == b"e":
        return body
    return b"came" if body[:1] == b"d" else bytes(int(body[1:]))


def site(folder: str, port: int, grpc_port: int) -> None:
    """The site's process: both connections, until its parent ends it."""
    files = certificates(Path(folder) / SITE, server=False)
    ours = Dialler(files, ("localhost", port), patience_s=30)
    threading.Thread(target=lambda: asyncio.run(_grpc_site(files, grpc_port)), daemon=True).start()
    ours.serve(lambda run, epoch: lambda body, heading, cancelled: answer(body))


async def _grpc_site(files: Certificates, port: int) -> None:
    credentials = grpc.ssl_channel_credentials(
        *(p.read_bytes() for p in (files.authority, files.key, files.certificate))
    )
    channel = grpc.aio.secure_channel(f"localhost:{port}", credentials, options=UNLIMITED)
    await channel.channel_ready()
    call = channel.stream_stream("/bench/chat")()
    await call.wait_for_connection()
    while True:
        body = await call.read()
        if body is grpc.aio.EOF:
            return
        await call.write(answer(body))


class GrpcServer:
    """The server's end of the bare stream."""

    def __init__(self, files: Certificates) -> None:
        self.loop = asyncio.new_event_loop()
        self.outgoing: asyncio.Queue[bytes]
        self.incoming: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.here, ready = threading.Event(), threading.Event()
        threading.Thread(target=lambda: self.loop.run_until_complete(self._serve(files, ready)), daemon=True).start()
        ready.wait()

    async def _serve(self, files: Certificates, ready: threading.Event) -> None:
        self.outgoing = asyncio.Queue()

        async def chat(requests: Any, context: Any) -> Any:
            async def pump() -> None:
                async for body in requests:
                    self.incoming.put(body)

            task = asyncio.ensure_future(pump())
            self.here.set()
            while True:
                yield await self.outgoing.get()
            del task

        server = grpc.aio.server(options=UNLIMITED)
        handler = grpc.method_handlers_generic_handler("bench", {"chat": grpc.stream_stream_rpc_method_handler(chat)})
        server.add_generic_rpc_handlers((handler,))
        pair = (files.key.read_bytes(), files.certificate.read_bytes())
        credentials = grpc.ssl_server_credentials([pair], files.authority.read_bytes(), require_client_auth=True)
        self.port = server.add_secure_port("localhost:0", credentials)
        await server.start()
        ready.set()
        await server.wait_for_termination()

    def exchange(self, body: bytes) -> int:
        """Send, wait for the answer, tell its size."""
        self.loop.call_soon_threadsafe(self.outgoing.put_nowait, body)
        return len(self.incoming.get(timeout=300))


class Ours:
    """The server's end of ours."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self.number = hub, 0

    def exchange(self, body: bytes) -> int:
        """Send, wait for the answer on disk, tell its size."""
        self.number += 1
        self.hub.send(SITE, self.number, {"run": "bench"}, body)
        reply = self.hub.news.get(timeout=300).reply
        assert reply is not None
        size = reply.stat().st_size
        reply.unlink()
        return size


def compare(sides: dict[str, Callable[[bytes], int]], body: bytes, expected: int, n: int) -> dict[str, list[float]]:
    """Seconds of `n` exchanges on each side, in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(n + 1):
        for side, exchange in sides.items():
            began = time.perf_counter()
            size = exchange(body)
            if turn:
                seconds[side].append(time.perf_counter() - began)
            if size != expected:
                raise RuntimeError(f"{side} answered {size} bytes instead of {expected}")
    return seconds


def measure(folder: Path, *, most: int) -> list[dict[str, Any]]:
    """Every comparison of bodies up to `most` bytes."""
    kits = provision("bench", [SITE], folder / "kits", hosts=["localhost"], port=1, message_port=2)
    files = certificates(kits["server"], server=True)
    hub = Hub(files, ("localhost", 0), [SITE], run="bench", spool=folder / "spool", absence_s=20, silence_s=120)
    bare = GrpcServer(files)
    command = [sys.executable, __file__, "--site", str(folder / "kits"), str(hub.port), str(bare.port)]
    process = subprocess.Popen(command)
    rows = []
    try:
        hub.news.get(timeout=60)
        bare.here.wait(60)
        sides = {"ours": Ours(hub).exchange, "gRPC": bare.exchange}
        jobs = [("exchange", size, n, b"e" + os.urandom(size - 1), size) for size, n in EXCHANGES.items()]
        for size, n in MODELS.items():
            jobs.append(("model down", size, n, b"d" + bytes(size - 1), 4))
            jobs.append(("model up", size, n, b"u" + str(size).encode(), size))
        for what, size, n, body, expected in jobs:
            if size <= most:
                seconds = compare(sides, body, expected, n)
                median = {side: statistics.median(s) for side, s in seconds.items()}
                ratio = median["ours"] / median["gRPC"]
                rows.append(
                    {"what": what, "bytes": size, "n": n, "ratio": ratio, "median_s": median, "seconds": seconds}
                )
                target = f"; target: at most {TARGETS[size]}" if size in TARGETS else ""
                print(
                    f"{what} of {size / MB:g} MB: ours {1000 * median['ours']:.2f} ms ({1 / median['ours']:.1f}/s), gRPC "
                    f"{1000 * median['gRPC']:.2f} ms, ratio {ratio:.2f}{target}",
                    flush=True,
                )
    finally:
        hub.close()
        process.kill()
        process.wait()
    return rows


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=400 * MB, help="Largest body [bytes].")
    parser.add_argument("--out", type=Path, help="Write every figure as JSON.")
    parser.add_argument("--site", nargs=3, help=argparse.SUPPRESS)  # what the second process is started with
    given = parser.parse_args()
    if given.site:
        kits, ours, bare = given.site
        site(kits, int(ours), int(bare))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), most=given.most)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
