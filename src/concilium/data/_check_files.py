"""`check`, before any image is read: `dataset.json`, and the names of the files. Whatever is wrong is a finding."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from concilium.data._check_types import About, Files, Finding, Listing, count, some
from concilium.data._description import READERS, read_description
from concilium.errors import DataError

Add = Callable[..., None]
SIDECARS = {"desktop.ini", "thumbs.db"}


def list_files(site: str, folder: Path) -> Listing:
    """The cases of a data set by its files' names, and what is wrong with these and with `dataset.json`."""
    found: list[Finding] = []

    def add(severity: Any, code: str, text: str, fix: str, case: str | None = None) -> None:
        found.append(Finding(severity, code, site, case, text, fix))

    if not folder.is_dir():
        add("error", "no_data_set", f"{folder} is no folder. Expected an nnU-Net raw folder.", "Correct the path.")
        return Listing(site, folder, About(), (), tuple(found))
    about = _about(folder, add)
    folders = {name: _names(folder / name, add) for name in ("imagesTr", "labelsTr")}
    ending = about.ending or _likely_ending(folders["imagesTr"])
    if ending is None:
        return Listing(site, folder, about, (), tuple(found))
    images = _sorted_images(folders["imagesTr"], ending, about, add)
    labels = _sorted_labels(folders["labelsTr"], ending, images, add)
    n_channels = _n_files(images, about, ending)
    cases = [Files(name, images.get(name, {}), labels.get(name), n_channels) for name in sorted({*images, *labels})]
    told = {f.case for f in found if f.code == "unknown_file"}  # what such a case lacks is that file
    for case in (c for c in cases if c.name not in told):
        _complete(case, ending, about, add)
    whole = [c for c in cases if c.images and c.label]
    if not whole and not any(f.code == "no_data_set" for f in found):
        text = f"{folder} has no complete case. Expected imagesTr/CASE_0000{ending} with labelsTr/CASE{ending}."
        add("error", "no_training_cases", text, "Check the files' names, and file_ending in dataset.json.")
    _counts(about, cases, len(whole), add)
    return Listing(site, folder, about, tuple(cases), tuple(found))


# ------------------------------------------------------------------------------------------------------- dataset.json


def _about(folder: Path, add: Add) -> About:
    """What can be made out; what Concilium itself says of the file is a finding."""
    try:
        read_description(folder)
    except DataError as e:
        what, _, fix = str(e).strip().removesuffix(".").rpartition(". ")
        add("error", "dataset_json", f"{what}." if what else str(e), f"{fix}.")
    try:
        settings = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return About()
    if not isinstance(settings, dict):
        return About()
    ending, patients, annotated = (settings.get(k) for k in ("file_ending", "patient", "annotated"))
    stated = settings.get("numTraining")
    return About(
        _channels(settings.get("channel_names")),
        _labels(settings.get("labels")),
        ending if isinstance(ending, str) and ending in READERS else None,
        {str(c): str(p) for c, p in patients.items()} if isinstance(patients, dict) else {},
        tuple(map(str, annotated)) if isinstance(annotated, list) else None,
        stated if isinstance(stated, int) else None,
    )


def _channels(given: object) -> tuple[str, ...] | None:
    if not isinstance(given, Mapping) or not given or not all(str(k).isdecimal() for k in given):
        return None
    return tuple(str(given[k]) for k in sorted(given, key=int))


def _labels(given: object) -> dict[str, tuple[int, ...]] | None:
    if not isinstance(given, Mapping):
        return None
    ids = {str(name): tuple(v) if isinstance(v, list) else (v,) for name, v in given.items()}
    return ids if ids and all(type(i) is int for several in ids.values() for i in several) else None


# -------------------------------------------------------------------------------------------------------------- files


def _names(folder: Path, add: Add) -> list[Path]:
    if not folder.is_dir():
        text = f"{folder.parent} has no folder {folder.name}. An nnU-Net raw folder holds imagesTr and labelsTr."
        add("error", "no_data_set", text, "Add it, or correct the path.")
        return []
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in SIDECARS)


def _likely_ending(paths: Iterable[Path]) -> str | None:
    """The ending that most files have, where `dataset.json` does not say."""
    endings = Counter(e for p in paths for e in READERS if p.name.endswith(e) and not p.name.endswith(f"{e}.gz"))
    return endings.most_common(1)[0][0] if endings else None


