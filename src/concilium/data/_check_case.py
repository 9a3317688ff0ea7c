"""`check`, one case: its channels and its label map, one file in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.data._check_reading import Picture, read_file
from concilium.data._check_space import compare
from concilium.data._check_types import About, Files, Finding, Seen, Space, count, some

Add = Callable[..., None]
REPLACE = "Export it again from its source, or move the case away."


def check_case(site: str, files: Files, about: About, ending: str) -> tuple[Seen, list[Finding]]:
    """What is remembered of a case, and what is wrong with it."""
    found: list[Finding] = []

    def add(severity: Any, code: str, text: str, fix: str) -> None:
        found.append(Finding(severity, code, site, files.name, text, fix))

    first, shape, digest = _images(files, about, ending, add)
    patient, named = about.patients.get(files.name, files.name), files.name in about.patients
    values, label_digest = None, None
    label = None if files.label is None else _read(files.label, ending, add)
    if label is not None:
        values = _label(label, about, add)
        label_digest = _hashed([label.voxels])
        if shape is not None and len(label.voxels) == 1:
            _fits(label, shape, first, add)
    space = first.space if first else None
    return Seen(site, files.name, patient, named, shape or (), space, digest, label_digest, values), found


def _read(path: Path, ending: str, add: Add) -> Picture | None:
    read = read_file(path, ending)
    if isinstance(read, Picture):
        return read
    colours = "Save it with one value per voxel (in 3D Slicer: as a label map)."
    fix = colours if read.code == "channel_mismatch" else REPLACE
    add("error", read.code, f"{path.parent.name}/{path.name} {read.why}", fix)
    return None


# ------------------------------------------------------------------------------------------------------------- images


def _images(
    files: Files, about: About, ending: str, add: Add
) -> tuple[Picture | None, tuple[int, ...] | None, bytes | None]:
    """The first channel (without its voxels), the shape of all, and the digest of all voxels unless they say nothing."""
    first: Picture | None = None
    shape: tuple[int, ...] | None = None
    whole, n_channels, constant, readable = hashlib.blake2b(digest_size=16), 0, [], True
    for path in (files.images[i] for i in sorted(files.images)):
        picture = _read(path, ending, add)
        if picture is None:
            readable = False
            continue
        voxels = picture.voxels
        _finite(picture, path.name, add)
        for voxel in voxels:
            constant.append(bool((voxel == voxel.flat[0]).all()))
        n_channels += len(voxels)
        whole.update(_hashed([voxels]))
        if first is None or shape is None:
            first, shape = _without_voxels(picture), voxels.shape[1:]
            _spacing(picture, path.name, add)
        else:
            _channels_fit(first, shape, picture, path.name, add)
    if shape is None:
        return None, None, None
    _constant(constant, about, add)
    whole_case = readable and len(files.images) == files.n_images  # otherwise that is a finding of its own
    if about.channels and whole_case and n_channels != len(about.channels):
        named = f"dataset.json names {len(about.channels)} ({', '.join(about.channels)})"
        text = f"The image has {count(n_channels, 'channel')}. {named}."
        add("error", "channel_mismatch", text, "Correct channel_names, or save the image with these channels.")
    return first, shape, None if all(constant) or not whole_case else whole.digest()


def _without_voxels(picture: Picture) -> Picture:
    return Picture(np.empty((0, 0, 0, 0)), picture.space, picture.n_not_finite, picture.no_spacing, picture.flat)


def _finite(picture: Picture, name: str, add: Add) -> None:
    if picture.n_not_finite:
        of = f"{picture.n_not_finite:,} of {picture.voxels.size:,} voxels of {name} are NaN or infinite"
        text = f"{of}. All must be numbers (in NIfTI files nnU-Net's reader would take them for 0)."
        add(
            "error",
            "not_finite",
            text,
            "Find out where they come from (a division by zero?) and export the file again.",
        )


def _constant(constant: Sequence[bool], about: About, add: Add) -> None:
    names = about.channels if about.channels and len(about.channels) == len(constant) else range(len(constant))
    same = [name for name, is_constant in zip(names, constant, strict=True) if is_constant]
    if same and len(same) == len(constant):
        add(
            "error", "constant_image", "All voxels of the image have one value: nothing can be learnt from it.", REPLACE
        )
    elif same:
        text = f"All voxels of channel {some(same)} have one value: that channel is empty."
        add(
            "warning", "constant_channel", text, "Right where the sequence was not acquired; otherwise export it again."
        )


def _spacing(picture: Picture, name: str, add: Add) -> None:
    if picture.no_spacing is not None:
        spacing = " x ".join(f"{s:g}" for s in picture.no_spacing)
        text = (
            f"The header of {name} gives a spacing of {spacing}. It must be above 0; the reader would take 0 for 1 mm."
        )
        add(
            "error",
            "no_spacing",
            text,
            "Write the spacing of the acquisition [mm] into the header (pixdim), label map included.",
        )
    if picture.flat:
        text = f"{name} is a 2D file. nnU-Net's reader makes it a slice 999 times as thick as its pixels: volumes [ml] are wrong."
        add(
            "warning",
            "flat_volume",
            text,
            "Save it as a volume of one slice (X, Y, 1) with its thickness, and plan in 2D.",
        )


def _channels_fit(first: Picture, shape: tuple[int, ...], picture: Picture, name: str, add: Add) -> None:
    """Compare a channel with the first."""
    other = picture.voxels.shape[1:]
    if other != shape:
        text = f"{name} has {_size(other)} voxels, the first channel {_size(shape)}. All channels must be equal."
        add("error", "shape_mismatch", text, "Resample the channels to one grid.")
    elif first.space and picture.space:
        same = np.allclose(first.space.spacing, picture.space.spacing)  # as nnU-Net's reader asks
        _compared(first.space, picture.space, f"{name} and the first channel", add, tolerant=same)


def _fits(label: Picture, shape: tuple[int, ...], first: Picture | None, add: Add) -> None:
    """Compare the label map with the image."""
    own = label.voxels.shape[1:]
    if own != shape:
        turned = sorted(own) == sorted(shape)
        why = " The one is the other with its axes in another order: one of them is turned." if turned else ""
        text = f"The label map has {_size(own)} voxels, the image {_size(shape)}. Both must be equal.{why}"
        fix = (
            "Turn the label map back (swap the axes, not the header)."
            if turned
            else "Resample the label map to the image."
        )
        add("error", "shape_mismatch", text, fix)
    elif first and first.space and label.space:
        _compared(first.space, label.space, "Label map and image", add)


def _compared(one: Space, other: Space, what: str, add: Add, *, tolerant: bool = True) -> None:
    difference = compare(one, other, tolerant=tolerant)
    if difference is not None:
        severity, code, text, fix = difference
        add(severity, code, f"{what} {text}", fix)


# ------------------------------------------------------------------------------------------------------------- labels


def _label(label: Picture, about: About, add: Add) -> frozenset[int] | None:
    """The ids in a label map; None where it holds none that can be used."""
    if len(label.voxels) != 1:
        text = f"The label map has {len(label.voxels)} channels. Allowed is 1."
        add("error", "channel_mismatch", text, "Save ids (0, 1, 2, ...), not colours.")
        return None
    if label.n_not_finite:
        text = f"{label.n_not_finite:,} of {label.voxels.size:,} voxels of the label map are NaN or infinite. It must hold ids."
        add("error", "not_finite", text, REPLACE)
    counted = _counted(label.voxels)
    broken = {v: n for v, n in counted.items() if v != int(v)}
    whole = {int(v): n for v, n in counted.items() if v == int(v)}
    size = label.voxels.size
    if broken:
        values = some([f"{v:g}" for v in broken])
        text = f"{_share(sum(broken.values()), size)} of the label map hold no whole numbers ({values})."
        add(
            "error",
            "fractional_label",
            text,
            "It was resampled by interpolation: resample it by nearest neighbour instead.",
        )
    known = {i for ids in (about.labels or {}).values() for i in ids}
    unknown = {v: n for v, n in whole.items() if v not in known} if about.labels else {}
    if unknown:
        hold = f"{_share(sum(unknown.values()), size)} of the label map hold {some(list(unknown))}"
        text = f"{hold}. Allowed: {_ids(about.labels or {})}."
        add("error", "unknown_label", text, _remedy(unknown, known))
    if set(whole) <= {0} and not broken:
        text = "The label map is empty: background only."
        add(
            "warning",
            "empty_label",
            text,
            "Right where the case shows none of the structures; otherwise the annotation is missing.",
        )
    return frozenset(whole)


def _counted(voxels: NDArray[Any]) -> dict[float, int]:
    """Value -> number of voxels, of those that are finite."""
    flat = voxels.ravel()
    if np.issubdtype(flat.dtype, np.floating):
        flat = flat[np.isfinite(flat)]
        whole = flat.astype(np.int64)
        if (whole != flat).any():
            values, n = np.unique(flat, return_counts=True)
            return {float(v): int(k) for v, k in zip(values, n, strict=True)}
        flat = whole
    if not flat.size:
        return {}
    low, high = int(flat.min()), int(flat.max())
    if high - low < 1 << 16:  # much quicker than sorting the voxels
        n = np.bincount((flat - low if low else flat).astype(np.int64, copy=False))
        return {float(low + v): int(n[v]) for v in np.flatnonzero(n)}
    values, n = np.unique(flat, return_counts=True)
    return {float(v): int(k) for v, k in zip(values, n, strict=True)}


def _remedy(unknown: Mapping[int, int], known: set[int]) -> str:
    if set(unknown) == {255} and 1 in known:
        return "If 255 means 1 (a mask saved for viewing), write 1 instead."
    return "Correct the label map, or add the label to dataset.json."


# -------------------------------------------------------------------------------------------------------------- words


def _hashed(arrays: Sequence[NDArray[Any]]) -> bytes:
    """Digest of values and shape, the same for every type of number that holds them."""
    whole = hashlib.blake2b(digest_size=16)
    for array in arrays:
        whole.update(str(array.shape).encode())
        for part in array:
            whole.update(np.ascontiguousarray(part, np.float32).data)
    return whole.digest()


def _size(shape: Sequence[int]) -> str:
    """Along the file's axes: x first, as viewers show it."""
    sizes = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    return " x ".join(str(n) for n in reversed(sizes))


def _share(n: int, of: int) -> str:
    return f"{n:,} voxels ({100 * n / of:.2g} %)"


def _ids(labels: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} = {' + '.join(map(str, ids))}" for name, ids in labels.items())
