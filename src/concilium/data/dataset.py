"""nnU-Net raw folder -> cases -> arrays. Reading goes through nnU-Net's readers; whatever is wrong is a `DataError`.

A folder holds `dataset.json`, `imagesTr/<case>_<channel>.<ending>` (channel: four digits) and `labelsTr/<case>.<ending>`. Beyond
nnU-Net's own keys, `dataset.json` may hold `patient`: a table from case to patient, the unit that folds never divide.
nnU-Net is imported where it is first needed, so that listing a folder stays quick.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.data._description import READERS, read_description
from concilium.data._nifti import is_nifti, scan
from concilium.errors import DataError, StudyError


@dataclass(frozen=True)
class Case:
    """One image with its label map. `images`: one file per channel, or one file that holds them all."""

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str


@dataclass(frozen=True)
class Dataset:
    """A site's cases, sorted by name. `missing`: (case, `missing_channel` | `missing_label`) for those set aside."""

    folder: Path
    channels: tuple[str, ...]
    labels: Mapping[str, int]
    file_ending: str
    cases: tuple[Case, ...]
    missing: tuple[tuple[str, str], ...]
    patients_known: bool = True
    """Whether `dataset.json` names the patient of every case."""


def open_dataset(folder: str | Path) -> Dataset:
    """The cases of an nnU-Net raw folder; no image is read.

    `numTraining` is not looked at: the files decide.

    Raises:
        DataError: no such folder, a `dataset.json` that cannot be used, a file whose name says no channel, or no complete case.
    """
    folder = Path(folder)
    about = read_description(folder)
    channels, ending = about.channels, about.file_ending
    for name in ("imagesTr", "labelsTr"):
        if not (folder / name).is_dir():
            raise DataError(
                f"{folder} has no folder {name}. An nnU-Net raw folder holds imagesTr and labelsTr. Add it."
            )
    images = _images(folder / "imagesTr", channels, ending)
    segmented = {_stem(path, ending): path for path in _files(folder / "labelsTr", ending)}
    cases, missing = [], []
    for name in sorted({*images, *segmented}):
        files, label = images.get(name), segmented.get(name)
        if files is None:
            missing.append((name, "missing_channel"))
        elif label is None:
            missing.append((name, "missing_label"))
        else:
            cases.append(Case(name, files, label, about.patients.get(name, name)))
    if not cases:
        raise DataError(
            f"{folder} has no complete case ({len(missing)} lack a file). Expected imagesTr/<case>_0000{ending} for each of "
            f"{len(channels)} channels and labelsTr/<case>{ending}. Check the names and file_ending in dataset.json."
        )
    return Dataset(
        folder,
        channels,
        about.labels,
        ending,
        tuple(cases),
        tuple(missing),
        all(c.name in about.patients for c in cases),
    )


def list_images(folder: str | Path, channels: Sequence[str], file_ending: str) -> tuple[Case, ...]:
    """The images of a folder as cases without label, sorted by name, for prediction.

    Raises:
        DataError: no such folder, no image in it, or a case that lacks a channel.
    """
    folder = Path(folder)
    reader(file_ending)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Expected one with <case>_0000{file_ending}. Check the path.")
    found = _images(folder, channels, file_ending)
    short = [name for name, files in found.items() if files is None]
    if short:
        raise DataError(
            f"{len(short)} of {len(found)} cases in {folder} lack a channel ({_some(short)}). Each needs {len(channels)} "
            f"({', '.join(channels)}). Add the files or move these cases away.",
            code="missing_channel",
        )
    if not found:
        raise DataError(
            f"{folder} has no image. Expected <case>_0000{file_ending}. Check the folder and the file ending."
        )
    return tuple(Case(name, files, None, name) for name, files in sorted(found.items()) if files is not None)


