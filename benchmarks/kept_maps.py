"""What it saves to keep what an encoder that does not train makes of views: a step with kept maps over one without.

    python benchmarks/kept_maps.py                       # the small encoder of studies/fedsam-polyps.toml
    python benchmarks/kept_maps.py --size 1024 --width 768 --depth 12 --patch 16 --batch-size 1 --steps 3

Segment-Anything whose decoder and heads alone train, on random pictures. Two trainings take turns, step by step, in one process,
on the same views: one passes every picture through the encoder, the other reads what the encoder made of it the first time
(`[training] views`) from its file. Processor time, which other work on the machine does not stretch. Weights afterwards must be
equal to 1e-5.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from concilium.answers.features import Features
from concilium.data.patches import Batch
from concilium.freezing import freeze, front_of, frozen_names
from concilium.local_updates import Local
from concilium.local_updates.plain import step
from concilium.networks import Stages
from concilium.networks.sam import build

TRAINS = ("decoder.*", "head0.*")


def loss(logits: Sequence[Tensor], batch: Batch) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(logits[0], batch.labels[0][:, 0].long())


def network(given: argparse.Namespace) -> Stages:
    """The same weights each time."""
    torch.manual_seed(0)
    plan = {"patch_size": [given.size] * 2, "architecture": {"arch_kwargs": {"strides": [[1, 1], [2, 2]]}}}
    made = build(
        n_channels=3, n_labels=2, plan=plan, width=given.width, depth=given.depth, patch=given.patch, image_size=given.size,
        decoder_features=given.decoder_features,
        whole_image_blocks=tuple(range(given.depth)) if given.width < 768 else None,  # as ViT-B where it is that wide
    )  # fmt: skip
    freeze(made, frozen_names(made, TRAINS))
    return made


def batch_of(views: Sequence[int], size: int) -> Batch:
    """These views, each drawn from its number."""
    drawn = [torch.Generator().manual_seed(v) for v in views]
    image = torch.stack([torch.randn(3, size, size, generator=g) for g in drawn])
    labels = torch.stack([torch.randint(0, 2, (1, size, size), generator=g).short() for g in drawn])
    return Batch(image, (labels,), views=tuple((f"case{v}", 0) for v in views))


def local_for(given: argparse.Namespace, folder: Path | None) -> Local:
    """A training with kept maps, or without a folder one without."""
    made = network(given)
    divided = front_of(made)
    if divided is None:
        raise SystemExit(f"No stage of {', '.join(made.names)} comes before all that train.")
    kept = None if folder is None else Features(*divided, folder, about=("float32",)).logits
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 1e-4)
    return Local(made, optimizer, loss, nullcontext, {}, 12.0, kept=kept)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time both, and print a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", type=int, default=128, help="side of a picture")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--decoder-features", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="of each, after one in which the maps are made")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ways = {"every time": local_for(given, None), "kept": local_for(given, Path(folder))}
        batch = batch_of(range(given.batch_size), given.size)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.steps + 1):
            for name, local in ways.items():
                began = time.process_time()
                step(local, batch)
                seconds[name].append(time.process_time() - began)
        size = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors")) / given.batch_size
    a, b = (local.network.state_dict() for local in ways.values())
    apart = max(float((a[n] - b[n]).abs().max()) for n in a)
    once, kept = (statistics.median(s[1:]) for s in seconds.values())
    print(
        f"{given.size} px, width {given.width}, depth {given.depth}, batch {given.batch_size}: encoder every time "
        f"{once:.3f} s a step, maps kept {kept:.3f} s, {once / kept:.1f} times as quick; first step {seconds['kept'][0]:.3f} s; "
        f"{size / 1e6:.2f} MB a view; weights apart by {apart:.1e}"
    )
    if apart > 1e-5:
        raise SystemExit(f"The weights differ by {apart}. Expected 1e-5 or less.")


if __name__ == "__main__":
    main()
