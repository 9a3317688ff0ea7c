"""Which cases of a site train and which validate, and whether enough are left; at a party, of those that all parties have."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from concilium.answers import Entry, Settings
from concilium.data.dataset import folds
from concilium.data.draws import digest
from concilium.data.preprocess import Prepared
from concilium.errors import ContractError, DataError
from concilium.messages import Prepare

FILE = "aligned.json"


def note_aligned(settings: Settings, names: Sequence[str]) -> None:
    """Write which cases all parties have.

    Raises:
        DataError: they are not those that the run began with.
    """
    file = _file(settings)
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if before is not None and before != sorted(names):
        more, fewer = sorted(set(names) - set(before)), sorted(set(before) - set(names))
        raise DataError(
            f"{len(names)} cases are at all sites now, {len(before)} were when this run began: {len(more)} are new "
            f"({', '.join(more[:3]) or 'none'}), {len(fewer)} are gone ({', '.join(fewer[:3]) or 'none'}). A run goes on with "
            "the cases that it began with, or those that validate would be others. Put the data back, or start a new run.",
            code="cases_changed",
        )
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
            f"{len(lacking)} cases that were aligned are not at {settings.name} any more ({', '.join(lacking[:3])}). Expected "
            "all of them, unchanged, while a run goes on. Put them back, or start the run again."
        )
    return tuple(there[name] for name in names)


def shapes_of(files: Iterable[Prepared]) -> int:
    """A digest of the shapes of preprocessed cases, in the order of all parties, who draw the same patches of them."""
    return digest(*(str(tuple(f.image.shape[1:])) for f in files))


def divided(settings: Settings, request: Prepare, usable: Sequence[Entry]) -> dict[str, tuple[Entry, ...]]:
    """The cases that train and those that validate, by patient; of a party as whoever has the labels numbers patients."""
    of = {e.key: (e.member, e.case.patient) for e in usable}
    if request.holding is not None:
        of = {e.key: (e.member, f"{p:06d}") for e, p in zip(usable, request.patients, strict=True)}
    held_out = {
        (m, p)
        for m in settings.data
        for p in folds(sorted({p for member, p in of.values() if member == m}), request.folds, request.fold)
    }
    return {
        "training": tuple(e for e in usable if of[e.key] not in held_out),
        "validation": tuple(e for e in usable if of[e.key] in held_out),
    }


def _file(settings: Settings) -> Path:
    return settings.folder / FILE


def limit(excluded: Mapping[str, tuple[str, str]], n_usable: int, max_excluded: float) -> None:
    """Check that not too many cases were set aside.

    Raises:
        DataError: more than the share `max_excluded`, or none is left.
    """
    n = n_usable + len(excluded)
    if n_usable == 0 or len(excluded) > max_excluded * n:
        reasons = "; ".join(f"{case}: {text}" for case, (_, text) in list(excluded.items())[:5])
        raise DataError(
            f"{len(excluded)} of {n} cases cannot be used ({reasons}). "
            f"At most {max_excluded:.0%} may be set aside ([study] max_excluded), and one must be left. Mend or remove them.",
            code="too_many_excluded",
        )
