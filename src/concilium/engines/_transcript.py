"""What was said in a simulation, kept: an engine around another, which writes chosen messages as they travel.

    FOLDER/index.jsonl        a line per message: its file, the site, its type
    FOLDER/000012.message     the packed message (`wire.py`)

Nothing but messages is written here. What is behind them, images and label maps, whoever owns the simulation computes anew: a
batch is a function of (seed, site, round, step).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from concilium import wire
from concilium.engines import Engine, SiteInfo, Traffic
from concilium.errors import ContractError
from concilium.messages import Failure, Finish, Front, Gradients, Maps, Reply, Request, Tail, Train, Trained

KEPT: tuple[type, ...] = (Front, Maps, Tail, Gradients, Finish, Train, Trained)
"""What is kept unless told otherwise: the exchange of split training, and updates."""
INDEX = "index.jsonl"


class Keeping:
    """An engine that keeps what is said through it; all else is that of the engine within."""

    def __init__(self, engine: Engine, folder: Path, *, kept: tuple[type, ...] = KEPT) -> None:
        self.sites: Mapping[str, SiteInfo] = engine.sites
        self.traffic: Mapping[str, Traffic] = engine.traffic
        self._engine, self._folder, self._kept = engine, folder, kept
        folder.mkdir(parents=True, exist_ok=True)
        self._n = sum(1 for _ in _lines(folder))

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        """Keep the requests, and send them."""
        for site, request in requests.items():
            self._keep(site, request)
        self._engine.send(requests, deadline_s=deadline_s)

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        """The replies as they arrive, each kept before it is handed on."""
        for site, reply in self._engine.replies():
            self._keep(site, reply)
            yield site, reply

    def cancel(self, sites: Iterable[str]) -> None:
        """As the engine within."""
        self._engine.cancel(sites)

    def close(self) -> None:
        """As the engine within."""
        self._engine.close()

    def _keep(self, site: str, message: Request | Reply | Failure) -> None:
        if not isinstance(message, self._kept):
            return
        name = f"{self._n:06d}.message"
        (self._folder / name).write_bytes(wire.pack(message))
        with (self._folder / INDEX).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "site": site, "type": type(message).__name__}) + "\n")
        self._n += 1


def read_transcript(folder: Path) -> Iterator[tuple[str, Request | Reply]]:
    """Site and message, in the order in which they were said.

    Raises:
        ContractError: no transcript lies there, or a message is damaged.
    """
    if not (folder / INDEX).is_file():
        raise ContractError(f"{folder} holds no transcript: it has no {INDEX}. Expected one. Keep the messages again.")
    for line in _lines(folder):
        yield line["site"], wire.unpack((folder / line["file"]).read_bytes())


def _lines(folder: Path) -> Iterator[dict[str, str]]:
    path = folder / INDEX
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        yield json.loads(line)