def reader(file_ending: str) -> Any:
    """nnU-Net's reader class for this file ending.

    Raises:
        DataError: no reader is known for it.
    """
    if file_ending not in READERS:
        raise DataError(
            f"Files end in {file_ending!r}. Known are: {', '.join(READERS)}. Convert the images to one of them."
        )
    from concilium import nnunet_parts  # brings torch along: some seconds

    return getattr(nnunet_parts, READERS[file_ending])


def read_case(case: Case, dataset: Dataset) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, dict[str, Any]]:
    """Image (C, X, Y, Z), label map (1, X, Y, Z) or None, and the reader's properties, with `spacing` [mm] along X, Y, Z.

    Both arrays are float32, axes as nnU-Net orders them (the file's last axis first); a 2D image has X = 1. Voxels that are not
    finite are refused, in NIfTI files too, where the library underneath would replace them by 0.

    Raises:
        DataError: with `code` `unreadable`, `shape_mismatch` (channels differ in shape), `channel_mismatch`, `not_finite`,
            `geometry_mismatch` (image and label map differ in shape, or channels in spacing) or `unknown_label`.
    """
    image, properties = _read(case.images, dataset.file_ending, case.name)
    if len(image) != len(dataset.channels):
        raise DataError(
            f"Case {case.name} has {len(image)} channels. dataset.json names {len(dataset.channels)} "
            f"({', '.join(dataset.channels)}). Correct channel_names or the files.",
            code="channel_mismatch",
        )
    if not np.isfinite(image).all():
        raise DataError(
            f"Case {case.name} has voxels that are not finite. All must be. Repair the image.", code="not_finite"
        )
    if case.label is None:
        return image, None, properties
    label, _ = _read((case.label,), dataset.file_ending, case.name)
    _check_label(case.name, image, label, dataset.labels)
    return image, label, properties


def folds(patients: Sequence[str], n_folds: int, fold: int) -> set[str]:
    """The patients that fold `fold` validates on: nnU-Net's split of the sorted patients (5 folds, seed 12345, as it does).

    Fewer patients than folds give as many folds as patients, and the fold is taken modulo; one patient gives no validation.

    Raises:
        StudyError: fewer than two folds, or a fold that does not exist.
    """
    if n_folds < 2 or not 0 <= fold < n_folds:
        raise StudyError(
            f"Fold {fold} of {n_folds} was asked for. Allowed are 2 or more folds, counted from 0. Correct [validation]."
        )
    unique = sorted(set(patients))
    if len(unique) < 2:
        return set()
    from concilium.nnunet_parts import generate_crossval_split

    n = min(n_folds, len(unique))
    split = generate_crossval_split(unique, seed=12345, n_splits=n)
    return {str(patient) for patient in split[fold % n]["val"]}


def content_key(case: Case, dataset: Dataset) -> str:
    """BLAKE2 digest (64 hex digits) of the bytes of the case's files and of the channel and label definition; names do not count.

    Raises:
        DataError: a file cannot be read (`unreadable`).
    """
    definition = {"channels": list(dataset.channels), "labels": dict(dataset.labels), "ending": dataset.file_ending}
    whole = hashlib.blake2b(json.dumps(definition, sort_keys=True).encode(), digest_size=32)
    for path in (*case.images, case.label):
        whole.update(b"label" if path is case.label else b"image")
        if path is None:
            continue
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as e:
            raise _unreadable(case.name, path, e) from e
    return whole.hexdigest()


# -------------------------------------------------------------------------------------------------------------- files


def _files(folder: Path, ending: str) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith(ending) and not p.name.startswith("."))


def _stem(path: Path, ending: str) -> str:
    return path.name[: -len(ending)]


