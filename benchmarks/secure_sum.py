"""What a secure sum costs over a plain one: bytes and seconds of a round, at each site and at the server.

    python benchmarks/secure_sum.py --parameters 1400000 7000000 --sites 3 10

Sites and server do what they do in a run, but for the training; messages are packed and unpacked as on a network, in one
process, one after the other. Rounds of both kinds take turns. Of each kind are counted the bytes to and from a site, the seconds
that a site takes from its trained weights to its last answer, and those of the server: seconds of this process on its core,
which others on a busy machine do not lengthen. In a third kind of round one site is lost after it has dealt its shares, and its
masks must be worked out.

The floor of the bytes is that of plain: 4 a value. The floor of a site's seconds is what cannot be left out: one mask for each
site, made by AES and added.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from concilium import masking, wire
from concilium.aggregation import one_block, weight_of
from concilium.answers import Settings
from concilium.answers.secure import Secure
from concilium.collect import Collected, plain, secure_sum
from concilium.messages import Failure, Hold, Mask, PlugIn, Reply, Request, SiteLost, Train, Trained

TARGET_BYTES, TARGET_TIME = 1.02, 4.0
"""Bytes of a round over those of plain, up; a site's seconds over the floor."""
SERVER = "server"


@dataclass(frozen=True)
class Round:
    """Bytes and seconds of one round; of a site they are the mean over those that stayed."""

    kind: str
    down: float
    up: float
    site_s: float
    server_s: float


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds of each kind, for so many parameters and sites."""

    parameters: int
    sites: int
    rounds: Mapping[str, Round]
    floor_s: float
    """Of a site's masks."""
    error: float
    """Largest difference of the two means."""

    @property
    def bytes_up(self) -> float:
        return self.rounds["secure"].up / self.rounds["plain"].up

    @property
    def bytes_down(self) -> float:
        return self.rounds["secure"].down / self.rounds["plain"].down

    @property
    def time(self) -> float:
        return (self.rounds["secure"].site_s - self.rounds["plain"].site_s) / self.floor_s


