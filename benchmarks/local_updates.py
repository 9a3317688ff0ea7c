"""What each local update costs a site: processor time of its step over that of a plain one, and the tensors it holds and sends.

    python benchmarks/local_updates.py --patch 40 56 40 --features 16 --steps 5

A plain U-Net of four resolutions on random patches, batch 2, AdamW. The updates take turns, step by step, in one process.
Processor time, since it is not stretched by what else the machine does. Tensors are counted in sizes of the network's
parameters, beside what every update needs (network, gradient, optimiser, the weights that came): what is held within a
round on a CPU, what a snapshot holds, what is sent. Those that draw patients (`dp_sgd`) have batches of no fixed size, and
are left out. On a GPU `proximal` and `ditto` hold a copy there of the weights that came.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from concilium import catalog
from concilium.data.patches import Batch
from concilium.local_updates import Local, exchanges, finish_of, has_personal, is_more_than_a_step
from concilium.local_updates._besides import draws_patients
from concilium.messages import PlugIn
from concilium.networks.unet import build

WARM_UP = 2
N_LABELS = 3


def loss(logits: Sequence[Tensor], batch: Batch) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(logits[0], batch.labels[0][:, 0].long())


def network(patch: Sequence[int], features: int) -> torch.nn.Module:
    """A U-Net of four resolutions."""
    torch.manual_seed(0)
    strides = [[1] * len(patch), *([[2] * len(patch)] * 3)]
    plan = {"architecture": {"arch_kwargs": {"strides": strides}}}
    return build(n_channels=1, n_labels=N_LABELS, plan=plan, deep_supervision=False, levels=4, base_features=features)


def local_for(name: str, make: Callable[[], torch.nn.Module], asked: set[str]) -> Local:
    """All that the update may ask for; whose teacher was is noted in `asked`."""
    made, teacher = make(), make().eval()
    received = {n: t.clone() for n, t in made.state_dict().items()}
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    own = make() if has_personal(name) else None
    personal = own and Local(own, optimizer(own.parameters()), loss, nullcontext, received, 12.0)

    def told(image: Tensor) -> Any:
        asked.add(name)
        with torch.no_grad():
            return teacher(image)

    control = {n: torch.zeros_like(p) for n, p in made.named_parameters()}
    return Local(
        made, optimizer(made.parameters()), loss, nullcontext, received, 12.0,
        teacher=told, control=control, personal=personal, labels={"background": 0, "a": 1, "b": 2},
    )  # fmt: skip


def measure(patch: Sequence[int], *, features: int, steps: int) -> dict[str, Any]:
    """Update -> seconds of each step, and tensors in sizes of the network."""
    make = partial(network, patch, features)
    names = [n for n in catalog.names("local_updates") if not is_more_than_a_step(n) and not draws_patients(n)]
    asked: set[str] = set()
    locals_ = {name: local_for(name, make, asked) for name in names}
    take = {n: partial(catalog.load("local_updates", n), **catalog.fill("local_updates", n, {}, "")[0]) for n in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + steps):
        generator = torch.Generator().manual_seed(number)
        image = torch.randn(2, 1, *patch, generator=generator)
        labels = torch.randint(0, N_LABELS, image.shape, generator=generator).short()
        annotated = torch.tensor([[True, True, False], [True, False, True]])  # of which one update makes something
        for name in names:
            began = time.process_time()
            take[name](locals_[name], Batch(image, (labels,), annotated))
            seconds[name].append(time.process_time() - began)
            if number == WARM_UP - 1:  # a round is over: what is kept from one to the next is there
                finish_of(PlugIn(name), locals_[name], steps=WARM_UP)
    size = sum(p.numel() for p in make().parameters())
    plain = statistics.median(seconds["plain"][WARM_UP:])
    found: dict[str, Any] = {"parameters": size, "plain_s": plain, "updates": {}}
    for name, local in locals_.items():
        held = _size(local.memory) + (size if name in asked else 0) + (_size(local.control) if exchanges(name) else 0)
        sent = finish_of(PlugIn(name), local, steps=steps)
        own = local.personal
        second = [] if own is None else [own.network.state_dict(), *own.optimizer.state_dict()["state"].values()]
        found["updates"][name] = {
            "ratio": statistics.median(seconds[name][WARM_UP:]) / plain,
            "held": (held + sum(map(_size, second)) + (size if own else 0))
            / size,  # a second network has a gradient too
            "kept": (_size(local.memory) + sum(map(_size, second))) / size,
            "sent": _size(sent) / size,
        }
    return found


def _size(tensors: Mapping[str, Any]) -> int:
    return sum(t.numel() for t in tensors.values() if isinstance(t, Tensor))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs="+", default=[40, 56, 40])
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    found = measure(given.patch, features=given.features, steps=given.steps)
    print(f"{found['parameters'] / 1e6:.2f} M parameters; a plain step takes {found['plain_s']:.2f} s of a processor")
    print("| update | time / plain | held in a round | kept in a snapshot | sent besides |\n|---|---|---|---|---|")
    for name, f in found["updates"].items():
        print(f"| {name} | {f['ratio']:.2f} | {f['held']:.1f} | {f['kept']:.1f} | {f['sent']:.1f} |")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
