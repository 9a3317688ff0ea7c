"""What it costs to score a case, beside MONAI's metrics.

    python benchmarks/metrics.py

Two tasks, each done by us and by MONAI in turn (A B A B ...), in one process, with the same number of threads:

* **label map**: two label maps of 512 x 512 x 200 voxels with several organs -> Dice, 95 % Hausdorff distance and surface Dice of
  each. Ours also counts volumes and lesions and computes IoU: it is `score_labels`, which scores a run. MONAI is given one
  label at a time (`label_map == label`), the cheapest way to call it: one-hot maps of all labels take gigabytes.
* **pair**: two masks of 512 x 512 x 512 voxels of an organ of radius 90 -> Hausdorff distance and surface Dice.

Organs are ellipsoids with bumps; the prediction has other bumps and lies a few voxels off. The values differ where the
definitions do: MONAI's Hausdorff distance counts voxels of the border, ours weighs the area of the surface.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray

from concilium.answers.evaluate import score_labels
from concilium.messages import PlugIn
from concilium.metrics import Pair, hd95, nsd
from concilium.results import METRICS

TARGET_S = 0.4
"""Of the pair: Hausdorff distance and surface Dice on 2 cores, beyond reading."""
SPACING = (1.0, 1.0, 1.0)
TOLERANCE = 1.0
Values = Mapping[str, float]


# ------------------------------------------------------------------------------------------------------------- the masks


def organ(
    shape: Sequence[int], centre: Sequence[float], radius: float, seed: int
) -> tuple[tuple[slice, ...], NDArray[np.bool_]]:
    """An ellipsoid with bumps of about 3 % of its radius: a box, and the mask in it."""
    random = np.random.default_rng(seed)
    box = tuple(
        slice(max(0, int(c - 1.3 * radius)), min(n, int(c + 1.3 * radius))) for c, n in zip(centre, shape, strict=True)
    )
    x, y, z = (np.asarray(g - c, np.float32) / radius for g, c in zip(np.ogrid[box], centre, strict=True))
    bumps = sum(
        np.sin(k * x + a) * np.sin(k * y + b) * np.sin(k * z + c)
        for k in (3, 5, 8)
        for a, b, c in random.uniform(0, 6, (1, 3))
    )
    return box, np.sqrt((x / 1.1) ** 2 + y**2 + (z / 0.9) ** 2) < 1 + 0.03 * bumps


def make_pair(size: int, radius: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two masks of one organ in a cube."""
    masks = np.zeros((2, size, size, size), bool)
    for i, mask in enumerate(masks):
        box, inside = organ(mask.shape, [size / 2 + 2 * i] * 3, radius, seed=i)
        mask[box] = inside
    return masks[0], masks[1]


