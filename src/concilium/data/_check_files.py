"""`check`, before any image is read: `dataset.json`, and the names of the files. Whatever is wrong is a finding."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from concilium.data._check_types import About, Files, Finding, Listing, Mend, count, some
from concilium.data._description import READERS, read_description
from concilium.errors import DataError

Add = Callable[..., None]
RENAME = "Rename it so."
SIDECARS = {"desktop.ini", "thumbs.db"}


def list_files(site: str, folder: Path) -> Listing:
    """The cases of a data set by its files' names, and what is wrong with these and with `dataset.json`."""
    found: list[Finding] = []

    def add(severity: Any, code: str, text: str, fix: str, case: str | None = None, mend: Mend | None = None) -> None:
        found.append(Finding(severity, code, site, case, text, fix, mend))

    if not folder.is_dir():
        add("error", "no_data_set", f"{folder} is no folder. Expected an nnU-Net raw folder.", "Correct the path.")
        return Listing(site, folder, About(), (), tuple(found))
    about = _about(folder, add)
    folders = {name: _names(folder / name, add) for name in ("imagesTr", "labelsTr")}
    ending = about.ending or _likely_ending(folders["imagesTr"])
    if ending is None:
        return Listing(site, folder, about, (), tuple(found))
    images = _sorted_images(folders["imagesTr"], ending, _stems(folders["labelsTr"], ending), about, add)
    labels = _sorted_labels(folders["labelsTr"], ending, images, add)
    n_files = _n_files(images, about, ending)
    cases = [Files(name, images.get(name, {}), labels.get(name), n_files) for name in sorted({*images, *labels})]
    told = {f.case for f in found if f.code == "ignored_file" or (f.code == "unknown_file" and not f.safe)}
    for case in (c for c in cases if c.name not in told):  # what the others lack is that file
        _complete(case, ending, about, add)
    whole = [c for c in cases if c.whole]
    if not whole and not any(f.code == "no_data_set" for f in found):
        text = f"{folder} has no complete case. Expected imagesTr/CASE_0000{ending} with labelsTr/CASE{ending}."
        add("error", "no_training_cases", text, "Check the files' names, and file_ending in dataset.json.")
    _counts(folder, about, cases, len(whole), add)
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
        _by_case(annotated),
        stated if isinstance(stated, int) else None,
    )


def _by_case(annotated: object) -> dict[str, tuple[str, ...]]:
    table = annotated if isinstance(annotated, dict) else {}
    return {str(case): tuple(map(str, names)) for case, names in table.items() if isinstance(names, list)}


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


def _stems(paths: Iterable[Path], ending: str) -> set[str]:
    return {p.name[: -len(ending)] for p in paths if p.name.lower().endswith(ending)}


def _belonging(paths: Sequence[Path], ending: str, add: Add) -> Iterator[tuple[Path, str]]:
    """Files with the right ending, in capitals too, and their names without it; the others are never read."""
    names = {p.name for p in paths}
    for path in paths:
        stem = path.name[: -len(ending)]
        if path.name.endswith(ending):
            yield path, stem
        elif path.name.lower().endswith(ending) and stem + ending not in names:
            names.add(stem + ending)
            yield path, stem
        elif not (path.suffix == ".json" and ending.startswith(".tif")):
            text = f"{path.parent.name}/{path.name} is never read: file_ending in dataset.json is {ending}."
            add("warning", "ignored_file", text, f"Convert it to {ending}, or move it away.")


def _spelt(path: Path, right: str, case: str, add: Add) -> bool:
    """Whether the ending is right; if it is in capitals, the libraries that read by it do not read it."""
    if path.name != right:
        text = f"{path.parent.name}/{path.name} is never read: capitals count. Expected {right}."
        add("warning", "ignored_file", text, RENAME, case, Mend("rename", (path,), path.with_name(right)))
    return path.name == right


def _sorted_images(
    paths: Sequence[Path], ending: str, labelled: Collection[str], about: About, add: Add
) -> dict[str, dict[int, Path]]:
    """Case -> channel -> file. `labelled`: the names of label maps, by which a channel's number is told from a case's."""
    images: dict[str, dict[int, Path]] = {}
    bare = []
    n = len(about.channels) if about.channels else 10_000
    for path, stem in _belonging(paths, ending, add):
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if match is None or (int(match[2]) >= n and stem in labelled and match[1] not in labelled):
            bare.append((path, stem))
        elif int(match[2]) >= n:
            text = f"imagesTr/{path.name} is channel {int(match[2])}. dataset.json names {n}: {_numbered(about)}."
            add("error", "extra_channel", text, "Add the channel to channel_names, or move the file away.", match[1])
        elif _spelt(path, f"{stem}{ending}", match[1], add):
            images.setdefault(match[1], {})[int(match[2])] = path
    single = about.channels is not None and _n_files(images, about, ending) == 1
    for path, stem in bare:
        sure = single and path.name.endswith(ending) and stem in labelled and stem not in images
        _bare(path, stem, ending, add, sure=sure)
        if sure:
            images[stem] = {0: path}
    return images


