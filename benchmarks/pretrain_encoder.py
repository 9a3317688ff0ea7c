"""Pre-train a small Segment-Anything on several federations at once, all in one place, to start studies of another one from.

    python benchmarks/pretrain_encoder.py data --leave-out polyps --out runs/pretrained/without-polyps.safetensors
    python benchmarks/pretrain_encoder.py data --leave-out lungs --out runs/pretrained/without-lungs.safetensors

No checkpoint of Segment-Anything is needed. The network is `sam` with a width of 192, six blocks, patches of 8 on images of
128 x 128, and a decoder of 64 features. Pictures of all federations but the one that is left out (training cases only; each
federation is drawn as often as any other) are brought to 128 x 128 and to z-scores, as `[preprocessing] name = "resize"` does.
Every second picture of a batch is asked by a box around one connected piece of what is annotated, and is to segment that piece
(Kirillov et al. 2023, arXiv:2304.02643, section 3); the others are asked nothing, and are to segment all that is annotated, as
studies of `sam` do. Turned, mirrored, scaled, and brighter or darker. AdamW, 1e-3 rising for 200 steps and falling to 0 (cosine);
Dice plus binary cross-entropy. The file is safetensors with our names; what it was trained on stands in its header. A run that is
cut off goes on where it was (`.state.safetensors` beside the file).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from concilium.data.dataset import open_dataset, read_case
from concilium.networks import Stages
from concilium.networks._sam_decoder import FIRST_CORNER, LAST_CORNER, Decoder
from concilium.networks._sam_stages import Head
from concilium.networks.sam import build
from concilium.optimization import restore_state, state_of
from concilium.wire import part, read_tensors, write_tensors

FEDERATIONS: Mapping[str, tuple[str, ...]] = {
    "polyps": ("norway", "spain"),
    "skin": ("one", "two", "three"),
    "nuclei": ("fluorescence", "histology", "brightfield"),
    "vessels": ("netherlands", "england"),
    "lungs": ("shenzhen", "montgomery"),
    "fetal_head": ("a", "b", "c", "d"),
    "glioma": ("du", "ht", "cs", "fg"),
    "abdomen_partial": ("pancreas", "liver", "tumour", "kidney"),
}
"""Federation -> the folders of its sites; none is a test set."""
SIZE, SMALLEST = 128, 12
"""Side of a picture, and of the smallest piece asked for in pixels."""
NETWORK: Mapping[str, Any] = {
    "width": 192, "depth": 6, "heads": 3, "patch": 8, "image_size": SIZE, "decoder_features": 64,
    "whole_image_blocks": tuple(range(6)),
}  # fmt: skip
"""Options of `[network] name = "sam"`; studies that start from the file have the same."""
RATE, RISE, DECAY = 1e-3, 200, 0.01
SAVE = 100
"""Steps between two states of a run that may be cut off."""


@dataclass(frozen=True)
class Picture:
    image: Tensor
    """float16 (3, SIZE, SIZE), z-scores."""
    mask: Tensor
    """bool (SIZE, SIZE)."""


def read_federation(data: Path, name: str) -> list[Picture]:
    """The training cases of all its sites that show anything."""
    found = []
    for site in FEDERATIONS[name]:
        dataset = open_dataset(data / name / site)
        for case in track(dataset.cases, description=f"{name} {site}"):
            image, label, _ = read_case(case, dataset)
            if label is not None and (label > 0).any():
                found.append(_picture(image[:, 0], label[0, 0] > 0))
    return found


def _picture(image: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> Picture:
    small = functional.interpolate(torch.from_numpy(image)[None], (SIZE, SIZE), mode="bilinear", antialias=True)[0]
    small = (small - small.mean((1, 2), keepdim=True)) / small.std((1, 2), keepdim=True).clamp_min(1e-8)
    there = functional.interpolate(torch.from_numpy(mask)[None, None].float(), (SIZE, SIZE), mode="nearest")[0, 0] > 0
    return Picture((small if len(small) == 3 else small[:1].expand(3, -1, -1)).half(), there)


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    image: Tensor
    mask: Tensor
    box: Tensor
    """int (B, 2, 2): of each picture that is asked, the corners (column, row) of a box; the others come last, and have none."""


def draw(pictures: Mapping[str, Sequence[Picture]], size: int, key: int) -> Batch:
    """`size` pictures, the first half of them with a box."""
    rng = random.Random(key)
    images, masks, boxes = [], [], []
    for i in range(size):
        chosen = rng.choice(pictures[rng.choice(sorted(pictures))])
        image, mask = _moved(chosen, rng)
        if i < size // 2:
            piece, box = _asked(mask, rng)
            mask = piece
            boxes.append(box)
        images.append(image * (1 + rng.uniform(-0.2, 0.2)) + rng.uniform(-0.2, 0.2))
        masks.append(mask)
    return Batch(torch.stack(images), torch.stack(masks).float(), torch.tensor(boxes))


def _moved(picture: Picture, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Turned by quarters, mirrored, and scaled about a point."""
    both = torch.cat((picture.image.float(), picture.mask[None].float()))
    both = torch.rot90(both, rng.randrange(4), (1, 2))
    both = both.flip(2) if rng.random() < 0.5 else both
    scale, shift = rng.uniform(0.7, 1.2), [rng.uniform(-0.2, 0.2) for _ in range(2)]
    place = torch.tensor([[scale, 0.0, shift[0]], [0.0, scale, shift[1]]])[None]
    grid = functional.affine_grid(place, [1, 4, SIZE, SIZE], align_corners=False)
    moved = functional.grid_sample(both[None], grid, padding_mode="reflection", align_corners=False)[0]
    return moved[:3], moved[3] > 0.5


