"""Some cases of a data set as an nnU-Net raw folder of their own: linked where nothing changes, written where something does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from concilium.data._itk import read_file, write_file
from concilium.data._label_counts import ids_of
from concilium.data.dataset import Case, Dataset, read_case
from concilium.data.shifts import Key, Shift, shift_case
from concilium.errors import DataError


@dataclass(frozen=True)
class _Change:
    """What is done to a case on its way. `ids`: those that stay in its label map."""

    shift: Shift | None
    ids: frozenset[int] | None


def write_raw_folder(
    target: Path,
    source: Dataset,
    patients: Mapping[str, str],
    *,
    annotated: tuple[str, ...] | None,
    shift: Shift | None,
    key: Key,
) -> None:
    """Write the cases of `patients` (case -> patient). A case that cannot be used is linked as it is: its site will say why.

    Args:
        annotated: labels that label maps keep, and `ignore`; the others become background. `None`: all.
        key: (seed, site), which random shifts depend on.

    Raises:
        DataError: a case can be read but not be written.
    """
    ids = None
    if annotated is not None:
        kept = [value for name, value in source.labels.items() if name in (*annotated, "ignore")]
        ids = frozenset(i for value in kept for i in ids_of(value))
    change = _Change(None if shift == Shift() else shift, ids)
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True)
    files = _files_by_case(source)
    whole = {case.name: case for case in source.cases}
    for name in sorted(patients):
        links = {path: target / path.parent.name / path.name for path in files[name]}
        if name in whole and (change.shift or change.ids is not None):
            _write_changed(whole[name], source, links, change, (*key, name))
        for path, link in links.items():
            if not link.exists():
                link_file(path, link)
    about = json.loads((source.folder / "dataset.json").read_text(encoding="utf-8"))
    about["numTraining"] = len(patients)
    if "patient" in about:
        about["patient"] = {case: about["patient"][case] for case in sorted(patients) if case in about["patient"]}
    kept_names = [name for name in source.labels if annotated is None or name in annotated]
    if isinstance(about.get("annotated"), dict):  # what it says of a case is not widened
        table = {case: [n for n in names if n in kept_names] for case, names in about["annotated"].items()}
        others = () if annotated is None else patients
        whole_list = {case: [n for n in kept_names if n != "ignore"] for case in others}
        about["annotated"] = {case: names for case, names in {**whole_list, **table}.items() if case in patients}
    elif annotated is not None:
        about["annotated"] = kept_names
    (target / "dataset.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _files_by_case(source: Dataset) -> dict[str, list[Path]]:
    """Every file of every case, also of those that lack one."""
    files: dict[str, list[Path]] = {}
    end = len(source.file_ending)
    for folder, suffix in (("imagesTr", len("_0000")), ("labelsTr", 0)):
        for path in sorted((source.folder / folder).iterdir()):
            if path.name.endswith(source.file_ending) and not path.name.startswith("."):
                files.setdefault(path.name[: -end - suffix], []).append(path)
    return files


def _write_changed(case: Case, source: Dataset, links: Mapping[Path, Path], change: _Change, key: Key) -> None:
    """Write the files of this case that change."""
    try:
        read_case(case, source)
    except DataError:
        return
    label = case.label
    if label is None:
        return
    try:
        if change.shift is not None:
            images = [(path, links[path]) for path in case.images]
            shift_case(images, (label, links[label]), change.shift, key=key)
        if change.ids is not None:
            _reduce(links[label] if links[label].exists() else label, links[label], change.ids)
    except RuntimeError as e:
        raise DataError(
            f"Case {case.name} cannot be written with its changes ({e}). Expected room on the disk, and numbers that a "
            f"{source.file_ending} file can hold. Free some room, or convert the images."
        ) from e


def _reduce(path: Path, target: Path, ids: frozenset[int]) -> None:
    """The label map with the ids that stay; nothing is written where all do."""
    image = read_file(path)
    array = sitk.GetArrayFromImage(image)
    stays = np.isin(array, sorted(ids))
    if stays[array != 0].all():
        return
    reduced = sitk.GetImageFromArray(np.where(stays, array, 0).astype(array.dtype))
    reduced.CopyInformation(image)
    write_file(reduced, target)


def link_file(path: Path, link: Path) -> None:
    """A second name for a file: a hard link, else a symbolic one, else a copy."""
    path = path.resolve()
    for way in (os.link, os.symlink, shutil.copyfile):
        try:
            way(path, link)
            return
        except OSError as e:
            failure = e
    raise DataError(f"{path} cannot be linked or copied to {link} ({failure}). Free some room there.") from failure
