"""`dataset.json` of an nnU-Net raw folder, as far as Concilium uses it. Whatever is wrong is a `DataError`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concilium.data.labels import Labels, foreground, from_nnunet
from concilium.errors import DataError

READERS: Mapping[str, str] = {
    ".nii.gz": "SimpleITKIO",
    ".nii": "SimpleITKIO",
    ".nrrd": "SimpleITKIO",
    ".mha": "SimpleITKIO",
    ".gipl": "SimpleITKIO",
    ".png": "NaturalImage2DIO",
    ".bmp": "NaturalImage2DIO",
    ".tif": "NaturalImage2DIO",
    ".tiff": "Tiff3DIO",
}
"""File ending -> nnU-Net's reader."""
ALSO: Mapping[str, str] = {".nii.gz": "NibabelIO", ".nii": "NibabelIO", ".tif": "Tiff3DIO"}
"""Another one that a `dataset.json` may name: the first gives the same arrays, the second is tried where the pictures' fails."""
FLAT = (999, 1, 1)
"""What nnU-Net's reader of pictures gives for a spacing that is not known."""


@dataclass(frozen=True)
class Description:
    """What `dataset.json` says. `patients`: case -> patient, for the cases that it names.

    `annotated`: the labels that were looked for, in all cases, or by case for those that it names; `None`: all, in all.
    """

    channels: tuple[str, ...]
    labels: Labels
    file_ending: str
    patients: Mapping[str, str]
    annotated: tuple[str, ...] | Mapping[str, tuple[str, ...]] | None = None

    @property
    def by_case(self) -> Mapping[str, tuple[str, ...]]:
        """The labels that were looked for in the cases that a table names; empty where there is no such table."""
        return self.annotated if isinstance(self.annotated, Mapping) else {}

    def annotated_in(self, case: str) -> tuple[str, ...] | None:
        """The labels that were looked for in this case; `None`: all."""
        return self.annotated.get(case) if isinstance(self.annotated, Mapping) else self.annotated


def read_description(folder: Path) -> Description:
    """What the `dataset.json` of this folder says; `numTraining` is not looked at.

    Raises:
        DataError: there is none, or it cannot be used.
    """
    settings = _settings(folder)
    patients = settings.get("patient", {})
    if not isinstance(patients, dict):
        raise _wrong(folder, "patient", patients, "a table from case to patient", "Write it so, or remove it")
    labels = _labels(settings, folder)
    return Description(
        _channels(settings, folder),
        labels,
        _file_ending(settings, folder),
        {case: str(patient) for case, patient in patients.items()},
        _annotated(settings, labels, folder),
    )


def require_cases(about: Description, cases: Collection[str], folder: Path) -> None:
    """Check that the table `annotated` names cases that are there: a misspelt one would count as annotated in full.

    Raises:
        DataError: it names others.
    """
    if unknown := sorted(set(about.by_case) - set(cases)):
        raise DataError(
            f"{folder / 'dataset.json'}: annotated names {len(unknown)} cases that are not there: {', '.join(unknown[:5])}. "
            f"Allowed are the {len(cases)} cases of imagesTr and labelsTr: {', '.join(sorted(cases)[:5])}, ... Correct or remove "
            "these names: a case that the table leaves out counts as annotated in full."
        )


def read_channels(folder: Path) -> tuple[str, ...]:
    """The channels alone, for images that are there to be segmented.

    Raises:
        DataError: there is no `dataset.json`, or it does not tell them.
    """
    return _channels(_settings(folder), folder)


def spacing_file(path: Path, *, channel: bool) -> Path:
    """Where nnU-Net's `Tiff3DIO` looks for the spacing of an image (of which this is a channel) or of a label map."""
    stem = path.name[: -len(path.suffix)]
    return path.with_name((stem[: -len("_0000")] if channel else stem) + ".json")


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise DataError(f"{folder} has no dataset.json. Expected an nnU-Net raw folder. Check the path.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path} cannot be read ({e}). It must be JSON. Repair it.") from e
    if not isinstance(settings, dict):
        raise DataError(
            f"{path} holds a {type(settings).__name__}. Expected an object with channel_names and labels. Repair it."
        )
    return settings


def _wrong(folder: Path, key: str, given: object, allowed: str, remedy: str) -> DataError:
    return DataError(f"{folder / 'dataset.json'}: {key} is {given!r}. Allowed is {allowed}. {remedy}.")


def _channels(settings: dict[str, Any], folder: Path) -> tuple[str, ...]:
    given = settings.get("channel_names")
    allowed = 'a table like {"0": "MRI"}, numbered from 0'
    if not isinstance(given, dict) or not given or not all(isinstance(v, str) and v for v in given.values()):
        raise _wrong(folder, "channel_names", given, allowed, "Write it so (older data sets call it modality)")
    try:
        ordered = dict(sorted((int(k), v) for k, v in given.items()))
    except ValueError as e:
        raise _wrong(folder, "channel_names", given, allowed, "Number the channels") from e
    if list(ordered) != list(range(len(given))):
        raise _wrong(folder, "channel_names", given, allowed, "Number the channels without a gap")
    return tuple(ordered.values())


def _labels(settings: dict[str, Any], folder: Path) -> Labels:
    allowed = (
        'a table like {"background": 0, "tumour": 1}, numbered from 0 without a gap; a region is a list of ids; '
        '"ignore" may be the highest'
    )
    try:
        return from_nnunet(settings)
    except ValueError as e:
        raise _wrong(folder, "labels", settings.get("labels"), allowed, str(e)) from e


def _annotated(
    settings: dict[str, Any], labels: Labels, folder: Path
) -> tuple[str, ...] | Mapping[str, tuple[str, ...]] | None:
    given = settings.get("annotated")
    if given is None:
        return None
    known = tuple(foreground(labels))
    lists = given.values() if isinstance(given, dict) else [given]
    if not all(isinstance(names, list) and all(name in known for name in names) for names in lists):
        allowed = f"a list of labels ({', '.join(known)}), or a table from case to such a list"
        raise _wrong(folder, "annotated", given, allowed, "Correct it, or remove it where every label was looked for")
    if isinstance(given, dict):
        return {case: tuple(names) for case, names in given.items()}
    return tuple(given)


def _file_ending(settings: dict[str, Any], folder: Path) -> str:
    given = settings.get("file_ending")
    if not isinstance(given, str) or given not in READERS:
        raise _wrong(folder, "file_ending", given, f"one of {', '.join(READERS)}", "Correct it, or convert the images")
    key, names = "overwrite_image_reader_writer", [READERS[given], *([ALSO[given]] if given in ALSO else [])]
    named = settings.get(key, "None")
    if named not in ("None", *names):
        raise _wrong(folder, key, named, f"{' or '.join(names)} for {given}", "Remove it: images are read as they lie")
    return given
