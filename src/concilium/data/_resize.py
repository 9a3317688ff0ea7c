"""Every image at one size, for networks that want that: instead of nnU-Net's cropping, resampling and normalisation.

The settings stand in the plan, so that sites know them: `preprocessor_name` and, beside it, `resize` with `size` (voxels, along
the plan's axes) and `intensity`. Spacing is not looked at. With two numbers, every slice of a volume is resized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from concilium.nnunet_parts import DefaultPreprocessor

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

NAME = "ConciliumResize"
"""In a plan, where nnU-Net's own is `DefaultPreprocessor`."""


def resizes(plan: Any) -> bool:
    """Whether this plan asks for it."""
    return str(plan.configuration.preprocessor_name) == NAME


def settings_of(plan: Any) -> dict[str, Any]:
    """What of a plan decides the arrays, beyond what nnU-Net's does."""
    return {"resize": plan.configuration.configuration["resize"]} if resizes(plan) else {}


def write_settings(plans: dict[str, Any], configuration: str, resize: Mapping[str, Any]) -> None:
    """Make a plan of nnU-Net's planners one that resizes; patch size and network remain to be set."""
    chosen = plans["configurations"][configuration]
    chosen["preprocessor_name"] = NAME
    chosen["resize"] = {"size": list(resize["size"]), "intensity": resize["intensity"]}
    chosen["spacing"] = [1.0] * len(resize["size"])  # pooling then follows the size alone
    chosen["use_mask_for_norm"] = [False] * len(chosen["use_mask_for_norm"])
    plans["transpose_forward"] = plans["transpose_backward"] = [0, 1, 2]


def resize_case(
    image: Array, label: Array | None, properties: Mapping[str, Any], plan: Any, rules: Any
) -> tuple[Array, Array | None, dict[str, Any]]:
    """Image float32 (C, X, Y, Z) and label map int16 (1, X, Y, Z) at the plan's size, and the geometry before.

    Image linear (antialiased where it shrinks), label map by the nearest voxel.
    """
    wanted = settings_of(plan)["resize"]
    shape = _at_size(image.shape[1:], wanted["size"])
    about = dict(properties) | {"shape_before_cropping": list(image.shape[1:])}
    resized = _linear(torch.from_numpy(np.ascontiguousarray(image, np.float32)), shape).numpy()
    resized = np.stack([_scaled(channel, wanted["intensity"]) for channel in resized])
    if label is None:
        return resized, None, about
    for axis, n in enumerate(shape, 1):
        places = ((np.arange(n) + 0.5) * label.shape[axis] / n).astype(int)
        label = np.take(label, places, axis)
    label = label.astype(np.int16)
    wanted_classes = list(rules.foreground_regions if rules.has_regions else rules.foreground_labels)
    if rules.has_ignore_label:
        wanted_classes.append([-1, *rules.all_labels])
    about["class_locations"] = DefaultPreprocessor._sample_foreground_locations(label, wanted_classes)
    return resized, label, about


def restore_label(logits: Tensor, properties: Mapping[str, Any], rules: Any) -> Array:
    """Label map (X, Y, Z) at the original size, from logits (L, X, Y, Z): resized linearly, then decided."""
    restored = _linear(logits.detach().cpu().float(), properties["shape_before_cropping"])
    found = rules.convert_logits_to_segmentation(restored)
    holds = np.min_scalar_type(max(rules.all_labels))  # uint8 up to id 255, then uint16
    label: Array = (found.numpy() if isinstance(found, Tensor) else found).astype(holds)
    return label


def _at_size(shape: Sequence[int], size: Sequence[int]) -> list[int]:
    return [*shape[: len(shape) - len(size)], *size]


def _linear(image: Tensor, shape: Sequence[int]) -> Tensor:
    """(C, X, Y, Z) at this shape, axis by axis: PyTorch knows antialiasing for planes only."""
    for axis, n in enumerate(shape, 1):
        if n == image.shape[axis]:
            continue
        moved = image.movedim(axis, 0)
        rows = moved.reshape(1, 1, moved.shape[0], -1)
        rows = interpolate(rows, (n, rows.shape[-1]), mode="bilinear", antialias=True, align_corners=False)
        image = rows.reshape(n, *moved.shape[1:]).movedim(0, axis)
    return image.contiguous()


def _scaled(channel: Array, intensity: str | Sequence[float]) -> Array:
    """`zscore`: mean 0 and deviation 1; `0-1`: its own range; two numbers: this range, clipped, to 0 to 1."""
    if intensity == "zscore":
        low, span = channel.mean(), channel.std()
        return np.asarray((channel - low) / np.maximum(span, np.float32(1e-8)), np.float32)
    low, high = (channel.min(), channel.max()) if intensity == "0-1" else map(np.float32, intensity)
    scaled = (channel - low) / np.maximum(high - low, np.float32(1e-8))
    return np.asarray(np.clip(scaled, 0, 1), np.float32)