def _belonging(paths: Iterable[Path], ending: str, add: Add) -> Iterable[tuple[Path, str]]:
    """Files with the right ending, and their names without it; the others would not be read."""
    other = [
        p for p in paths if not p.name.endswith(ending) and not (p.suffix == ".json" and ending.startswith(".tif"))
    ]
    for path in other:
        text = f"{path.parent.name}/{path.name} is never read: file_ending in dataset.json is {ending}."
        add("warning", "ignored_file", text, f"Convert it to {ending}, or move it away.")
    return [(p, p.name[: -len(ending)]) for p in paths if p.name.endswith(ending)]


def _sorted_images(paths: list[Path], ending: str, about: About, add: Add) -> dict[str, dict[int, Path]]:
    images: dict[str, dict[int, Path]] = {}
    n = len(about.channels) if about.channels else 10_000
    for path, stem in _belonging(paths, ending, add):
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if match is None:
            text = f"imagesTr/{path.name} does not say which channel it is. Allowed are CASE_0000{ending}, CASE_0001{ending}, ..."
            add("error", "unknown_file", text, f"If it is the first channel, rename it to {stem}_0000{ending}.", stem)
        elif int(match[2]) >= n:
            text = f"imagesTr/{path.name} is channel {int(match[2])}. dataset.json names {n}: {_numbered(about)}."
            add("error", "extra_channel", text, "Add the channel to channel_names, or move the file away.", match[1])
        else:
            images.setdefault(match[1], {})[int(match[2])] = path
    return images


def _sorted_labels(paths: list[Path], ending: str, images: Mapping[str, Any], add: Add) -> dict[str, Path]:
    labels: dict[str, Path] = {}
    for path, stem in _belonging(paths, ending, add):
        case = stem.removesuffix("_0000")
        if stem not in images and case in images:
            text = f"labelsTr/{path.name} carries a channel number. A label map has none: labelsTr/{case}{ending}."
            add("error", "unknown_file", text, f"Rename it to {case}{ending}.", case)
        else:
            labels[stem] = path
    return labels


def _n_files(images: Mapping[str, Mapping[int, Path]], about: About, ending: str) -> int:
    """Files that a case must have: one per channel, or one colour picture."""
    indices = {i for files in images.values() for i in files}
    if about.channels is None:
        return max(indices, default=0) + 1
    coloured = READERS[ending] != "SimpleITKIO" and len(about.channels) > 1 and indices == {0}
    return 1 if coloured else len(about.channels)


def _complete(case: Files, ending: str, about: About, add: Add) -> None:
    lacking = [i for i in range(case.n_images) if i not in case.images]
    if not case.images:
        text = f"There is a label map and no image. Expected imagesTr/{case.name}_0000{ending}."
        add("error", "missing_channel", text, "Add the image, or move the label map away.", case.name)
    elif lacking:
        named = [f"{i}{f' ({about.channels[i]})' if about.channels else ''}" for i in lacking]
        text = f"Channel {some(named)} is missing. Expected imagesTr/{case.name}_{lacking[0]:04d}{ending}."
        add("error", "missing_channel", text, "Add the file, or move the case away.", case.name)
    if case.images and case.label is None:
        text = f"There is an image and no label map. Expected labelsTr/{case.name}{ending}."
        add(
            "error",
            "missing_label",
            text,
            "Add the label map, or move the image away (imagesTs is never read).",
            case.name,
        )


def _counts(about: About, cases: list[Files], n_whole: int, add: Add) -> None:
    """What `dataset.json` says of the cases, beside the files."""
    if about.n_stated is not None and about.n_stated != n_whole:
        text = f"dataset.json says numTraining = {about.n_stated}; there are {count(n_whole, 'complete case')}. The files decide."
        add("note", "case_count", text, f"Look for lost files, then set numTraining to {n_whole}.")
    if not about.patients:
        return
    names = {c.name for c in cases}
    unknown, gone = sorted(names - set(about.patients)), sorted(set(about.patients) - names)
    if unknown:
        lacking = f"The table patient of dataset.json lacks {count(len(unknown), 'case')} ({some(unknown)})"
        text = f"{lacking}: each counts as a patient of its own."
        add("warning", "patient_table", text, "Add them, or two images of one patient may be on both sides of a fold.")
    if gone:
        text = f"The table patient of dataset.json names {count(len(gone), 'case')} that are not there ({some(gone)})."
        add("note", "patient_table", text, "Look for lost files, or remove the entries.")


def _numbered(about: About) -> str:
    return ", ".join(f"{i} {name}" for i, name in enumerate(about.channels or ()))
