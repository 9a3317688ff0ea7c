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
from scipy import ndimage, special


def preprocess(image: Any, spacing: Any, about: Any) -> tuple[Any, dict[str, Any]]:
    """What the network sees of an image (C, Z, Y, X) with spacing [mm] along these axes, and what `restore` needs."""
    if about["resize"]:
        return at_one_size(image, **about["resize"])
    axes = about["transpose"]
    image = image.astype(np.float32, order="C")  # in another order numpy's means end in other bits
    x, old = image.transpose(0, *(1 + a for a in axes)), [float(spacing[a]) for a in axes]
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
            y[c] = spline(channel, shape, order)
            continue
        axis, n = coarse[0], channel.shape[coarse[0]]
        slices = np.stack([spline(s, np.delete(shape, axis), order) for s in np.moveaxis(channel, axis, 0)])
        nearest = np.floor(n / shape[axis] * (np.arange(shape[axis]) + 0.5) - 0.5 + 0.5).clip(0, n - 1).astype(int)
        y[c] = np.moveaxis(slices[nearest], 0, axis)
    return y


def spline(x: Any, shape: Any, order: int) -> Any:
    """A spline through the voxels' centres, held to the range of the values; the edge goes on beyond the edge."""
    zoom = [b / a for a, b in zip(x.shape, shape, strict=True)]
    return ndimage.zoom(x, zoom, order=order, mode="nearest", grid_mode=True).clip(x.min(), x.max())


def at_one_size(image: Any, size: Any, intensity: Any) -> tuple[Any, dict[str, Any]]:
    """An image (C, Z, Y, X) at `size` along its last axes, each channel scaled: instead of all the steps above."""
    whole = image.shape[1:]
    x = linear(image.astype(np.float32), [*whole[: 3 - len(size)], *size])
    for channel in x:
        if intensity == "zscore":
            low, span = channel.mean(), channel.std()
            channel[:] = (channel - low) / np.maximum(span, np.float32(1e-8))
            continue
        low, high = (channel.min(), channel.max()) if intensity == "0-1" else map(np.float32, intensity)
        channel[:] = ((channel - low) / np.maximum(high - low, np.float32(1e-8))).clip(0, 1)
    return x, {"whole": whole, "box": tuple(slice(0, n) for n in whole), "old": [1.0] * 3, "new": [1.0] * 3}


def linear(x: Any, shape: Any) -> Any:
    """An array (C, Z, Y, X) in another shape, axis by axis: linear, over as many voxels as become one where it shrinks."""
    for axis, n in enumerate(shape, 1):
        if n != x.shape[axis]:
            y = np.tensordot(linear_weights(x.shape[axis], n).astype(float), x.astype(float), (1, axis))
            x = np.moveaxis(y, 0, axis).astype(np.float32)
    return np.ascontiguousarray(x)


def linear_weights(old: int, new: int) -> Any:
    """What each of `old` voxels adds to each of `new`, (new, old): a triangle, in float32 as PyTorch computes it."""
    step = np.float32(old) / np.float32(new)
    centre = (float(step) * (np.arange(new) + 0.5)).astype(np.float32)[:, None]
    apart = ((np.arange(old, dtype=np.float32) - centre).astype(float) + 0.5) * np.float32(min(1.0, 1 / float(step)))
    weights = np.maximum(np.float32(0), np.float32(1) - np.abs(apart.astype(np.float32)))
    return weights / weights.cumsum(1)[:, -1:]


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
    total, weights = np.zeros((about["outputs"], *x.shape[1:]), np.float16), np.zeros(x.shape[1:], np.float16)
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
    if about["resize"]:
        whole = linear(logits.astype(np.float32), geometry["whole"])
    else:
        shape = [b.stop - b.start for b in geometry["box"]]
        whole = resample(logits, shape, geometry["new"], geometry["old"], about["logits_order"])
    labels = np.zeros(geometry["whole"], about["label_type"])
    labels[geometry["box"]] = decide(whole, about["regions_class_order"])
    return labels.transpose(np.argsort(about["transpose"]))


def decide(logits: Any, order: Any) -> Any:
    """The label of the largest logit; of regions the value in `order` of the last whose probability is above 0.5, or 0."""
    if order is None:
        return logits.argmax(0)
    labels = np.zeros(logits.shape[1:], np.int16)
    for value, region in zip(order, special.expit(logits.astype(np.float32)), strict=True):
        labels[region > 0.5] = value
    return labels


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
