"""Segment images with an exported model. Needs numpy, scipy, onnxruntime and SimpleITK, and preprocessing.json beside it.

    python predict.py IMAGES SEGMENTATIONS

IMAGES holds CASE_0000.ENDING, CASE_0001.ENDING, ..., one per channel (or one colour image). The steps are nnU-Net's.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage


def preprocess(image: Any, spacing: Any, about: Any) -> tuple[Any, dict[str, Any]]:
    """What the network sees of an image (C, Z, Y, X) with spacing [mm] along these axes, and what `restore` needs."""
    axes = about["transpose"]
    x, old = image.astype(np.float32).transpose(0, *(1 + a for a in axes)), [float(spacing[a]) for a in axes]
    mask = ndimage.binary_fill_holes((x != 0).any(0))
    box = ndimage.find_objects(mask.astype(np.uint8))[0] if mask.any() else (slice(0, n) for n in mask.shape)
    geometry = {"whole": mask.shape, "box": (*box,), "old": old}
    x, mask = x[(slice(None), *geometry["box"])], mask[geometry["box"]]
    for channel, how in zip(x, about["normalization"], strict=True):
        normalize(channel, mask if how["inside_mask"] else ..., **how)
    geometry["new"] = new = [a if b is None else b for a, b in zip(old, about["spacing"], strict=True)]
    shape = [round(a / b * n) for n, a, b in zip(x.shape[1:], old, new, strict=True)]
    return resample(x, shape, old, new, about["image_order"]), geometry


def normalize(x: Any, inside: Any, *, clip: Any, shift: Any, scale: Any, **_: Any) -> None:
    """Clip a channel, subtract `shift` and divide by `scale`: numbers, or `mean`, `min`, `std` of it, `max` after subtracting."""
    if clip:
        np.clip(x, *clip, out=x)
    scale = x[inside].std() if scale == "std" else scale
    x[inside] -= x[inside].mean() if shift == "mean" else x.min() if shift == "min" else shift
    x[inside] /= max(x.max() if scale == "max" else scale, 1e-8)


def resample(x: Any, shape: Any, old: Any, new: Any, order: int) -> Any:
    """An array (C, Z, Y, X) in another shape. Of an axis more than 3 times as coarse as another, the nearest slices are taken."""
    if x.shape[1:] == tuple(shape):
        return x
    uneven = next((np.array(s) for s in (old, new) if max(s) / min(s) > 3), np.ones(3))
    coarse, y = np.flatnonzero(uneven == uneven.max()), np.zeros((len(x), *shape), x.dtype)
    for c, channel in enumerate(x.astype(float)):
        if len(coarse) > 1:
            y[c] = resize(channel, shape, order)
            continue
        axis, n = coarse[0], channel.shape[coarse[0]]
        slices = np.stack([resize(s, np.delete(shape, axis), order) for s in np.moveaxis(channel, axis, 0)])
        nearest = np.floor(n / shape[axis] * (np.arange(shape[axis]) + 0.5) - 0.5 + 0.5).clip(0, n - 1).astype(int)
        y[c] = np.moveaxis(slices[nearest], 0, axis)
    return y


def resize(x: Any, shape: Any, order: int) -> Any:
    """A spline through the voxels' centres, held to the range of the values; the edge goes on beyond the edge."""
    zoom = [b / a for a, b in zip(x.shape, shape, strict=True)]
    return ndimage.zoom(x, zoom, order=order, mode="nearest", grid_mode=True).clip(x.min(), x.max())