class Learner:
    """A site's training, done before."""

    job = SimpleNamespace(training=SimpleNamespace(local_update=PlugIn("plain")))
    draws = None
    """Of a local update that keeps an account, which `plain` does not."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    def train(self, request: Train, **_: Any) -> Trained:
        return self.trained


class Sites:
    """Sites that answer as they do in a run; seconds and bytes by who spent them."""

    def __init__(self, folder: Path, updates: Mapping[str, Trained]) -> None:
        self.updates = updates
        self.sites = {}
        for name in updates:
            (folder / name).mkdir(parents=True)
            settings = Settings(name, "site", {}, None, folder / name, folder, threads=1, device="cpu")
            self.sites[name] = Secure(settings, run="benchmark")

    def round(self, kind: str, train: Train, blocks: Any) -> tuple[Round, Collected]:
        """One round: `plain`, `secure`, or `lost`, in which the first site is lost once it has dealt."""
        self.down: dict[str, int] = defaultdict(int)
        self.up: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.lost = min(self.sites) if kind == "lost" else ""
        requests = dict.fromkeys(self.sites, train)
        way = plain.collect if kind == "plain" else secure_sum.collect
        options = {} if kind == "plain" else {"threshold": len(self.sites) // 2 + 1}
        began = time.process_time()
        got = way(
            self.ask, requests, blocks=blocks, weigh=weight_of("mean"), asked=dict.fromkeys(self.sites, 50), **options
        )
        server = time.process_time() - began - sum(self.seconds.values())
        names = [name for name in self.sites if name != self.lost]
        down, up, seconds = (
            statistics.mean(float(table[n]) for n in names) for table in (self.down, self.up, self.seconds)
        )
        return Round(kind, down, up, seconds, server), got

    def ask(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply | Failure]]:
        """As an engine: a message that sites share is packed once."""
        packed: dict[int, bytes] = {}
        for site, request in requests.items():
            raw = packed.setdefault(id(request), b"") or wire.pack(request)
            packed[id(request)] = raw
            self.down[site] += len(raw)
            if site == self.lost and isinstance(request, Mask):
                yield site, SiteLost()
                continue
            began = time.process_time()
            reply = wire.pack(self.answer(site, wire.unpack(raw)))
            self.seconds[site] += time.process_time() - began
            self.up[site] += len(reply)
            yield site, wire.unpack(reply)

    def answer(self, site: str, request: Request) -> Reply:
        if isinstance(request, Train):
            return self.updates[site]
        if isinstance(request, Hold):
            return self.sites[site].hold(cast(Any, Learner(self.updates[site])), request, lambda: False)
        return self.sites[site].answer(cast(Any, request))


def drawn(n_parameters: int, *, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Weights in 100 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i:02d}": scale * torch.randn(max(1, n_parameters // 100), generator=generator) for i in range(100)}


def floor(n_sites: int, size: int) -> float:
    """Seconds to make a mask for each site and add it."""
    total = masking.mask(bytes(32), size, 32).copy()
    began = time.process_time()
    for _ in range(n_sites):
        total += masking.mask(bytes(32), size, 32)
    return time.process_time() - began


def measure(n_parameters: int, n_sites: int, *, repeats: int) -> Figures:
    """Rounds of all kinds in turn; the first of each warms up and is not counted."""
    start = drawn(n_parameters, seed=0)
    names = [f"site{i:03d}" for i in range(n_sites)]
    updates = {}
    for i, name in enumerate(names):
        change = drawn(n_parameters, seed=1 + i, scale=0.01)
        updates[name] = Trained({n: t + change[n] for n, t in start.items()}, 20 + i, 50, 0.5, 1.0)
    train = Train("m", 1, 0, 50, 50, start, True)
    found: dict[str, list[Round]] = defaultdict(list)
    floors = []
    with tempfile.TemporaryDirectory() as folder:
        sites = Sites(Path(folder), updates)
        for turn in range(repeats + 1):
            means = {}
            for i, kind in enumerate(("plain", "secure", "lost")):
                number = 1 + 3 * turn + i  # of one round there is one sum
                figures, got = sites.round(kind, replace(train, round=number), (one_block(start, names),))
                if len(got.answers) != n_sites - (kind == "lost"):
                    raise RuntimeError(f"{len(got.answers)} of {n_sites} sites answered: {dict(got.failures)}.")
                means[kind] = got.totals[0].mean()
                found[kind] += [figures] if turn else []
            floors += [floor(n_sites, sum(t.numel() for t in start.values()))] if turn else []
    error = max(float((means["plain"][n].double() - means["secure"][n].double()).abs().max()) for n in start)
    middle = {kind: _median(rounds) for kind, rounds in found.items()}
    return Figures(n_parameters, n_sites, middle, statistics.median(floors), error)


def _median(rounds: Sequence[Round]) -> Round:
    down, up, site, server = (
        statistics.median(getattr(r, key) for r in rounds) for key in ("down", "up", "site_s", "server_s")
    )
    return Round(rounds[0].kind, down, up, site, server)


def main(arguments: Sequence[str] | None = None) -> list[Figures]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=[1_400_000, 7_000_000])
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for all figures, as JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = [measure(p, n, repeats=given.repeats) for p in given.parameters for n in given.sites]
    print(
        "| values | sites | bytes up | bytes down | site: plain, secure [s] | over floor | server: the same, one lost [s] |"
    )
    print("|---|---|---|---|---|---|---|")
    for f in found:
        a, b, c = (f.rounds[kind] for kind in ("plain", "secure", "lost"))
        print(
            f"| {f.parameters / 1e6:.1f} M | {f.sites} | {f.bytes_up:.4f} | {f.bytes_down:.4f} | {a.site_s:.2f}, {b.site_s:.2f} "
            f"| {f.time:.1f} | {a.server_s:.2f}, {b.server_s:.2f}, {c.server_s:.2f} |"
        )
    print(f"Largest difference of the means: {max(f.error for f in found):.1e}.")
    met = all(f.bytes_up <= TARGET_BYTES and f.bytes_down <= TARGET_BYTES and f.time <= TARGET_TIME for f in found)
    print(f"Targets (bytes {TARGET_BYTES}, a site's seconds {TARGET_TIME} floors): {'met' if met else 'missed'}.")
    if given.out:
        given.out.write_text(json.dumps([asdict(f) for f in found], indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
