"""Who does the work of a simulation: this process, or a spawned one. Both take calls in order and tell when each is done."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from concilium.answers import Settings
from concilium.site import Site
from concilium.wire import Envelope


@dataclass(frozen=True)
class Call:
    """A packed request in a file, and the file for the packed reply."""

    site: str
    envelope: Envelope
    request: Path
    reply: Path
    deadline_s: float | None

    @property
    def cancel(self) -> Path:
        """Its existence cancels the call."""
        return self.reply.with_suffix(".cancel")


@dataclass(frozen=True)
class News:
    """`started` and `done` of a call (by its sequence number), or `lost`: the worker is gone."""

    event: str
    sequence: int = -1


class Worker(Protocol):
    """Takes calls, one after the other."""

    def post(self, call: Call) -> None:
        """Queue a call."""

    def news(self) -> list[News]:
        """What has happened since; may be nothing."""

    def restart(self, epochs: Mapping[str, int]) -> None:
        """Begin a new life after `lost`."""

    def kill(self) -> None:
        """End what it is doing, and it; `lost` follows."""

    def close(self) -> None:
        """End it."""


class Host:
    """The sites of one worker; only the one that is asked has its model in memory."""

    def __init__(self, settings: Sequence[Settings], run: str, epochs: Mapping[str, int]) -> None:
        self.sites = {s.name: Site(s, run=run, epoch=epochs[s.name]) for s in settings}

    def serve(self, call: Call) -> None:
        """Answer a call into its file."""
        for name, site in self.sites.items():
            if name != call.site:
                site.park()
        until = float("inf") if call.deadline_s is None else time.monotonic() + call.deadline_s
        reply = self.sites[call.site].handle(
            call.request.read_bytes(), call.envelope, lambda: time.monotonic() > until or call.cancel.exists()
        )
        unfinished = call.reply.with_suffix(".unfinished")
        unfinished.write_bytes(reply)
        unfinished.replace(call.reply)


class InlineWorker:
    """This process. A call is served when its news are asked for."""

    def __init__(self, settings: Sequence[Settings], run: str, epochs: Mapping[str, int]) -> None:
        self._host = Host(settings, run, epochs)
        self._calls: list[Call] = []
        self._begun: Call | None = None

    def post(self, call: Call) -> None:
        self._calls.append(call)

    def news(self) -> list[News]:
        if self._begun is None and self._calls:
            self._begun = self._calls.pop(0)
            return [News("started", self._begun.envelope.sequence)]
        if self._begun is not None:
            call, self._begun = self._begun, None
            self._host.serve(call)
            return [News("done", call.envelope.sequence)]
        return []

    def restart(self, epochs: Mapping[str, int]) -> None:
        raise NotImplementedError("This process cannot outlive itself.")

    def kill(self) -> None:
        """Nothing: when this process has time to ask for it, no call is being served."""

    def close(self) -> None:
        self._calls.clear()


class SpawnedWorker:
    """A process of its own."""

    def __init__(self, settings: Sequence[Settings], run: str, epochs: Mapping[str, int]) -> None:
        self._settings, self._run = settings, run
        self.connection: Connection
        self.restart(epochs)

    def post(self, call: Call) -> None:
        text = json.dumps(asdict(call) | {"request": str(call.request), "reply": str(call.reply)})
        with contextlib.suppress(OSError):  # it is gone; `news` says so
            self.connection.send_bytes(text.encode())

    def news(self) -> list[News]:
        found: list[News] = []
        try:
            while self.connection.poll():
                found.append(News(**json.loads(self.connection.recv_bytes())))
        except (EOFError, OSError):
            found.append(News("lost"))
        return found

    def restart(self, epochs: Mapping[str, int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, list(self._settings), self._run, dict(epochs)), daemon=False
        )
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.connection.close()  # the worker ends when it finds nobody at the other end
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _serve(connection: Connection, settings: Sequence[Settings], run: str, epochs: Mapping[str, int]) -> None:
    """What a spawned worker does until its parent is gone."""
    host = Host(settings, run, epochs)
    while True:
        try:
            raw = json.loads(connection.recv_bytes())
            call = Call(
                raw["site"], Envelope(**raw["envelope"]), Path(raw["request"]), Path(raw["reply"]), raw["deadline_s"]
            )
            connection.send_bytes(json.dumps(asdict(News("started", call.envelope.sequence))).encode())
            with contextlib.suppress(FileNotFoundError):  # it was given up meanwhile, and its files cleared away
                host.serve(call)
            connection.send_bytes(json.dumps(asdict(News("done", call.envelope.sequence))).encode())
        except (EOFError, OSError, KeyboardInterrupt):
            return
