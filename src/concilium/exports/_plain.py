"""Segment volumes with the model beside this script: what preprocessing.json says, in as few lines as it takes.

    python plain.py IMAGES SEGMENTATIONS

To read, and to start a program of your own from; predict.py gives the same label maps, and takes every model and image. Needs
Python 3.11, numpy, scipy, onnxruntime and SimpleITK. IMAGES holds CASE_0000.ENDING, CASE_0001.ENDING, ..., one per channel.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import SimpleITK as sitk
from scipy import ndimage


def segment(image: Any, spacing: Any, network: Any, about: Any) -> Any:
    """Label map (Z, Y, X) of an image (C, Z, Y, X) with spacing [mm] along these axes."""
    if max(spacing) > 3 * min(spacing):
        sys.exit(f"Spacing {spacing} mm: one axis is more than 3 times as coarse as another. Use predict.py.")
    mask = ndimage.binary_fill_holes((image != 0).any(0))
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    x = image[:, *box]
    for channel, how in zip(x, about["normalization"], strict=True):
        np.clip(channel, *(how["clip"] or (-np.inf, np.inf)), out=channel)
        inside = mask[box] if how["inside_mask"] else ...
        scale = channel[inside].std() if how["scale"] == "std" else how["scale"]
        channel[inside] -= channel[inside].mean() if how["shift"] == "mean" else how["shift"]
        channel[inside] /= max(scale, 1e-8)
    cropped, wanted = x.shape[1:], np.divide(spacing, about["spacing"])
    x = resample(x, [round(a * n) for n, a in zip(cropped, wanted, strict=True)], about["image_order"])
    short = np.maximum(np.subtract(about["patch_size"], x.shape[1:]), 0)
    logits = slide(np.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in short)]), network, about)
    logits = logits[:, *(slice(n // 2, n // 2 + size) for n, size in zip(short, x.shape[1:], strict=True))]
    labels = np.zeros(mask.shape, about["label_type"])
    labels[box] = resample(logits, cropped, about["logits_order"]).argmax(0)
    return labels


def resample(x: Any, shape: Any, order: int) -> Any:
    """Splines through the voxels' centres, held to the range of each channel; the edge goes on beyond the edge."""
    if x.shape[1:] == tuple(shape):
        return x
    zoom = np.divide(shape, x.shape[1:])
    splines = (ndimage.zoom(c, zoom, order=order, mode="nearest", grid_mode=True) for c in x.astype(float))
    return np.stack([s.clip(c.min(), c.max()) for s, c in zip(splines, x, strict=True)]).astype(x.dtype)


def slide(x: Any, network: Any, about: Any) -> Any:
    """Logits float16: the mean of windows that overlap, with Gaussian weights."""
    patch, shape = about["patch_size"], x.shape[1:]
    weight = np.zeros(patch)
    weight[*(p // 2 for p in patch)] = 1
    weight = ndimage.gaussian_filter(weight, np.multiply(patch, about["window_sigma"]), mode="constant")
    weight = (weight / (weight.max() / about["window_peak"])).astype(np.float16)
    weight[weight == 0] = weight[weight > 0].min()
    counts = 1 + np.ceil(np.subtract(shape, patch) / np.multiply(patch, about["window_step"])).astype(int)
    starts = [np.linspace(0, n - p, k).round().astype(int) for n, p, k in zip(shape, patch, counts, strict=True)]
    total, weights = np.zeros((about["outputs"], *shape), np.float16), np.zeros(shape, np.float16)
    for start in itertools.product(*starts):
        place = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        total[:, *place] += network(x[:, *place][None])[0] * weight
        weights[place] += weight
    return total / weights


def main(images: str, out: str) -> None:
    """Segment every case of a folder."""
    here = Path(__file__).parent
    about = json.loads((here / "preprocessing.json").read_text(encoding="utf-8"))
    model = onnxruntime.InferenceSession(str(here / about["models"][0]), providers=["CPUExecutionProvider"])
    Path(out).mkdir(parents=True, exist_ok=True)
    for first in sorted(map(str, Path(images).glob(f"*_0000{about['file_ending']}"))):
        case = first[: -len(f"_0000{about['file_ending']}")]
        read = [sitk.ReadImage(f"{case}_{i:04d}{about['file_ending']}") for i in range(len(about["channels"]))]
        image = np.stack([sitk.GetArrayFromImage(channel) for channel in read]).astype(np.float32)
        labels = segment(image, read[0].GetSpacing()[::-1], lambda x: model.run(None, {"image": x})[0], about)
        written = sitk.GetImageFromArray(labels)
        written.CopyInformation(read[0])
        sitk.WriteImage(written, str(Path(out) / f"{Path(case).name}{about['file_ending']}"), True)


if __name__ == "__main__":
    main(*sys.argv[1:])
