"""The cases of a site that all parties of a vertical federation have, as the alignment left them in a file of the site's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from concilium.answers import Entry, Settings
from concilium.errors import ContractError

FILE = "aligned.json"


def note_aligned(settings: Settings, names: Sequence[str]) -> None:
    """Write which cases all parties have."""
    file = _file(settings)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(sorted(names)), encoding="utf-8")
    unfinished.replace(file)


def aligned(settings: Settings, found: Sequence[Entry]) -> tuple[Entry, ...]:
    """Of these cases those that all parties have, sorted by name: in the order of every party.

    Raises:
        ContractError: they were never aligned, or one is gone.
    """
    file = _file(settings)
    if not file.is_file():
        raise ContractError(
            f"{settings.name} was asked to prepare before its cases were aligned with those of the other parties. Expected Align "
            "first. Start the run again."
        )
    names = json.loads(file.read_text(encoding="utf-8"))
    there = {entry.case.name: entry for entry in found}
    if lacking := [name for name in names if name not in there]:
        raise ContractError(
            f"{len(lacking)} cases that were aligned are not at {settings.name} any more ({', '.join(lacking[:3])}). Expected all "
            "of them, unchanged, while a run goes on. Put them back, or start the run again."
        )
    return tuple(there[name] for name in names)


def _file(settings: Settings) -> Path:
    return settings.folder / FILE
