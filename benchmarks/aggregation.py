"""What it costs the server to add a site's update to the round's sum: memory, and time over the least that must be done.

Federated averaging needs every update unpacked and added once. Concilium does more: it checks names, shapes, types and
finiteness, and adds so that the order of the sites changes no bit. This measures how much more.

    python benchmarks/aggregation.py --parameters 30000000 --sites 3 10 100

The update has the shapes of nnU-Net's U-Net. It is packed once into a file; each site's reply is that file read, unpacked and
collected, one at a time, as the simulation does (`engines/simulation.py`). The floor is the same file read and unpacked, and one
`acc += w * x.double()` for each tensor. A second floor adds in place, `acc.add_(x, alpha=w)`, which is the quickest that torch
has. All take turns, site by site, in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concilium import wire
from concilium.aggregation import UNITS, one_block, weight_of
from concilium.aggregation.mean import rule
from concilium.collect.plain import collect
from concilium.messages import Failure, Reply, Request, Train, Trained

TARGET = 1.5
"""Time of a site's update over the floor."""
WIDTHS = (32, 64, 128, 256, 320, 320)
"""Features of nnU-Net's default 3D U-Net, by resolution."""


@dataclass(frozen=True)
class Memory:
    """Of one round: resident memory at its highest, and that above what there was before the first round."""

    sites: int
    peak_mb: float
    growth_mb: float


@dataclass(frozen=True)
class Times:
    """Seconds of each site's update, ours and the floors' in turn, and of our mean at the end."""

    threads: int
    ours: tuple[float, ...]
    floor: tuple[float, ...]
    in_place: tuple[float, ...]
    mean: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.floor)

    @property
    def ratio_in_place(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.in_place)

    @property
    def pairs(self) -> tuple[float, ...]:
        return tuple(a / b for a, b in zip(self.ours, self.floor, strict=True))


# ------------------------------------------------------------------------------------------------------------ the update


def shapes(widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Tensors of a 3D U-Net with these features: two convolutions with norm at each resolution, down and up, and heads."""
    found: dict[str, tuple[int, ...]] = {}

    def block(name: str, n_in: int, n_out: int) -> None:
        for i, n in enumerate((n_in, n_out)):
            found[f"{name}.{i}.conv.weight"] = (n_out, n, 3, 3, 3)
            found.update({f"{name}.{i}.{part}": (n_out,) for part in ("conv.bias", "norm.weight", "norm.bias")})

    for level, width in enumerate(widths):
        block(f"down{level}", widths[level - 1] if level else 1, width)
    for level in reversed(range(len(widths) - 1)):
        found[f"up{level}.upsample.weight"] = (widths[level + 1], widths[level], 2, 2, 2)
        found[f"up{level}.upsample.bias"] = (widths[level],)
        block(f"up{level}.block", 2 * widths[level], widths[level])
        found[f"head{level}.weight"], found[f"head{level}.bias"] = (3, widths[level], 1, 1, 1), (3,)
    return found


def make_update(n_parameters: int) -> dict[str, Tensor]:
    """Random weights of a U-Net with about as many parameters; every other width follows from nnU-Net's."""
    full = sum(torch.Size(s).numel() for s in shapes(WIDTHS).values())
    scale = (n_parameters / full) ** 0.5
    scaled = shapes([max(1, round(w * scale)) for w in WIDTHS])
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in scaled.items()}


def write_reply(n_parameters: int, path: Path) -> dict[str, Tensor]:
    """Pack an update into a file; returned are empty tensors like it, which take no memory."""
    update = make_update(n_parameters)
    path.write_bytes(wire.pack(Trained(update, n_cases=20, n_steps=50, loss=0.0, seconds=0.0)))
    return {name: torch.empty_like(t, device="meta") for name, t in update.items()}


# ------------------------------------------------------------------------------------------------------------- the rounds

Answering = Callable[[Mapping[str, Request]], Iterator[tuple[str, Reply | Failure]]]
Add = Callable[[Mapping[str, Tensor], Trained], None]


def requests_for(n_sites: int) -> dict[str, Train]:
    """A request for each site; what is in it plays no part here."""
    request = Train("federated", 1, 0, 1, 1, {}, True)
    return {f"site{i:03d}": request for i in range(n_sites)}


def answering(reply: Path) -> Answering:
    """Sites that answer with the file, unpacked when its turn comes and not kept."""

    def ask(requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply | Failure]]:
        for site in requests:
            yield site, wire.unpack(reply.read_bytes())

    return ask