def slide(x: Any, network: Any, about: Any) -> Any:
    """Logits float16 (L, Z, Y, X): the mean of windows that overlap. `network`: (1, C, *patch) to (1, L, *patch)."""
    patch, n_axes = about["patch_size"], about["network_axes"]
    pads = [(max(p - n, 0) // 2, max(p - n, 0) - max(p - n, 0) // 2) for p, n in zip(patch, x.shape[1:], strict=True)]
    x = np.pad(x, [(0, 0), *pads])
    weight = np.zeros(patch)
    weight[tuple(p // 2 for p in patch)] = 1
    weight = ndimage.gaussian_filter(weight, np.multiply(patch, about["window_sigma"]), mode="constant")
    weight = (weight / (weight.max() / about["window_peak"])).astype(np.float16)
    weight[weight == 0] = weight[weight > 0].min()
    places = []
    for n, p, step in zip(x.shape[1:], patch, about["window_step"], strict=True):
        count = math.ceil((n - p) / (p * step)) + 1
        places.append([slice(s, s + p) for s in (round((n - p) / max(count - 1, 1) * i) for i in range(count))])
    mirrors = [m for k in range(4) for m in itertools.combinations([2 + a for a in about["mirror_axes"]], k)]
    total, weights = np.zeros((len(about["labels"]), *x.shape[1:]), np.float16), np.zeros(x.shape[1:], np.float16)
    for place in itertools.product(*places):
        part, logits = x[(slice(None), *place)][None], np.zeros((1, 1, *patch), np.float32)
        for axes in mirrors:
            seen = np.ascontiguousarray(np.flip(part, axes)).reshape(1, len(x), *patch[-n_axes:])
            logits = logits + np.flip(network(seen).reshape(1, -1, *patch), axes)
        total[(slice(None), *place)] += logits[0] / np.float32(len(mirrors)) * weight
        weights[place] += weight
    inner = [slice(a, n - b) for (a, b), n in zip(pads, x.shape[1:], strict=True)]
    return (total / weights)[(slice(None), *inner)]


def restore(logits: Any, geometry: Any, about: Any) -> Any:
    """Label map (Z, Y, X) of the original image from the logits (L, Z, Y, X) of the preprocessed one."""
    shape = [b.stop - b.start for b in geometry["box"]]
    labels = np.zeros(geometry["whole"], np.uint8 if len(logits) < 256 else np.uint16)
    whole = resample(logits, shape, geometry["new"], geometry["old"], about["logits_order"])
    labels[geometry["box"]] = whole.argmax(0)
    return labels.transpose(np.argsort(about["transpose"]))


def cases(folder: str | Path, about: Any) -> dict[str, list[str]]:
    """Case -> its files, channel by channel."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(folder).glob(f"*_[0-9][0-9][0-9][0-9]{about['file_ending']}")):
        found.setdefault(path.name[: -len(about["file_ending"]) - 5], []).append(str(path))
    return found


def main(images: str, out: str) -> None:
    """Segment every case of a folder."""
    import onnxruntime
    import SimpleITK as sitk

    here = Path(__file__).parent
    about = json.loads((here / "preprocessing.json").read_text(encoding="utf-8"))
    models = [onnxruntime.InferenceSession(str(here / m), providers=["CPUExecutionProvider"]) for m in about["models"]]
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, files in cases(images, about).items():
        read = [sitk.ReadImage(file) for file in files]
        arrays, spacing = [sitk.GetArrayFromImage(r) for r in read], [*read[0].GetSpacing()][::-1]
        if about["natural_images"]:  # (Y, X) or (Y, X, colour), and the spacing means nothing
            arrays, spacing = [np.moveaxis(np.atleast_3d(a), 2, 0) for a in arrays], [1.0, 1.0]
        if len(spacing) == 2:
            arrays, spacing = [a.reshape(-1, 1, *a.shape[-2:]) for a in arrays], [999 * max(spacing), *spacing]
        image = np.concatenate([a.reshape(-1, *a.shape[-3:]) for a in arrays])
        x, geometry = preprocess(image, spacing[-3:], about)
        logits = [slide(x, lambda part, m=m: m.run(None, {"image": part})[0], about) for m in models]
        labels = restore(sum(logits[1:], logits[0]) / np.float16(len(models)), geometry, about)
        written = sitk.GetImageFromArray(labels[0] if read[0].GetDimension() == 2 else labels)
        if not about["natural_images"]:
            written.CopyInformation(read[0])
        sitk.WriteImage(written, str(Path(out) / (name + about["file_ending"])), True)


if __name__ == "__main__":
    main(*sys.argv[1:])
