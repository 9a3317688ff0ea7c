"""Mended copies of data sets: what `check` found and can be put right beyond doubt. The data sets themselves stay as they are.

A copy is an nnU-Net raw folder of links to all files that do not change. Voxels never change; where a header does, the file is
written again, and read again to see that its voxels are the same.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from concilium.data._check_files import list_files
from concilium.data._check_types import Finding
from concilium.data._itk import read_file, write_file
from concilium.data._raw_folder import link_file
from concilium.errors import DataError, StudyError

FOLDERS = ("imagesTr", "labelsTr")
ABOUT = "dataset.json"


@dataclass(frozen=True)
class Change:
    """What is not in a copy as it was. `file`: below the data set's folder. `code`: of the finding."""

    data_set: str
    code: str
    case: str | None
    file: str
    text: str


def check_free(out: Path, members: Mapping[str, Path]) -> None:
    """Raises `StudyError` where copies of these data sets cannot be put: the folder is not empty, or lies in one of them."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudyError(f"{out} is not empty. Copies need a folder that is empty or not there. Give another --fix.")
    for folder in members.values():
        if out.resolve().is_relative_to(folder.resolve()):
            raise StudyError(f"{out} lies in the data set {folder}, which is to stay as it is. Give another --fix.")


def mend(members: Mapping[str, Path], findings: Sequence[Finding], out: Path) -> tuple[Change, ...]:
    """Write a copy of each of these data sets into `out`/NAME, with what `check` found in them mended where that is safe.

    FIXES.txt and FIXES.json say what changed. Where there is nothing to mend, nothing is written.

    Raises:
        StudyError: `out` is not empty, or lies in one of the data sets.
        DataError: a file cannot be written.
    """
    check_free(out, members)
    safe = [f for f in findings if f.safe]
    if not safe:
        return ()
    changes: list[Change] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
        made = Path(place) / "mended"
        made.mkdir()
        for (name, folder), own in zip(members.items(), folder_names(members), strict=True):
            if folder.is_dir():
                changes += _copy(name, folder, made / own, [f for f in safe if _home(f) == folder])
        (made / "FIXES.txt").write_text(_in_words(changes), encoding="utf-8")
        listed = json.dumps([asdict(c) for c in changes], indent=1, ensure_ascii=False)
        (made / "FIXES.json").write_text(listed + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        made.rename(out)
    return tuple(changes)


def folder_names(members: Mapping[str, Path]) -> list[str]:
    """What each one's copy is called: as the data set, or where that is a path, as its last two folders."""
    names: list[str] = []
    for name in members:
        own = re.sub(r"[^\w.-]+", "_", "_".join(Path(name).parts[-2:])).strip("_.") or "data"
        names.append(own if own not in names else f"{own}_{len(names)}")
    return names


def _home(finding: Finding) -> Path | None:
    """The data set whose files the finding is about."""
    if finding.mend is None:
        return None
    folder = finding.mend.files[0].parent
    return folder.parent if folder.name in FOLDERS else folder


def _in_words(changes: Sequence[Change]) -> str:
    """FIXES.txt: a paragraph per data set."""
    text = "What concilium check --fix changed in these copies. All else is as it was, and the originals were not touched.\n"
    for name in dict.fromkeys(c.data_set for c in changes):
        text += f"\n{name}\n"
        text += "".join(f"  {c.file}: {c.text} ({c.code})\n" for c in changes if c.data_set == name)
    return text


# ----------------------------------------------------------------------------------------------------------- a data set


def _copy(name: str, folder: Path, target: Path, findings: Sequence[Finding]) -> list[Change]:
    """Write the copy of one data set; what is not as it was."""
    mends = [(f, f.mend) for f in findings if f.mend]
    renamed = {path: m.to for _, m in mends if m.how == "rename" and m.to for path in m.files}
    headed = {path: m.to for _, m in mends if m.how == "header" and m.to for path in m.files}
    gone = {str(f.case): f for f, m in mends if m.how == "remove"}
    left_out = {path for _, m in mends if m.how == "remove" for path in m.files}
    left_out |= {folder / part / f"{case}.json" for case in gone for part in FOLDERS}  # the spacing of a stack
    changes = [_told(name, folder, f, path) for f, m in mends if m.how != "count" for path in m.files]
    target.mkdir()
    for path in _files(folder):
        to = target / renamed.get(path, path).relative_to(folder)
        to.parent.mkdir(exist_ok=True)
        if path in headed:
            _write_with_header(path, headed[path], to)
        elif path not in left_out:
            link_file(path, to)
    return changes + _describe(name, target, gone)


def _files(folder: Path) -> Iterator[Path]:
    """Those of the data set, and what lies beside `dataset.json`; other folders are no part of it."""
    for place in (folder, *(folder / part for part in FOLDERS)):
        if place.is_dir():
            yield from sorted(path for path in place.iterdir() if path.is_file())


def _told(name: str, folder: Path, finding: Finding, path: Path) -> Change:
    mend = finding.mend
    if mend is None or mend.to is None:
        text = f"left out. {finding.text}"
    elif mend.how == "rename":
        text = f"renamed to {mend.to.name}"
    else:
        text = f"has spacing, origin and direction of {mend.to.relative_to(folder)} now; its voxels are the same"
    return Change(name, finding.code, finding.case, str(path.relative_to(folder)), text)


def _write_with_header(path: Path, of: Path, target: Path) -> None:
    """Write an image or a label map with the place of another file, and see that its voxels are what they were."""
    try:
        image, place = read_file(path), sitk.ImageFileReader()
        place.SetFileName(str(of))
        place.ReadImageInformation()
        n, m = image.GetDimension(), place.GetDimension()
        k = min(n, m, 3)  # a fourth axis holds channels
        direction = np.array(image.GetDirection()).reshape(n, n)
        direction[:k, :k] = np.array(place.GetDirection()).reshape(m, m)[:k, :k]
        image.SetSpacing([*place.GetSpacing()[:k], *image.GetSpacing()[k:]])
        image.SetOrigin([*place.GetOrigin()[:k], *image.GetOrigin()[k:]])
        image.SetDirection(direction.ravel().tolist())
        write_file(image, target)
        again = read_file(target)
        same = np.array_equal(sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(again))
    except RuntimeError as e:
        raise DataError(
            f"{path} cannot be written with another header ({e}). Free some room, or mend it by hand."
        ) from e
    if not same:
        raise DataError(
            f"{path} changed when it was written with another header. Its voxels must not. Mend it by hand."
        )


def _describe(name: str, target: Path, gone: Mapping[str, Finding]) -> list[Change]:
    """Make `dataset.json` say what is there: nothing of cases that are gone, and the number of cases if it says one."""
    path = target / ABOUT
    settings = _settings(path)
    if settings is None:
        return []
    changes = []
    stated = settings.get("numTraining")
    for key in ("patient", "annotated"):
        table = settings[key] if isinstance(settings.get(key), dict) else {}
        for case in sorted(gone.keys() & table.keys()):
            del table[case]
            changes.append(Change(name, gone[case].code, case, ABOUT, f"{case} taken out of the table {key}"))
    n = sum(case.whole for case in list_files(name, target).cases)
    if type(stated) is int and stated != n:
        settings["numTraining"] = n
        text = f"numTraining is {n} now, the number of complete cases; it was {stated}"
        changes.append(Change(name, "case_count", None, ABOUT, text))
    if changes:
        path.unlink()  # it is the original's file
        path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return changes


def _settings(path: Path) -> dict[str, Any] | None:
    """What the file holds; None where it is of no use."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None
