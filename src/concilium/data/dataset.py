"""nnU-Net raw folder -> cases -> arrays. Reading goes through nnU-Net's readers; whatever is wrong is a `DataError`.

A folder holds `dataset.json`, `imagesTr/<case>_<channel>.<ending>` (channel: four digits) and `labelsTr/<case>.<ending>`. Beyond
nnU-Net's own keys, `dataset.json` may hold `patient`: a table from case to patient, the unit that folds never divide; and
`annotated`: the labels that were looked for.
nnU-Net is imported where it is first needed, so that listing a folder stays quick.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.data._description import FLAT, Description, read_description, require_cases, spacing_file
from concilium.data._names import files_in, images_in, stem
from concilium.data._reading import check_label, read_files, read_label, reader, unreadable
from concilium.data.labels import Labels, foreground, has_regions, unknown_ids
from concilium.data.matching import Names, Space, Translation, renamed, translate
from concilium.errors import DataError, StudyError

__all__ = [
    "Case",
    "Dataset",
    "content_key",
    "folds",
    "open_dataset",
    "pixel_size",
    "read_case",
    "reader",
    "restricted",
    "translated",
]


@dataclass(frozen=True)
class Case:
    """One image with its label map. `images`: one file per channel, or one file that holds them all."""

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str
    annotated: tuple[str, ...] | None = None
    """The labels that were looked for; `None`: all. To the others every voxel is unknown, whatever the label map says."""


@dataclass(frozen=True)
class Dataset:
    """A site's cases, sorted by name. `missing`: (case, `missing_channel` | `missing_label`) for those set aside."""

    folder: Path
    channels: tuple[str, ...]
    labels: Labels
    file_ending: str
    cases: tuple[Case, ...]
    missing: tuple[tuple[str, str], ...]
    patients_known: bool = True
    """Whether `dataset.json` names the patient of every case."""
    left_out: int = 0
    """How many cases count as annotated in full because the table `annotated` does not name them."""
    translation: Translation | None = None
    """What is done to the files as they are read, so that channels and ids are those above."""

    @property
    def space(self) -> Space:
        """Channels, labels, and what was looked for in some case."""
        each = [case.annotated for case in self.cases]
        known = None if None in each else tuple(dict.fromkeys(n for names in each if names is not None for n in names))
        return Space(self.channels, self.labels, known)


def open_dataset(folder: str | Path, names: Names | None = None, *, labelled: bool = True) -> Dataset:
    """The cases of an nnU-Net raw folder, its labels and channels called as `names` says; no image is read.

    `numTraining` is not looked at: the files decide. Where the data set is not `labelled`, nor are its label maps.

    Raises:
        DataError: no such folder, a `dataset.json` that cannot be used, a file whose name says no channel, no complete case, or
            a table `annotated` that names a case which is not there.
    """
    folder = Path(folder)
    about = read_description(folder)
    channels, ending = about.channels, about.file_ending
    for name in ("imagesTr", "labelsTr") if labelled else ("imagesTr",):
        if not (folder / name).is_dir():
            raise DataError(
                f"{folder} has no folder {name}. An nnU-Net raw folder holds imagesTr and labelsTr. Add it."
            )
    images = images_in(folder / "imagesTr", channels, ending)
    segmented = {stem(path, ending): path for path in files_in(folder / "labelsTr", ending)} if labelled else {}
    require_cases(about, {*images, *segmented}, folder)
    cases, missing = [], []
    for name in sorted({*images, *segmented}):
        files, label = images.get(name), segmented.get(name)
        if files is None:
            missing.append((name, "missing_channel"))
        elif label is None and labelled:
            missing.append((name, "missing_label"))
        else:
            cases.append(Case(name, files, label, about.patients.get(name, name), about.annotated_in(name)))
    if not cases:
        raise DataError(
            f"{folder} has no complete case ({len(missing)} lack a file). Expected imagesTr/<case>_0000{ending} for each of "
            f"{len(channels)} channels and labelsTr/<case>{ending}. Check the names and file_ending in dataset.json."
        )
    names = names or Names()
    space = renamed(Space(channels, about.labels), names, str(folder))
    cases = [replace(case, annotated=_annotated(case, names, about)) for case in cases]
    known = all(case.name in about.patients for case in cases)
    left_out = sum(case.annotated is None for case in cases) if about.by_case else 0
    return Dataset(folder, space.channels, space.labels, ending, tuple(cases), tuple(missing), known, left_out)


def _annotated(case: Case, names: Names, about: Description) -> tuple[str, ...] | None:
    """What was looked for in the case, in the study's words.

    The study goes before a list for all cases. It does not know single cases: what a table says of one is never widened.
    """
    own = None if case.annotated is None else tuple(names.labels.get(name, name) for name in case.annotated)
    if names.annotated is None:
        return own
    return names.annotated if own is None or not about.by_case else tuple(n for n in names.annotated if n in own)


def translated(dataset: Dataset, study: Space) -> Dataset:
    """The data set with the study's channels and ids: its files are re-mapped by name as they are read.

    Raises:
        DataError: the names differ (`sites_differ`).
    """
    translation = translate(dataset.space, study, where=str(dataset.folder))
    every, cases = set(foreground(study.labels)), dataset.cases
    if study.annotated is None:  # these are all labels that there are, not only those of one site
        cases = tuple(
            c if c.annotated is None or every - set(c.annotated) else replace(c, annotated=None) for c in cases
        )
    return replace(dataset, channels=study.channels, labels=study.labels, translation=translation, cases=cases)


