"""`check`, one case: its channels and its label map, one file in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.data._check_label import check_label
from concilium.data._check_reading import read_file
from concilium.data._check_space import compare
from concilium.data._check_types import REPLACE, About, Files, Finding, Mend, Picture, Seen, count, some

Add = Callable[..., None]
TURNED = {
    2: "mirrored left to right",
    3: "turned by 180°",
    4: "mirrored top to bottom",
    5: "turned and mirrored",
    6: "turned by 90° clockwise",
    7: "turned and mirrored",
    8: "turned by 90° anticlockwise",
}
"""Value of the orientation tag -> what viewers do to the stored pixels."""


def check_case(site: str, files: Files, about: About, ending: str) -> tuple[Seen, list[Finding]]:
    """What is remembered of a case, and what is wrong with it."""
    found: list[Finding] = []
    case = _Case(site, files, about, ending, found)
    first, shape, digest = _images(case)
    patient, named = about.patients.get(files.name, files.name), files.name in about.patients
    values, label_digest = None, None
    label = None if files.label is None else case.read(files.label, label_of_stack=first is None or first.stack)
    if label is not None:
        values = check_label(label, about, case.add)
        label_digest = _hashed([label.voxels])
        if label.stack and label.no_spacing:  # of no use to anyone, but the reader refuses it
            case.add("error", "no_spacing", *label.no_spacing)
        if shape is not None and len(label.voxels) == 1:
            _fits(label, shape, first, case)
    _tags({name: picture.tag for name, picture in case.kept.items()}, case.add)
    space, lacks = (first.space, first.lacks) if first else (None, "")
    headers = tuple((p.space and p.space.numbers, p.no_spacing, p.lacks != "", p.tag) for p in case.kept.values())
    seen = Seen(
        site, files.name, files.paths, patient, named, shape or (), space, lacks, digest, label_digest, headers, values
    )
    return seen, found


@dataclass(frozen=True)
class _Case:
    """A case on its way through the check."""

    site: str
    files: Files
    about: About
    ending: str
    found: list[Finding]
    kept: dict[Path, Picture] = field(default_factory=dict)
    """What has been read, without its voxels."""

    def add(self, severity: Any, code: str, text: str, fix: str, mend: Mend | None = None) -> None:
        self.found.append(Finding(severity, code, self.site, self.files.name, text, fix, mend))

    def read(self, path: Path, *, label_of_stack: bool = False) -> Picture | None:
        """The file, unless it cannot be used."""
        read = read_file(path, self.ending, self.files.name, label_of_stack=label_of_stack)
        if isinstance(read, Picture):
            self.kept[path] = replace(read, voxels=np.empty((0, 0, 0, 0)))
            return read
        colours = "Save it with one value per voxel (in 3D Slicer: as a label map)."
        fix = colours if read.code == "channel_mismatch" else REPLACE
        self.add("error", read.code, f"{_name(path)} {read.why}", fix)
        return None


def _tags(tags: Mapping[Path, int], add: Add) -> None:
    """Files that viewers show otherwise than nnU-Net's readers, which do not look at the tag, give them."""
    shown = [f"{_name(path)} {TURNED[tag]}" for path, tag in tags.items() if tag in TURNED]
    if not shown:
        return
    text = f"By its orientation tag, viewers show {some(shown)}. Training sees pixels as they are stored."
    if len({*tags.values()}) > 1:
        text += " The case's other files are tagged otherwise: what was drawn on one as shown does not fit the other."
    fix = (
        "Look at image and label map without the tag. Turn the pixels of what lies wrong, and remove the tag from all."
    )
    add("warning", "orientation_tag", text, fix)


# ------------------------------------------------------------------------------------------------------------- images


def _images(case: _Case) -> tuple[Picture | None, tuple[int, ...] | None, bytes | None]:
    """The first channel (without its voxels), the shape of all, and the digest of all voxels unless they say nothing."""
    files, about, add = case.files, case.about, case.add
    first: Picture | None = None
    shape: tuple[int, ...] | None = None
    whole, n_channels, constant, readable = hashlib.blake2b(digest_size=16), 0, [], True
    for path in (files.images[i] for i in sorted(files.images)):
        picture = case.read(path)
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
            first, shape = case.kept[path], voxels.shape[1:]
            _spacing(picture, path.name, add)
        else:
            _channels_fit(first, shape, picture, path, case)
    if shape is None:
        return None, None, None
    _constant(constant, about, add)
    whole_case = readable and len(files.images) == files.n_images  # otherwise that is a finding of its own
    if about.channels and whole_case and n_channels != len(about.channels):
        named = f"dataset.json names {len(about.channels)} ({', '.join(about.channels)})"
        text = f"The image has {count(n_channels, 'channel')}. {named}."
        add("error", "channel_mismatch", text, "Correct channel_names, or save the image with these channels.")
    return first, shape, None if all(constant) or not whole_case else whole.digest()


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
        add("error", "no_spacing", *picture.no_spacing)
    if picture.flat:
        text = f"{name} is a 2D file. nnU-Net's reader makes it a slice 999 times as thick as its pixels: volumes [ml] are wrong."
        add(
            "warning",
            "flat_volume",
            text,
            "Save it as a volume of one slice (X, Y, 1) with its thickness, and plan in 2D.",
        )


def _channels_fit(first: Picture, shape: tuple[int, ...], picture: Picture, path: Path, case: _Case) -> None:
    """Compare a channel with the first."""
    other = picture.voxels.shape[1:]
    if other != shape:
        text = f"{path.name} has {_size(other)} voxels, the first channel {_size(shape)}. All channels must be equal."
        case.add("error", "shape_mismatch", text, "Resample the channels to one grid.")
    elif first.space and picture.space:
        same = np.allclose(first.space.spacing, picture.space.spacing)  # as nnU-Net's reader asks
        _compared(first, picture, path, f"{path.name} and the first channel", case, tolerant=same)


def _fits(label: Picture, shape: tuple[int, ...], first: Picture | None, case: _Case) -> None:
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
        case.add("error", "shape_mismatch", text, fix)
    elif first and case.files.label:
        _compared(first, label, case.files.label, "Label map and image", case)


def _compared(first: Picture, other: Picture, path: Path, what: str, case: _Case, *, tolerant: bool = True) -> None:
    """Compare where another file's voxels lie with where those of the first channel lie."""
    if not first.space or not other.space:
        return
    difference = compare(first.space, other.space, tolerant=tolerant)
    if difference is not None:
        severity, code, text, fix, harmless = difference
        # NaN would be written as the 0 that it is read as, and a header that says nothing is none to copy.
        safe = harmless and not other.n_not_finite and not first.no_spacing
        mend = Mend("header", (path,), next(iter(case.kept))) if safe else None
        case.add(severity, code, f"{what} {text}", fix, mend)


# -------------------------------------------------------------------------------------------------------------- words


def _hashed(arrays: Sequence[NDArray[Any]]) -> bytes:
    """Digest of values and shape, the same for every type of number that holds them."""
    whole = hashlib.blake2b(digest_size=16)
    for array in arrays:
        whole.update(str(array.shape).encode())
        for part in array:
            whole.update(np.ascontiguousarray(part, np.float32).data)
    return whole.digest()


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _size(shape: Sequence[int]) -> str:
    """Along the file's axes: x first, as viewers show it."""
    sizes = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    return " x ".join(str(n) for n in reversed(sizes))