def _bare(path: Path, stem: str, ending: str, add: Add, *, sure: bool) -> None:
    """Say that an image has no channel number. `sure`: it is the only image of a label map, and a case has one."""
    right = f"{stem}_0000{ending}"
    what = f"imagesTr/{path.name} does not say which channel it is"
    if sure:
        text = f"{what}. It is the only image to labelsTr/{stem}{ending}. Expected {right}."
        add("error", "unknown_file", text, RENAME, stem, Mend("rename", (path,), path.with_name(right)))
    else:
        text = f"{what}. Allowed are CASE_0000{ending}, CASE_0001{ending}, ...; as the first channel it is {right}."
        add("error", "unknown_file", text, "Give it the number of its channel.", stem)


def _sorted_labels(paths: Sequence[Path], ending: str, images: Mapping[str, Any], add: Add) -> dict[str, Path]:
    labels: dict[str, Path] = {}
    stems = _stems(paths, ending)
    for path, stem in _belonging(paths, ending, add):
        case = stem.removesuffix("_0000")
        if stem in images or case not in images:
            if _spelt(path, f"{stem}{ending}", stem, add):
                labels[stem] = path
            continue
        text = f"labelsTr/{path.name} carries a channel number. A label map has none. Expected {case}{ending}"
        if case in stems:
            add("error", "unknown_file", f"{text}, which is there too.", "Keep one of them.", case)
        else:
            right = Mend("rename", (path,), path.with_name(f"{case}{ending}"))
            add("error", "unknown_file", f"{text}.", RENAME, case, right)
            labels[case] = path
    return labels


def _n_files(images: Mapping[str, Mapping[int, Path]], about: About, ending: str) -> int:
    """Files that a case must have: one per channel, or one colour picture."""
    indices = {i for files in images.values() for i in files}
    if about.channels is None:
        return max(indices, default=0) + 1
    coloured = READERS[ending] == "NaturalImage2DIO" and len(about.channels) in (3, 4) and indices <= {0}
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
            "Add the label map, or move the image away (to imagesTs, which no training reads).",
            case.name,
        )


def _counts(folder: Path, about: About, cases: list[Files], n_whole: int, add: Add) -> None:
    """What `dataset.json` says of the cases, beside the files."""
    if about.n_stated is not None and about.n_stated != n_whole:
        text = f"dataset.json says numTraining = {about.n_stated}; there are {count(n_whole, 'complete case')}. The files decide."
        number = Mend("count", (folder / "dataset.json",))
        add("note", "case_count", text, f"Set numTraining to {n_whole}, if no file is lost.", None, number)
    names = {c.name for c in cases}
    _annotations(about, names, add)
    if not about.patients:
        return
    unknown, gone = sorted(names - set(about.patients)), sorted(set(about.patients) - names)
    if unknown:
        lacking = f"The table patient of dataset.json lacks {count(len(unknown), 'case')} ({some(unknown)})"
        text = f"{lacking}: each counts as a patient of its own."
        add("warning", "patient_table", text, "Add them, or two images of one patient may be on both sides of a fold.")
    if gone:
        text = f"The table patient of dataset.json names {count(len(gone), 'case')} without any file ({some(gone)})."
        add("note", "patient_table", text, "Look for lost files, or remove the entries.")


def _annotations(about: About, names: Collection[str], add: Add) -> None:
    """What the table `annotated` says of the cases, beside the files."""
    if not about.by_case:
        return
    unknown, left_out = sorted(about.by_case.keys() - names), sorted(names - about.by_case.keys())
    if unknown:
        text = f"The table annotated of dataset.json names {count(len(unknown), 'case')} without any file ({some(unknown)})."
        add(
            "error",
            "annotated_table",
            text,
            "Correct or remove the names: a misspelt case counts as annotated in full.",
        )
    if left_out:
        lacking = f"The table annotated of dataset.json lacks {count(len(left_out), 'case')} ({some(left_out)})"
        text = f"{lacking}: what is unlabelled there counts as background, not as unknown."
        add("warning", "annotated_table", text, "Add them, unless every label was looked for in them.")


def _numbered(about: About) -> str:
    return ", ".join(f"{i} {name}" for i, name in enumerate(about.channels or ()))