def restricted(dataset: Dataset, channels: Sequence[str], *, labels: Labels | None = None) -> Dataset:
    """The data set with these of its channels only; with none the first, for its geometry. `labels`: in place of its own.

    Raises:
        DataError: it has no such channel (`sites_differ`), or all channels lie in one file (`channel_mismatch`).
    """
    if lacking := [name for name in channels if name not in dataset.channels]:
        raise DataError(
            f"{dataset.folder} has channels {', '.join(dataset.channels)}, not {', '.join(lacking)}. Allowed to hold: those it "
            "has. Correct holds in the site's table of the study, or channel_names in dataset.json.",
            code="sites_differ",
        )
    if any(len(case.images) != len(dataset.channels) for case in dataset.cases):
        raise DataError(
            f"{dataset.folder} has its {len(dataset.channels)} channels in one file a case. Expected one file a channel "
            "(CASE_0000, CASE_0001, ...), since sites hold single ones. Save them so.",
            code="channel_mismatch",
        )
    places = [dataset.channels.index(name) for name in channels] or [0]
    cases = tuple(replace(c, images=tuple(c.images[i] for i in places)) for c in dataset.cases)
    known = dataset.labels if labels is None else labels
    return replace(dataset, channels=tuple(dataset.channels[i] for i in places), labels=known, cases=cases)


def read_case(case: Case, dataset: Dataset) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, dict[str, Any]]:
    """Image (C, X, Y, Z), label map (1, X, Y, Z) or None, and the reader's properties, with `spacing` [mm] along X, Y, Z.

    Both arrays are float32, axes as nnU-Net orders them (the file's last axis first); a 2D image has X = 1. Voxels that are not
    finite are refused, in NIfTI files too, where the library underneath would replace them by 0.

    Raises:
        DataError: with `code` `unreadable`, `shape_mismatch` (channels differ in shape), `channel_mismatch`, `not_finite`,
            `geometry_mismatch` (image and label map differ in shape, or channels in spacing) or `unknown_label`.
    """
    image, properties = read_files(case.images, dataset.file_ending, case.name)
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
    how = dataset.translation
    if how is not None and how.moves_channels:
        image = image[list(how.channels)]
    if case.label is None:
        return image, None, properties
    label = read_label(case.label, dataset.file_ending, case.name)
    check_label(case.name, image, label, dataset.labels if how is None else how.own)
    moved = _moved(label, how)
    if case.annotated is not None and (unknown := unknown_ids(dataset.labels, case.annotated)):
        moved = np.where(np.isin(moved, unknown), np.float32(0), moved)
    return image, moved, properties


def _moved(label: NDArray[np.float32], how: Translation | None) -> NDArray[np.float32]:
    """The label map with the study's ids."""
    if how is None or not how.moves_ids:
        return label
    table = np.zeros(max(how.ids) + 1, np.float32)
    table[list(how.ids)] = list(how.ids.values())
    return table[label.astype(np.intp)]


def pixel_size(case: Case, dataset: Dataset, properties: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Size of a voxel [mm] along X, Y, Z; None where the files do not tell it. A 2D image counts as 1 mm thick.

    nnU-Net's readers make numbers up for what is not told: 1 for pixels, and 999 pixels for the thickness of a 2D image.
    """
    spacing = tuple(properties["spacing"])
    tiff = dataset.file_ending in (".tif", ".tiff")
    if dataset.file_ending in (".png", ".bmp") or (tiff and spacing == FLAT):
        return None
    if tiff and not spacing_file(case.images[0], channel=True).is_file():
        return None
    if len(properties.get("sitk_stuff", {}).get("spacing", spacing)) == 2:
        spacing = (1.0, *spacing[1:])
    # headers hold float32: without rounding, a distance equal to a tolerance may fall on either side of it
    return tuple(round(float(s), 6) for s in spacing)


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
    definition: dict[str, Any] = {
        "channels": list(dataset.channels),
        "labels": dict(dataset.labels),
        "ending": dataset.file_ending,
    }
    how = dataset.translation
    if has_regions(dataset.labels):  # where patches are drawn depends on the order of the regions
        definition["regions"] = list(dataset.labels)
    if case.annotated is not None:
        definition["annotated"] = sorted(case.annotated)
    if how is not None and how.notes:
        definition |= {"order": list(how.channels), "ids": list(how.ids.items())}
    whole = hashlib.blake2b(json.dumps(definition, sort_keys=True).encode(), digest_size=32)
    for path in (*case.images, case.label):
        whole.update(b"label" if path is case.label else b"image")
        if path is None:
            continue
        try:
            about = path.stat()
            whole.update(_digest(path, about.st_size, about.st_mtime_ns, about.st_ino))
        except OSError as e:
            raise unreadable(case.name, path, e) from e
    beside = spacing_file(case.images[0], channel=True)
    if dataset.file_ending in (".tif", ".tiff") and beside.is_file():
        whole.update(beside.read_bytes())
    return whole.hexdigest()


@functools.lru_cache(maxsize=1 << 16)  # a study with many seeds and folds asks for the same files again and again
def _digest(path: Path, size: int, changed: int, number: int) -> bytes:
    """Digest of a file's bytes; size, time of change and number tell one version of the file from another."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