def _asked(mask: Tensor, rng: random.Random) -> tuple[Tensor, list[list[int]]]:
    """One piece of a mask, and the corners of a box about it, each side off by a tenth at most; of an empty one any box."""
    labelled, n = ndimage.label(mask.numpy())
    sizes = np.bincount(labelled.ravel())[1:]
    large = [i + 1 for i in range(n) if sizes[i] >= SMALLEST]
    if not large:
        low = [rng.randrange(SIZE // 2) for _ in range(2)]
        return torch.zeros_like(mask), [low, [a + SIZE // 4 for a in low]]
    piece = labelled == rng.choice(large)
    rows, columns = (np.flatnonzero(piece.any(axis)) for axis in (1, 0))
    corners = []
    for low, high in ((columns[0], columns[-1]), (rows[0], rows[-1])):
        off = max(1, round(0.1 * (high - low)))
        corners.append([min(max(int(edge) + rng.randint(-off, off), 0), SIZE - 1) for edge in (low, high)])
    return torch.from_numpy(piece), [[corners[0][0], corners[1][0]], [corners[0][1], corners[1][1]]]


# ------------------------------------------------------------------------------------------------------------ training


def new_network(seed: int) -> Stages:
    """The network with drawn weights."""
    torch.manual_seed(seed)
    plan = {"patch_size": [SIZE, SIZE], "architecture": {"arch_kwargs": {"strides": [[1, 1], [2, 2]]}}}
    return build(n_channels=3, n_labels=2, plan=plan, **NETWORK)


def logits(network: Stages, image: Tensor, box: Tensor) -> Tensor:
    """Of foreground (B, SIZE, SIZE)."""
    decoder, head = network["decoder"], network["head0"]
    assert isinstance(decoder, Decoder)
    assert isinstance(head, Head)
    frame, embedding = Stages({n: network[n] for n in network.names[: network.names.index("decoder")]}).run((image,))
    n = len(box)
    kinds = torch.tensor([[FIRST_CORNER, LAST_CORNER]]).expand(n, -1)
    asked = decoder.decode(embedding[:n], decoder.prompts.points(box, kinds, (SIZE, SIZE))) if n else ()
    made = [asked] * bool(n) + [decoder.decode(embedding[n:])] * (n < len(image))
    masks = torch.cat([head.masks_of(large, tokens) for large, tokens in made])
    return head.logits_of(masks, frame)[:, 1]


def loss_of(found: Tensor, mask: Tensor) -> Tensor:
    """Soft Dice of each picture, and binary cross-entropy."""
    p = found.float().sigmoid()
    dice = (2 * (p * mask).sum((1, 2)) + 1) / (p.sum((1, 2)) + mask.sum((1, 2)) + 1)
    return 1 - dice.mean() + functional.binary_cross_entropy_with_logits(found.float(), mask)


def train(
    pictures: Mapping[str, Sequence[Picture]],
    out: Path,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    about: dict[str, str],
) -> Iterator[tuple[int, float]]:
    """Yield step and mean loss, now and then; the file is there at the end."""
    network = new_network(seed)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    state, began = out.with_suffix(".state.safetensors"), 0
    if state.is_file():
        kept, told = read_tensors(state)
        network.load_state_dict(part(kept, "weights/"))
        restore_state(optimizer, part(kept, "optimizer/"), told["optimizer"])
        began = int(told["step"])
    losses: list[float] = []
    for step in range(began, steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / RISE) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = draw(pictures, batch_size, seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(logits(network, batch.image, batch.box), batch.mask)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"The loss of step {step} is {losses[-1]}.")
        if (step + 1) % SAVE == 0:
            moments, numbers = state_of(optimizer)
            now = {f"weights/{n}": t.detach().clone() for n, t in network.state_dict().items()}
            write_tensors(
                state,
                now | {f"optimizer/{n}": t for n, t in moments.items()},
                {"optimizer": numbers, "step": str(step + 1)},
            )
            yield step + 1, float(np.mean(losses[-SAVE:]))
    write_tensors(out, network.state_dict(), about)
    state.unlink(missing_ok=True)


@torch.no_grad()
def dice_of(network: Stages, pictures: Sequence[Picture]) -> float:
    """Mean Dice of pictures that are asked nothing."""
    found = []
    for p in pictures:
        there = logits(network, p.image.float()[None], torch.zeros(0, 2, 2))[0] > 0
        found.append(2 * float((there & p.mask).sum()) / float(there.sum() + p.mask.sum()))
    return float(np.mean(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, train, and say how the pictures kept aside are segmented."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder of the federations, each a folder of sites")
    parser.add_argument("--leave-out", action="append", default=[], choices=[*FEDERATIONS], help="again for more")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [name for name in FEDERATIONS if name not in given.leave_out and (given.data / name).is_dir()]
    if not names:
        parser.error(
            f"{given.data} has no folder {', '.join(FEDERATIONS)} that is not left out. Give the folder above them."
        )
    every = {name: read_federation(given.data, name) for name in names}
    aside = {name: of[:: max(2, len(of) // 16)][:16] for name, of in every.items()}
    for name, of in every.items():
        kept = set(map(id, aside[name]))
        every[name] = [p for p in of if id(p) not in kept]
    about = {"data": ", ".join(f"{name} {len(of)}" for name, of in every.items()), "steps": str(given.steps),
             "batch_size": str(given.batch_size), "seed": str(given.seed), "network": json.dumps(dict(NETWORK))}  # fmt: skip
    began = time.monotonic()
    for step, loss in train(
        every, given.out, steps=given.steps, batch_size=given.batch_size, seed=given.seed, about=about
    ):
        print(f"step {step}/{given.steps} loss {loss:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    network = new_network(given.seed)
    network.load_state_dict(read_tensors(given.out)[0])
    for name, of in aside.items():
        print(f"{name}: Dice {dice_of(network.eval(), of):.3f} of {len(of)} pictures kept aside, asked nothing")
    print(f"{given.out}: sha256 {hashlib.sha256(given.out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