def _images(folder: Path, channels: Sequence[str], ending: str) -> dict[str, tuple[Path, ...] | None]:
    """The files of each case in the order of the channels; None where one is missing."""
    found: dict[str, dict[int, Path]] = {}
    for path in _files(folder, ending):
        match = re.fullmatch(r"(.+)_(\d{4})", _stem(path, ending))
        if match is None or int(match[2]) >= len(channels):
            raise DataError(
                f"{path} is no channel of a case. Allowed are <case>_0000{ending} to <case>_{len(channels) - 1:04d}{ending} for "
                f"{', '.join(channels)}. Rename the file, or correct channel_names."
            )
        found.setdefault(match[1], {})[int(match[2])] = path
    # nnU-Net's reader of natural images takes a colour file apart; if no case has a second file, that is what is meant.
    coloured = (
        READERS[ending] == "NaturalImage2DIO" and len(channels) in (3, 4) and all(set(f) == {0} for f in found.values())
    )
    n = 1 if coloured else len(channels)
    return {
        name: tuple(f[i] for i in range(n)) if set(f) == set(range(n)) else None for name, f in sorted(found.items())
    }


# ------------------------------------------------------------------------------------------------------------- arrays


def _read(paths: Sequence[Path], ending: str, name: str) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """What the reader makes of these files; the reason, where it fails, is found by reading them one by one."""
    read = reader(ending)().read_images
    for path in paths:
        _check_whole(path, name)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            image, properties = read([str(p) for p in paths])
            return image, properties
        except Exception as e:
            failure = e
        single = []
        for path in paths:
            try:
                single.append(read([str(path)]))
            except Exception as e:
                raise _unreadable(name, path, e) from e
    shapes = {image.shape[1:] for image, _ in single}
    if len(shapes) > 1:
        raise DataError(
            f"Channels of case {name} have shapes {sorted(shapes)}. All must be equal. Resample them.",
            code="shape_mismatch",
        )
    spacings = [tuple(float(s) for s in properties["spacing"]) for _, properties in single]
    if not np.allclose(spacings[0], spacings):
        raise DataError(
            f"Channels of case {name} have spacings {spacings} mm. All must be equal. Resample them.",
            code="geometry_mismatch",
        )
    raise _unreadable(name, paths[0], failure) from failure


def _check_whole(path: Path, name: str) -> None:
    """Check what SimpleITK says nothing about: it fills what a cut-off file lacks with 0, and puts 0 where NIfTI has NaN."""
    try:
        payload = scan(path) if is_nifti(path) else None
    except (OSError, EOFError, zlib.error) as e:
        raise _unreadable(name, path, e) from e
    if payload and payload.n_missing:
        raise _unreadable(name, path, EOFError(f"{payload.n_missing} bytes of voxels are missing"))
    if payload and payload.n_not_finite:
        raise DataError(
            f"Case {name}: {payload.n_not_finite} voxels of {path} are not finite. All must be. Repair the file.",
            code="not_finite",
        )


def _unreadable(name: str, path: Path, error: Exception) -> DataError:
    return DataError(f"Case {name}: {path} cannot be read ({error}). Replace the file.", code="unreadable")


def _check_label(name: str, image: NDArray[Any], label: NDArray[Any], labels: Mapping[str, int]) -> None:
    if len(label) != 1:
        raise DataError(
            f"The label map of case {name} has {len(label)} channels. Allowed is 1. Save it as ids, not as colours.",
            code="channel_mismatch",
        )
    if label.shape[1:] != image.shape[1:]:
        raise DataError(
            f"Case {name} has an image of {image.shape[1:]} voxels and a label map of {label.shape[1:]}. Both must be equal. "
            "Resample the label map to the image.",
            code="geometry_mismatch",
        )
    if not np.isfinite(label).all():
        raise DataError(f"The label map of case {name} is not finite. It must hold ids. Repair it.", code="not_finite")
    known = np.zeros(label.shape, dtype=bool)
    for value in labels.values():
        known |= label == value
    if not known.all():
        unknown = [f"{v:g}" for v in np.unique(label[~known])]
        raise DataError(
            f"The label map of case {name} holds {_some(unknown)}. dataset.json knows "
            f"{', '.join(f'{k} = {v}' for k, v in labels.items())}. Correct one of them.",
            code="unknown_label",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