def make_label_maps(shape: tuple[int, ...], n_labels: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Organs of 10 to 45 voxels (in 200 slices) on a grid, so that none hides another."""
    maps = np.zeros((2, *shape), np.uint8)
    per_side = int(np.ceil(np.sqrt(n_labels)))
    for label in range(1, n_labels + 1):
        row, column = divmod(label - 1, per_side)
        cell = [(i + 0.5) * n / per_side for i, n in ((row, shape[1]), (column, shape[2]))]
        radius = min(shape[0] / 2.8, *(n / per_side / 2.8 for n in shape[1:])) * (0.4 + 0.6 * (label % 5) / 4)
        for i, label_map in enumerate(maps):
            box, inside = organ(shape, [shape[0] / 2 + i, cell[0] + i, cell[1]], radius, seed=2 * label + i)
            label_map[box][inside] = label
    return maps[0], maps[1]


# ------------------------------------------------------------------------------------------------------------- the sides


def ours_of_maps(prediction: NDArray[np.uint8], reference: NDArray[np.uint8], n_labels: int) -> Values:
    """Means over the labels, from what scores a run."""
    labels = {str(i): i for i in range(n_labels + 1)}
    metrics = [PlugIn(m, {"tolerance": TOLERANCE} if m == "nsd" else {}) for m in METRICS]
    scores = score_labels(prediction, reference, SPACING, labels, metrics, case=0, patient=0)
    return {m: statistics.mean(s.values[m] or 0.0 for s in scores) for m in ("dice", "hd95", "nsd")}


def monai_of_maps(prediction: NDArray[np.uint8], reference: NDArray[np.uint8], n_labels: int) -> Values:
    """Means over the labels, one label after the other."""
    found = []
    for label in range(1, n_labels + 1):
        p, r = (torch.from_numpy(m == label)[None, None] for m in (prediction, reference))
        found.append({"dice": float(compute_dice(p.float(), r.float())), **monai_of_pair(p, r)})
    return {m: statistics.mean(f[m] for f in found) for m in ("dice", "hd95", "nsd")}


def ours_of_pair(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> Values:
    """Both distance metrics of one pair of masks."""
    pair = Pair(prediction, reference, SPACING)
    return {"hd95": hd95.metric(pair) or 0.0, "nsd": nsd.metric(pair, tolerance=TOLERANCE) or 0.0}


def monai_of_pair(prediction: torch.Tensor, reference: torch.Tensor) -> Values:
    """Both distance metrics of masks (1, 1, X, Y, Z), the surface Dice by area, as ours is."""
    options = {"include_background": True, "spacing": SPACING}
    return {
        "hd95": float(compute_hausdorff_distance(prediction, reference, percentile=95, **options)),
        "nsd": float(compute_surface_dice(prediction, reference, [TOLERANCE], use_subvoxels=True, **options)),
    }


# ---------------------------------------------------------------------------------------------------------- measuring


def compare(ours: Callable[[], Values], theirs: Callable[[], Values], repeats: int) -> dict[str, Any]:
    """Seconds of both in turn, by the clock and of all cores together, after one round that is not counted."""
    sides = {"ours": ours, "monai": theirs}
    values = {side: dict(call()) for side, call in sides.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, call in sides.items():
            began, used = time.perf_counter(), time.process_time()
            call()
            seconds[side].append(time.perf_counter() - began)
            cpu[side].append(time.process_time() - used)
    median = {side: statistics.median(s) for side, s in seconds.items()}
    pairs = [b / a for a, b in zip(seconds["ours"], seconds["monai"], strict=True)]
    return {
        "values": values,
        "seconds": seconds,
        "cpu_s": {side: statistics.median(s) for side, s in cpu.items()},
        "median_s": median,
        "ratio": median["monai"] / median["ours"],
        "pairs": pairs,
    }


def measure(
    *, shape: tuple[int, ...], n_labels: int, size: int, radius: float, repeats: int
) -> dict[str, dict[str, Any]]:
    """Both tasks; what they work on is made before the clock runs."""
    maps, masks = make_label_maps(shape, n_labels), make_pair(size, radius)
    tensors = [torch.from_numpy(m)[None, None] for m in masks]
    return {
        "label map": compare(partial(ours_of_maps, *maps, n_labels), partial(monai_of_maps, *maps, n_labels), repeats),
        "pair": compare(partial(ours_of_pair, *masks), partial(monai_of_pair, *tensors), repeats),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print a table, and write it as JSON where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[200, 512, 512], help="of the label maps")
    parser.add_argument("--labels", type=int, default=6, help="organs in the label maps (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="of the pair's volume (default: %(default)s)")
    parser.add_argument("--radius", type=float, default=90, help="of the pair's organ [voxels] (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each task (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    figures = measure(
        shape=tuple(options.shape),
        n_labels=options.labels,
        size=options.size,
        radius=options.radius,
        repeats=options.repeats,
    )
    print(
        "task         ours [s]   MONAI [s]   MONAI / ours   pairs (lowest, highest)   of all cores [s]: ours, MONAI   "
        "values: ours | MONAI"
    )
    for task, f in figures.items():
        shown = " | ".join(" ".join(f"{m} {v:.3f}" for m, v in f["values"][side].items()) for side in ("ours", "monai"))
        print(
            f"{task:9s}   {f['median_s']['ours']:9.3f}   {f['median_s']['monai']:9.3f}   {f['ratio']:12.1f}   "
            f"{min(f['pairs']):7.1f} {max(f['pairs']):15.1f}   {f['cpu_s']['ours']:22.2f} {f['cpu_s']['monai']:6.2f}   {shown}"
        )
    print(f"Target: the pair in at most {TARGET_S} s on 2 cores.")
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
