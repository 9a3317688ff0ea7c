"""All sites on one machine, one at a time in this process or in worker processes; messages are packed as for a network.

With `workers` = 1 the sites answer in turn, in this process. With more, each worker is a process of its own (spawned, since the
libraries draw from global generators), and site number i belongs to worker i modulo `workers`. A worker keeps one site's model in
memory; those of its other sites wait on disk. Beside the sites there are `pooled`, which has the cases of all, and `test`.

A site's deadline counts from when its turn comes; a worker process that is still at it long after is taken to hang, and killed.
A worker that dies loses its sites for the requests at hand; it is started again, and its sites, in a new epoch, are prepared
anew and brought back to their last snapshot. A site that thereby loses what it had learnt since counts as lost once more.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from concilium import wire
from concilium.answers import AtOnce, Settings
from concilium.data.matching import Names
from concilium.engines import Engine, SiteInfo, Traffic, role_of
from concilium.engines._delivery import open_reply, require_free
from concilium.engines._recovery import Recovery
from concilium.engines._workers import Call, InlineWorker, News, SpawnedWorker, Worker
from concilium.messages import Failure, Reply, Request, SiteLost, SiteTimeout
from concilium.wire import Envelope

GRACE_S = 60.0
"""A worker that is still at a request so long [s] after its deadline, and as long again as the deadline, is taken to hang."""


def connect(
    *,
    sites: Mapping[str, Path],
    test: Path | None,
    folder: Path,
    run: str,
    workers: int = 1,
    threads: int = 1,
    device: str = "auto",
    cache: Path | None = None,
    names: Mapping[str, Names] | None = None,
    pictures: bool = True,
    micro_batch: Mapping[str, AtOnce] | None = None,
    pooled: Path | None = None,
    weights: tuple[Path, ...] = (),
) -> Engine:
    """A simulation of these sites (name -> data); `folder` gets a folder for each of them. Whoever connects closes it.

    `names`: what a site, or the test set, calls otherwise than the study. `micro_batch`: how many patches a site holds at once.
    `pooled`: the data of all together, where these are not simply the cases of all. `weights`: files that a study starts from.
    """
    data: dict[str, Mapping[str, Path]] = {name: {name: path} for name, path in sites.items()}
    data |= {"pooled": sites if pooled is None else {"pooled": pooled}}
    if test is not None:
        data["test"] = {"test": test}
    cache = cache or folder / "cache"
    settings = [
        Settings(
            name,
            role_of(name),
            members,
            test,
            folder / "sites" / name,
            cache,
            threads,
            device,
            names=names or {},
            pictures=pictures,
            micro_batch=(micro_batch or {}).get(name),
            weights=weights,
        )
        for name, members in data.items()
    ]
    return Simulation(settings, run=run, workers=min(workers, len(sites)), spool=folder / "spool")


@dataclass
class _Pending:
    """A request on its way."""

    call: Call
    request: Request
    started: float | None = None
    """When the site's turn came, on the monotonic clock."""


