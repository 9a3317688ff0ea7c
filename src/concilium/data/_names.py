"""The files of an nnU-Net raw folder by their names: `<case>_<channel>.<ending>`, `<case>.<ending>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from concilium.data._description import READERS
from concilium.errors import DataError


def files_in(folder: Path, ending: str) -> list[Path]:
    """The files with this ending, sorted by name; hidden ones are none."""
    return sorted(p for p in folder.iterdir() if p.name.endswith(ending) and not p.name.startswith("."))


def stem(path: Path, ending: str) -> str:
    """A file's name without the ending."""
    return path.name[: -len(ending)]


def images_in(
    folder: Path, channels: Sequence[str], ending: str, *, missing: Sequence[str] = ()
) -> dict[str, tuple[Path, ...] | None]:
    """The files of each case in the order of the channels; None where one lacks. For `missing` channels stands another."""
    found: dict[str, dict[int, Path]] = {}
    for path in files_in(folder, ending):
        match = re.fullmatch(r"(.+)_(\d{4})", stem(path, ending))
        if match is None or int(match[2]) >= len(channels):
            raise DataError(
                f"{path} is no channel of a case. Allowed are <case>_0000{ending} to <case>_{len(channels) - 1:04d}{ending} for "
                f"{', '.join(channels)}. Rename the file, or correct channel_names."
            )
        found.setdefault(match[1], {})[int(match[2])] = path
    for files in found.values():
        files |= {i: next(iter(files.values())) for i, name in enumerate(channels) if name in missing}
    # nnU-Net's reader of natural images takes a colour file apart; if no case has a second file, that is what is meant.
    coloured = (
        READERS[ending] == "NaturalImage2DIO" and len(channels) in (3, 4) and all(set(f) == {0} for f in found.values())
    )
    n = 1 if coloured else len(channels)
    return {
        name: tuple(f[i] for i in range(n)) if set(f) == set(range(n)) else None for name, f in sorted(found.items())
    }
