"""How many voxels of each label the label maps of a data set hold, remembered in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import SimpleITK as sitk

from concilium.data._itk import read_file

Counts: TypeAlias = Mapping[str, dict[str, int] | None]
"""Case -> voxels by label, background included; `None` where the label map cannot be read."""


def label_counts(label_maps: Mapping[str, Path], labels: Mapping[str, Any], known: Path | None) -> tuple[Counts, str]:
    """The counts of these label maps (case -> file), and the text of a file that remembers them.

    What `known`, such a file, holds is not counted again, unless size or time of a label map changed.
    """
    remembered: dict[str, Any] = {}
    if known is not None and known.is_file():
        remembered = json.loads(known.read_text(encoding="utf-8"))
    entries: dict[str, Any] = {}
    for case, path in sorted(label_maps.items()):
        stamp = _stamp(path)
        entry = remembered.get(case)
        entries[case] = entry if entry and entry["stamp"] == stamp else {"stamp": stamp, "voxels": _count(path, labels)}
    return {case: entry["voxels"] for case, entry in entries.items()}, json.dumps(entries, indent=1) + "\n"


def ids_of(value: Any) -> list[int]:
    """The ids in a label map that stand for a label, or for a region of several."""
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _stamp(path: Path) -> list[int]:
    try:
        about = path.stat()
    except OSError:
        return []
    return [about.st_size, about.st_mtime_ns]


def _count(path: Path, labels: Mapping[str, Any]) -> dict[str, int] | None:
    try:
        values, counts = np.unique(sitk.GetArrayFromImage(read_file(path)), return_counts=True)
    except RuntimeError:
        return None
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return {name: sum(found.get(i, 0) for i in ids_of(value)) for name, value in labels.items()}
