"""preprocessing.json: all that a program needs to take an image to the network and the logits to a label map.

The numbers are those of nnU-Net's preprocessing and inference (Isensee et al., Nature Methods 18 (2021) 203-211, and its code,
version 2), written so that `_steps.py`, which is exported beside them, can follow without nnU-Net. Two-dimensional networks are
described as three-dimensional ones with patches of one slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from concilium.data._description import READERS
from concilium.data._resize import resizes
from concilium.data.labels import IGNORE, Labels, has_regions, n_heads, to_nnunet
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
_READ = (
    "Read each channel as an array (Z, Y, X), the file's last axis first, and stack them in the order of `channels`. The "
    "spacing [mm] is in the same order. A 2D image has one slice, 999 times as thick as its pixels are large; where "
    "`natural_images`, pixels are 1."
)
_BEFORE = (
    "Reorder the axes by `transpose`.",
    "Crop to the bounding box of the voxels that are not zero in some channel. The mask is these voxels, holes filled.",
    "Normalise each channel by `normalization`: clip, subtract shift, divide by scale (1e-8 at least). With inside_mask only the "
    "mask counts and changes.",
    "Resample to `spacing` (null: as it is): shape = round(spacing of the image / `spacing` * shape), splines of `image_order` "
    "through the voxels' centres, the edge repeated, held to the channel's range. If one axis of the image's spacing, or else of "
    "`spacing`, is more than 3 times as coarse as another, its slices are resized in plane, and the nearest are taken.",
)
_RESIZED_BEFORE = (
    "Resize to `resize.size` along the last axes, one axis after the other: output i is the mean of the inputs j, weighted by "
    "max(0, 1 - |j + 0.5 - step * (i + 0.5)| / max(step, 1)), where step = size of the input / size of the output. float32.",
    "Scale each channel by `resize.intensity`: zscore to mean 0 and deviation 1; 0-1 from its range to 0 to 1; two numbers from "
    "this range to 0 to 1, clipped. Divisors are 1e-8 at least.",
)
_WINDOWS = (
    "Pad with zeros on both sides to `patch_size`. Windows start at equal distances of at most `window_step` patches, the first "
    "and the last at the ends.",
    "The logits of a window are the mean over its flips along all subsets of `mirror_axes`. Windows are added with Gaussian "
    "weights (sigma: `window_sigma` patches, peak: `window_peak`; a weight of 0 becomes the smallest other) and divided by the "
    "sum of the weights; sums and weights are float16.",
    "Average the logits over `models`.",
)
_AFTER = "Crop the padding. Resample to the shape before resampling, in the same way, by splines of `logits_order`."
_RESIZED_AFTER = "Crop the padding. Resize the logits to the shape of the image, in the same way."
_LARGEST = "Take the label of the largest logit"
_REGIONS = (
    "Start from 0; output by output, write its id of `regions_class_order` where the sigmoid of the logit is above 0.5"
)
_BACK = ", put the label map into the uncropped image (0 outside), and reverse `transpose`."


def sidecar(finished: Finished, models: list[str]) -> dict[str, Any]:
    """The numbers, with the files of the members.

    Raises:
        StudyError: the plan asks for what `_steps.py` does not do.
    """
    plan, study = finished.plan, finished.study
    flat = 3 - len(plan.patch_size)
    return {
        "format": FORMAT,
        "study": study.study.name,
        "model": finished.name,
        "steps": _steps(finished),
        "models": models,
        "input": "image",
        "output": "logits",
        "channels": list(finished.channels),
        **_labels(finished.labels),
        "file_ending": finished.file_ending,
        "natural_images": READERS[finished.file_ending] == "NaturalImage2DIO"
        or (flat and finished.file_ending in (".tif", ".tiff")),
        **_before(finished),
        "network_axes": len(plan.patch_size),
        "patch_size": [1] * flat + list(plan.patch_size),
        "window_step": [1.0] * flat + [0.5] * len(plan.patch_size),
        "window_sigma": [0.0] * flat + [0.125] * len(plan.patch_size),
        "window_peak": 10,
        "mirror_axes": [flat + axis for axis in finished.mirror_axes],
        "precision": {"here": "float32", "behind the figures": study.training.precision},
    }


def is_plain(about: Mapping[str, Any]) -> bool:
    """Whether `_plain.py` can follow: one 3D network, volumes, nothing resized to one size, flipped, reordered or apart."""
    return bool(
        about["network_axes"] == 3
        and READERS[about["file_ending"]] == "SimpleITKIO"
        and about["resize"] is about["regions_class_order"] is None
        and not about["mirror_axes"]
        and about["transpose"] == [0, 1, 2]
        and len(about["models"]) == 1
        and max(about["spacing"]) <= 3 * min(about["spacing"])
        and all(how["shift"] != "min" for how in about["normalization"])
    )


def _labels(labels: Labels) -> dict[str, Any]:
    """What the outputs stand for, and how they decide. No output stands for `ignore`."""
    told = to_nnunet({name: ids for name, ids in labels.items() if name != IGNORE})
    highest = max(i for ids in told["labels"].values() for i in (ids if isinstance(ids, list) else [ids]))
    return {
        "labels": told["labels"],
        "regions_class_order": told.get("regions_class_order"),
        "outputs": n_heads(labels),
        "label_type": "uint8" if highest < 255 else "uint16",
    }


def _before(finished: Finished) -> dict[str, Any]:
    """What happens to an image before the windows: nnU-Net's steps, or `resize` alone."""
    plan = finished.plan
    settings = plan.architecture
    if resizes(plan):
        nothing = dict.fromkeys(("normalization", "spacing", "image_order", "logits_order"))
        return {"resize": settings["resize"], "transpose": list(plan.transpose_forward), **nothing}
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
    return {
        "resize": None,
        "transpose": list(plan.transpose_forward),
        "normalization": _normalization(finished),
        "spacing": [None] * (3 - len(plan.patch_size)) + list(plan.spacing),
        "image_order": image["order"],
        "logits_order": logits["order"],
    }


def _steps(finished: Finished) -> list[str]:
    """In words, for whoever writes a program of their own."""
    resized = resizes(finished.plan)
    before, after = (_RESIZED_BEFORE, _RESIZED_AFTER) if resized else (_BEFORE, _AFTER)
    decision = _REGIONS if has_regions(finished.labels) else _LARGEST
    return [_READ, *before, *_WINDOWS, f"{after} {decision}{'.' if resized else _BACK}"]


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