class Simulation:
    """The engine; see the module's text."""

    def __init__(self, settings: Sequence[Settings], *, run: str, workers: int, spool: Path) -> None:
        self.sites: Mapping[str, SiteInfo] = {s.name: SiteInfo(s.name, s.role) for s in settings}
        self.traffic: Mapping[str, Traffic] = {s.name: Traffic() for s in settings}
        self.dropped = 0
        """Replies that came after their deadline."""
        self._run = run
        shutil.rmtree(spool, ignore_errors=True)
        self._spool = spool / secrets.token_hex(4)  # a worker that outlived a killed run must not find it
        self._spool.mkdir(parents=True)
        self._sequence = 0
        self._epochs = {s.name: 0 for s in settings}
        self._pending: dict[str, _Pending] = {}
        self._recovery = Recovery(self._spool, self.sites)
        self._late: dict[int, tuple[int, float]] = {}
        """Worker -> the request that it has not given up, and when it is taken to hang."""
        self._worker_of = {s.name: i % workers for i, s in enumerate(settings)}
        groups = [[s for s in settings if self._worker_of[s.name] == i] for i in range(workers)]
        kind = InlineWorker if workers == 1 else SpawnedWorker
        self._workers: list[Worker] = [kind(group, run, self._epochs) for group in groups]

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        """Send; returns at once.

        Raises:
            ContractError: a site is not known, or has a request outstanding.
        """
        packed: dict[int, Path] = {}
        contents: dict[Path, bytes] = {}
        require_free(requests, sites=self.sites, pending=self._pending)
        for request in requests.values():
            if id(request) not in packed:
                content = wire.pack(request)
                path = self._spool / f"{self._sequence:09d}-{len(packed)}.request"
                path.write_bytes(content)
                packed[id(request)], contents[path] = path, content
        for site, request in requests.items():
            path = packed[id(request)]
            for kept in self._recovery.due(site):
                self._post(site, kept, None)
            self._recovery.sending(site, request, contents[path])
            self._pending[site] = _Pending(self._post(site, path, deadline_s), request)
            self.traffic[site].down += len(contents[path])

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        """The replies as they arrive, until nothing is outstanding."""
        while self._pending:
            for index, worker in enumerate(self._workers):
                for news in worker.news():
                    yield from self._on(index, news)
            yield from self._overdue()
            self._sleep()
        for path in self._spool.iterdir():
            if not self._recovery.keeps(path):
                path.unlink(missing_ok=True)

    def cancel(self, sites: Iterable[str]) -> None:
        """Ask sites to give up; each still gives its one reply or failure."""
        for site in sites:
            if site in self._pending:
                self._pending[site].call.cancel.touch()

    def close(self) -> None:
        """End the workers and remove the spool."""
        self.cancel(list(self._pending))
        for worker in self._workers:
            worker.close()
        shutil.rmtree(self._spool.parent, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------- internals

    def _post(self, site: str, request: Path, deadline_s: float | None) -> Call:
        self._sequence += 1
        envelope = Envelope(self._run, self._epochs[site], self._sequence)
        call = Call(site, envelope, request, self._spool / f"{self._sequence:09d}.reply", deadline_s)
        self._workers[self._worker_of[site]].post(call)
        return call

    def _on(self, index: int, news: News) -> Iterator[tuple[str, Reply | Failure]]:
        if news.event == "lost":
            yield from self._on_lost(index)
            return
        if news.event == "done" and self._late.get(index, (None,))[0] == news.sequence:
            del self._late[index]
        found = [s for s, p in self._pending.items() if p.call.envelope.sequence == news.sequence]
        if not found:  # its deadline has passed, or it was the engine's own
            return
        pending = self._pending[found[0]]
        if news.event == "started":
            pending.started = time.monotonic()
            return
        deadline = pending.call.deadline_s
        del self._pending[found[0]]
        if deadline is not None and pending.started is not None and time.monotonic() - pending.started > deadline:
            self.dropped += 1
            yield found[0], SiteTimeout(deadline)
        else:
            self._clear(pending.call.request)
            reply, size = open_reply(pending.call.reply)
            self.traffic[found[0]].up += size
            yield found[0], self._recovery.settle(found[0], pending.request, reply)

    def _on_lost(self, index: int) -> Iterator[tuple[str, Reply | Failure]]:
        gone = {site for site, i in self._worker_of.items() if i == index}
        told = gone & self._pending.keys()
        self._recovery.lose(gone, told=told)
        self._late.pop(index, None)
        for site in gone:
            self._epochs[site] += 1
            self._pending.pop(site, None)
        self._workers[index].restart(self._epochs)
        for site in sorted(told):
            yield site, SiteLost()

    def _clear(self, request: Path) -> None:
        """Remove a request that no other site still has to read: in split training there are thousands in a round."""
        if all(p.call.request != request for p in self._pending.values()):
            request.unlink(missing_ok=True)

    def _overdue(self) -> Iterator[tuple[str, Reply | Failure]]:
        now = time.monotonic()
        for site, pending in list(self._pending.items()):
            deadline = pending.call.deadline_s
            if deadline is not None and pending.started is not None and now - pending.started > deadline:
                pending.call.cancel.touch()
                self.dropped += 1
                self._late[self._worker_of[site]] = (pending.call.envelope.sequence, now + deadline + GRACE_S)
                del self._pending[site]
                yield site, SiteTimeout(deadline)
        for index, (_, until) in list(self._late.items()):
            if now > until:
                self._workers[index].kill()  # its news will say that it is lost

    def _sleep(self) -> None:
        """Until a worker has news or the next deadline passes."""
        connections = [w.connection for w in self._workers if isinstance(w, SpawnedWorker)]
        if connections and self._pending:
            soon = bool(self._late) or any(p.call.deadline_s is not None for p in self._pending.values())
            wait(connections, timeout=0.5 if soon else 60)
