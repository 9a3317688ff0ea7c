"""preprocessing.json: all that a program needs to take an image to the network and the logits to a label map.

The numbers are those of nnU-Net's preprocessing and inference (Isensee et al., Nature Methods 18 (2021) 203-211, and its code,
version 2), written so that `_steps.py`, which is exported beside them, can follow without nnU-Net. Two-dimensional networks are
described as three-dimensional ones with patches of one slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from concilium.data._description import READERS
from concilium.errors import StudyError
from concilium.finished import Finished

FORMAT = "concilium.preprocessing/1"
_PLAIN = {"clip": None, "shift": 0.0, "scale": 1.0}
_SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "ZScoreNormalization": {"clip": None, "shift": "mean", "scale": "std"},
    "NoNormalization": _PLAIN,
    "RescaleTo01Normalization": {"clip": None, "shift": "min", "scale": "max"},
    "RGBTo01Normalization": {**_PLAIN, "scale": 255.0},
}
_STEPS = (
    "Read each channel as an array (Z, Y, X), the file's last axis first, and stack them in the order of `channels`. The "
    "spacing [mm] is in the same order. A 2D image has one slice, 999 times as thick as its pixels are large; where "
    "`natural_images`, pixels are 1.",
    "Reorder the axes by `transpose`.",
    "Crop to the bounding box of the voxels that are not zero in some channel. The mask is these voxels, holes filled.",
    "Normalise each channel by `normalization`: clip, subtract shift, divide by scale (1e-8 at least). With inside_mask only the "
    "mask counts and changes.",
    "Resample to `spacing` (null: as it is): shape = round(spacing of the image / `spacing` * shape), splines of `image_order` "
    "through the voxels' centres, the edge repeated, held to the channel's range. If one axis of the image's spacing, or else of "
    "`spacing`, is more than 3 times as coarse as another, its slices are resized in plane, and the nearest are taken.",
    "Pad with zeros on both sides to `patch_size`. Windows start at equal distances of at most `window_step` patches, the first "
    "and the last at the ends.",
    "The logits of a window are the mean over its flips along all subsets of `mirror_axes`. Windows are added with Gaussian "
    "weights (sigma: `window_sigma` patches, peak: `window_peak`; a weight of 0 becomes the smallest other) and divided by the "
    "sum of the weights; sums and weights are float16.",
    "Average the logits over `models`.",
    "Crop the padding. Resample to the shape before resampling, in the same way, by splines of `logits_order`. Take the label of "
    "the largest logit, put it into the uncropped image (0 outside), and reverse `transpose`.",
)
"""In words, for whoever writes a program of their own."""


def sidecar(finished: Finished, models: list[str]) -> dict[str, Any]:
    """The numbers, with the files of the members.

    Raises:
        StudyError: the plan asks for what `_steps.py` does not do.
    """
    plan, study = finished.plan, finished.study
    settings = plan.architecture
    image, logits = settings["resampling_fn_data_kwargs"], settings["resampling_fn_probabilities_kwargs"]
    functions = {settings["resampling_fn_data"], settings["resampling_fn_probabilities"]}
    usual = functions == {"resample_data_or_seg_to_shape"} and all(
        how.get("order_z", 0) == 0 and how.get("force_separate_z") is None for how in (image, logits)
    )
    if not usual or settings.get("preprocessor_name") != "DefaultPreprocessor":
        raise StudyError(
            f"The plan resamples by {', '.join(sorted(functions))} with options of its own. This format can describe nnU-Net's "
            "default only. Export it as nnunet or safetensors."
        )
    flat = 3 - len(plan.patch_size)
    return {
        "format": FORMAT,
        "study": study.study.name,
        "model": finished.name,
        "steps": list(_STEPS),
        "models": models,
        "input": "image",
        "output": "logits",
        "channels": list(finished.channels),
        "labels": dict(finished.labels),
        "file_ending": finished.file_ending,
        "natural_images": READERS[finished.file_ending] == "NaturalImage2DIO"
        or (flat and finished.file_ending in (".tif", ".tiff")),
        "transpose": list(plan.transpose_forward),
        "normalization": _normalization(finished),
        "spacing": [None] * flat + list(plan.spacing),
        "image_order": image["order"],
        "logits_order": logits["order"],
        "network_axes": len(plan.patch_size),
        "patch_size": [1] * flat + list(plan.patch_size),
        "window_step": [1.0] * flat + [0.5] * len(plan.patch_size),
        "window_sigma": [0.0] * flat + [0.125] * len(plan.patch_size),
        "window_peak": 10,
        "mirror_axes": [flat + axis for axis in finished.mirror_axes],
        "precision": {"here": "float32", "behind the figures": study.training.precision},
    }


def _normalization(finished: Finished) -> list[dict[str, Any]]:
    plan = finished.plan
    measured = plan.manager.foreground_intensity_properties_per_channel
    found = []
    schemes = zip(plan.architecture["normalization_schemes"], plan.architecture["use_mask_for_norm"], strict=True)
    for i, (scheme, inside_mask) in enumerate(schemes):
        if scheme == "CTNormalization":
            m = measured[str(i)]
            how: Mapping[str, Any] = {
                "clip": [m["percentile_00_5"], m["percentile_99_5"]], "shift": m["mean"], "scale": m["std"],
            }  # fmt: skip
        elif scheme in _SCHEMES:
            how = _SCHEMES[scheme]
        else:
            raise StudyError(
                f"The plan normalises by {scheme}. This format can describe {', '.join((*_SCHEMES, 'CTNormalization'))}. "
                "Export it as nnunet or safetensors."
            )
        # only the z-score of a case looks at the mask
        found.append({"scheme": scheme, **how, "inside_mask": bool(inside_mask) and scheme == "ZScoreNormalization"})
    return found
