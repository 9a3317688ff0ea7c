"""nnU-Net's preprocessing of one case by a plan, kept on disk, and the way back from logits to a label map.

A prepared case is one safetensors file, `<key>.safetensors`: `image`, `label`, one `locations/<ids>` per foreground label or
region (and one for all that is annotated, where some voxels are to be ignored), and its geometry as JSON in the header. The key
is a digest of the case's content and of all that decides the arrays. Arrays are mapped from the file, so that cutting a patch
from a large volume reads the patch only.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from concilium.data._resize import resize_case, resizes, restore_label, settings_of
from concilium.data.dataset import Case, Dataset, content_key, read_case
from concilium.data.kept import whole
from concilium.data.labels import Labels, to_nnunet
from concilium.data.parties import crops, with_channel
from concilium.data.plan import Plan
from concilium.errors import ContractError, DataError
from concilium.nnunet_parts import DefaultPreprocessor, convert_predicted_logits_to_segmentation_with_correct_shape

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

FORMAT = "concilium.prepared/1"
_DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I16": np.dtype("<i2"), "I64": np.dtype("<i8")}
_MAX_HEADER = 1 << 24
_DECIDING = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)


@dataclass(frozen=True)
class Prepared:
    """A preprocessed case. Arrays are read-only and mapped from `path`."""

    path: Path
    image: Array
    """float32 (C, X, Y, Z), in the plan's axis order and spacing; Z, Y, X of the file unless the plan transposes."""
    label: Array
    """int16 (1, X, Y, Z); -1 outside the region where any channel is non-zero."""
    locations: Mapping[int | tuple[int, ...], Array]
    """int64 (n, 4) per foreground label or region: voxels (0, x, y, z) to centre patches on, sampled by nnU-Net; n may be 0."""
    properties: dict[str, Any]
    """Geometry before preprocessing: what `restore` and the writers of label maps need."""


def label_rules(plan: Plan, labels: Labels) -> Any:
    """nnU-Net's label manager for these labels."""
    return plan.manager.get_label_manager(to_nnunet(labels))


def prepare(case: Case, dataset: Dataset, plan: Plan, folder: Path, *, labelled: bool = True) -> Prepared:
    """The preprocessed case, from `folder` where it is there and intact; otherwise it is made and written there.

    Of a case that need not be `labelled` the label map is 0 everywhere.

    Raises:
        DataError: the case has no label map, or cannot be read.
    """
    path = folder / f"{prepared_key(case, dataset, plan)}.safetensors"
    if path.exists():
        try:
            return open_prepared(path)
        except ContractError:
            pass  # a damaged file is no reason to stop: it is made again
    image, label, properties = read_case(case, dataset)
    if label is None and not labelled:
        label = np.zeros((1, *image.shape[1:]), np.float32)
    if label is None:
        raise DataError(
            f"Case {case.name} has no label map. Training needs one. Add it, or leave the case out.",
            code="missing_label",
        )
    image, label, properties = _run(image, label, properties, plan, dataset.labels, case.name)
    _write(path, image, label, properties)
    return open_prepared(path)


def preprocess(case: Case, dataset: Dataset, plan: Plan) -> tuple[Array, dict[str, Any]]:
    """Image float32 (C, X, Y, Z) as the network is to see it, and the geometry that `restore` needs.

    The label map is not used even where there is one: where it reaches beyond the non-zero region it would change the mask
    of nnU-Net's normalisation, and so what the network sees.
    """
    image, _, properties = read_case(replace(case, label=None), dataset)
    image, _, properties = _run(image, None, properties, plan, dataset.labels, case.name)
    return np.ascontiguousarray(image, np.float32), _as_read(_as_json(properties))


def restore(logits: Tensor, plan: Plan, labels: Labels, properties: Mapping[str, Any]) -> Array:
    """Label map (X, Y, Z) in the geometry of the original file, from logits (L, X, Y, Z) of the preprocessed image."""
    if resizes(plan):
        return restore_label(logits, properties, label_rules(plan, labels))
    restored: Array = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.detach().cpu(),
        plan.manager,
        plan.configuration,
        label_rules(plan, labels),
        dict(properties),
        num_threads_torch=torch.get_num_threads(),
    )
    return restored


def prepared_key(case: Case, dataset: Dataset, plan: Plan) -> str:
    """Digest (BLAKE2b, hexadecimal) of the case's content and of all that decides its preprocessed arrays.

    Batch size, patch size and network are not part of it: other studies with the same spacing find the same files.
    """
    deciding = {
        "format": FORMAT,
        "nnunetv2": version("nnunetv2"),
        "content": content_key(case, dataset),
        "transpose_forward": plan.manager.transpose_forward,
        "intensities": plan.manager.foreground_intensity_properties_per_channel,
        **{name: plan.configuration.configuration[name] for name in _DECIDING},
        **settings_of(plan),
        **({} if crops(plan) else {"crop": False}),
    }
    return blake2b(json.dumps(_as_json(deciding), sort_keys=True).encode(), digest_size=20).hexdigest()