def told(requests: Mapping[str, Request], like: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a way to collect is told besides."""
    weigh = weight_of("mean")
    return {"blocks": (one_block(like, requests),), "weigh": weigh, "asked": dict.fromkeys(requests, 50)}


def run_round(ask: Answering, n_sites: int, like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The server's part of a round: collect the updates, then take the mean."""
    collected = collect(ask, asked := requests_for(n_sites), **told(asked, like))
    if collected.failures:
        raise RuntimeError(
            f"{len(collected.failures)} updates were refused: {next(iter(collected.failures.values()))}."
        )
    return rule(collected.totals[0], {}, before=like)[0]


def measure_memory(reply: Path, n_sites: Sequence[int], like: Mapping[str, Tensor]) -> list[Memory]:
    """Rounds of more and more sites, so that the peak of one cannot hide growth in the next."""
    _forget_peak()
    before = _peak_mb()
    found: list[Memory] = []
    for n in sorted(n_sites):
        run_round(answering(reply), n, like)
        found.append(Memory(n, _peak_mb(), _peak_mb() - before))
    return found


def measure_times(reply: Path, n_sites: int, like: Mapping[str, Tensor], *, threads: int) -> Times:
    """A round in which the floors take their turns after each site. The first site warms up all three and is not counted."""
    torch.set_num_threads(threads)
    ours: list[float] = []
    floors: dict[Add, list[float]] = {_add_simply: [], _add_in_place: []}
    sums = {add: {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in like.items()} for add in floors}

    def ask(requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply | Failure]]:
        for site in requests:
            began = time.perf_counter()
            yield site, wire.unpack(reply.read_bytes())  # goes on when the update is added and let go of
            ours.append(time.perf_counter() - began)
            for add, seconds in floors.items():
                began = time.perf_counter()
                add(sums[add], wire.unpack(reply.read_bytes()))
                seconds.append(time.perf_counter() - began)

    collected = collect(ask, asked := requests_for(n_sites + 1), **told(asked, like))
    began = time.perf_counter()
    mean, _ = rule(collected.totals[0], {}, before=like)
    ours_mean = time.perf_counter() - began
    for total in sums.values():
        for name, tensor in total.items():
            torch.testing.assert_close(
                mean[name], (tensor * UNITS / collected.totals[0].weight).float()
            )  # all did the work
    floor, in_place = (tuple(seconds[1:]) for seconds in floors.values())
    return Times(threads, tuple(ours[1:]), floor, in_place, ours_mean)


def _add_simply(total: Mapping[str, Tensor], update: Trained) -> None:
    for name, tensor in update.weights.items():
        total[name].add_(update.n_cases * tensor.double())


def _add_in_place(total: Mapping[str, Tensor], update: Trained) -> None:
    for name, tensor in update.weights.items():
        total[name].add_(tensor, alpha=update.n_cases)


def _forget_peak() -> None:
    """Let the kernel count the peak from here on; where it cannot, rounds of more and more sites still show growth."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    """Highest resident memory of this process [MB]."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


# ------------------------------------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Measure, print a table, and write it as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parameters", type=int, default=30_000_000, help="of the update, about (default: %(default)s)"
    )
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 100], help="sites of a round, for memory")
    parser.add_argument("--timed-sites", type=int, default=20, help="sites of the timed round (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to time with")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads[0])
    with tempfile.TemporaryDirectory() as folder:
        reply = Path(folder) / "reply"
        like = write_reply(options.parameters, reply)
        size = reply.stat().st_size / 1e6
        n_parameters = sum(t.numel() for t in like.values())
        print(f"{n_parameters:,} parameters in {len(like)} tensors, {size:.0f} MB packed; torch {torch.__version__}")
        memory = measure_memory(reply, options.sites, like)
        times = [measure_times(reply, options.timed_sites, like, threads=n) for n in options.threads]
    _print(memory, times, size)
    figures: dict[str, object] = {
        "parameters": n_parameters, "tensors": len(like), "update_mb": size, "torch": torch.__version__,
        "memory": [asdict(m) for m in memory],
        "times": [asdict(t) | {"ratio": t.ratio, "ratio_in_place": t.ratio_in_place, "pairs": t.pairs} for t in times],
        "target": TARGET,
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def _print(memory: Sequence[Memory], times: Sequence[Times], size: float) -> None:
    print("\nsites   peak [MB]   growth [MB]   growth / update")
    for m in memory:
        print(f"{m.sites:5d}   {m.peak_mb:9.0f}   {m.growth_mb:11.0f}   {m.growth_mb / size:15.2f}")
    print(
        "\nthreads   ours [s/site]   floor [s/site]   ratio   pairs (lowest, highest)   ratio to adding in place   mean [s]"
    )
    for t in times:
        print(
            f"{t.threads:7d}   {statistics.median(t.ours):13.3f}   {statistics.median(t.floor):14.3f}   {t.ratio:5.2f}   "
            f"{min(t.pairs):7.2f} {max(t.pairs):15.2f}   {t.ratio_in_place:24.2f}   {t.mean:8.3f}"
        )
    print(f"\nTargets: growth does not depend on the number of sites; ratio at most {TARGET}.")


if __name__ == "__main__":
    main()