def open_prepared(path: Path) -> Prepared:
    """A prepared case with its arrays mapped read-only from the file.

    Raises:
        ContractError: the file is damaged, or was not written by `prepare`.
    """
    try:
        arrays, metadata = _map_safetensors(path)
        about = json.loads(metadata["about"])
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
        locations = {_ids(name): arrays[f"locations/{name}"] for name in about["locations"]}
        image, label = arrays["image"], arrays["label"]
        if (image.dtype.str, label.dtype.str) != ("<f4", "<i2") or label.shape != (1, *image.shape[1:]):
            raise ValueError(f"image {image.dtype} {image.shape}, label {label.dtype} {label.shape}")
        return Prepared(path, image, label, locations, _as_read(about["properties"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ContractError(
            f"The prepared case {path} cannot be read ({type(error).__name__}: {error}). "
            f"Files written by this version ({FORMAT}) are allowed. Delete it; it is then made again."
        ) from error


# ---------------------------------------------------------------------------------------------------- nnU-Net's part


def _run(
    image: Array, label: Array | None, properties: Mapping[str, Any], plan: Plan, labels: Labels, case: str
) -> Any:
    try:
        return _preprocessed(image, label, properties, plan, labels)
    except (
        ArithmeticError,
        IndexError,
        ValueError,
    ) as e:  # whatever such a size of voxels brings about in nnU-Net's arithmetic
        told = f"{image.shape[1:]} voxels of {tuple(properties['spacing'])} mm"
        raise DataError(
            f"Case {case} cannot be preprocessed ({type(e).__name__}: {e}): {told}. Expected voxels of such a size that they can "
            f"be resampled to {plan.configuration.spacing} mm. Correct the file's header, or leave the case out."
        ) from e


def _preprocessed(image: Array, label: Array | None, properties: Mapping[str, Any], plan: Plan, labels: Labels) -> Any:
    name = plan.configuration.preprocessor_name
    if resizes(plan):
        return resize_case(image, label, properties, plan, label_rules(plan, labels))
    if name != DefaultPreprocessor.__name__:
        raise ContractError(
            f"The plan asks for the preprocessor {name}. {DefaultPreprocessor.__name__} is allowed. Plan again without it."
        )
    # nnU-Net's readers give label maps as float32; so does this, to take the same way through its arithmetic.
    label = None if label is None else label.astype(np.float32)
    manager, configuration = plan.manager, plan.configuration
    if not crops(plan):  # a channel of ones more: every voxel then is one that nnU-Net keeps
        image = np.concatenate((image, np.ones((1, *image.shape[1:]), np.float32)))
        manager, configuration = with_channel(plan)
    with redirect_stdout(io.StringIO()):
        made = DefaultPreprocessor(verbose=False).run_case_npy(
            image, label, dict(properties), manager, configuration, to_nnunet(labels)
        )
    return made if crops(plan) else (made[0][:-1], *made[1:])


# ----------------------------------------------------------------------------------------------------------- the file


def _write(path: Path, image: Array, label: Array, properties: dict[str, Any]) -> None:
    locations = {_name(ids): voxels for ids, voxels in properties.pop("class_locations").items()}
    arrays: dict[str, Array] = {
        "image": np.ascontiguousarray(image, np.float32),
        "label": np.ascontiguousarray(label, np.int16),
        **{
            f"locations/{name}": np.ascontiguousarray(np.reshape(voxels, (-1, 4)), np.int64)
            for name, voxels in locations.items()
        },
    }
    # The order of the labels is kept: nnU-Net draws the class of a patch by its place, and safetensors sorts by name.
    # One entry of metadata, since safetensors writes several in any order: the same case gives the same bytes.
    about = json.dumps({"format": FORMAT, "locations": list(locations), "properties": _as_json(properties)})
    with whole(path) as unfinished:
        save_file(arrays, unfinished, metadata={"about": about})


def _name(ids: Any) -> str:
    """Ids as text: `2`, or `1,2` of a region."""
    return ",".join(str(int(i)) for i in (ids if isinstance(ids, tuple) else (ids,)))


def _ids(name: str) -> int | tuple[int, ...]:
    """Ids from text."""
    ids = tuple(map(int, name.split(",")))
    return ids if len(ids) > 1 else ids[0]


def _map_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read-only arrays mapped from a safetensors file, and its metadata; offsets must cover the file exactly."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    start, end = 8 + length, 0
    buffer = np.memmap(path, dtype=np.uint8, mode="r")
    arrays: dict[str, Array] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, first, last)):
            raise ValueError(f"shape {shape} or offsets {first}, {last} of {name}")
        if first != end or last - first != int(np.prod(shape, dtype=object)) * dtype.itemsize or start + last > size:
            raise ValueError(f"offsets {first}, {last} of {name} {shape} in a file of {size} bytes")
        arrays[name] = buffer[start + first : start + last].view(dtype).reshape(shape)
        end = last
    if start + end != size:
        raise ValueError(f"{size} bytes where {start + end} are described")
    return arrays, metadata


def _as_json(value: Any) -> Any:
    """The same value of Python's own numbers, lists and mappings; floats keep every bit."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _as_json(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_json(item) for item in value]
    return value


def _as_read(properties: Any) -> dict[str, Any]:
    """Properties from JSON, with shapes as tuples again."""
    return {name: tuple(value) if name.startswith("shape_") else value for name, value in properties.items()}
