"""Which cases of a site train and which validate, and whether enough are left; at a party, of those that all parties have."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from concilium.answers import Entry, Settings
from concilium.answers._noted import note, noted
from concilium.data.dataset import folds
from concilium.data.draws import digest
from concilium.data.preprocess import Prepared
from concilium.errors import ContractError, DataError
from concilium.messages import Prepare

FILE = "aligned.json"
SHOWN = "shown.json", "shown_new.json"
"""Which cases were shown, and which new ones: in the site's own folder."""
FAILED = "failed.json"
"""Cases that could not be prepared since the site was started, with the reason."""
Reasons: TypeAlias = dict[str, tuple[str, str]]
"""Case -> (code, text)."""


@dataclass(frozen=True)
class Shown:
    """What a party showed of its cases: their names in that order, and those of them that it cannot use."""

    names: tuple[str, ...] = ()
    lost: Reasons = field(default_factory=dict)
    begins: bool = True
    """Whether nothing was trained yet."""


def note_shown(settings: Settings, shown: Shown, *, new: bool) -> None:
    """Write what was shown, and later what of it is left out."""
    note(settings.folder, SHOWN[new], {"names": shown.names, "lost": shown.lost, "begins": shown.begins})


def shown_before(settings: Settings, *, new: bool) -> Shown:
    """What was shown last; nothing where nothing was."""
    told = noted(settings.folder, SHOWN[new])
    if not told:
        return Shown()
    return Shown(tuple(told["names"]), _reasons(told["lost"]), told["begins"])


def forget_failed(settings: Settings) -> None:
    """As the site starts: what could not be prepared is tried again, since it may be mended."""
    (settings.folder / FAILED).unlink(missing_ok=True)


def failed(settings: Settings) -> Reasons:
    """The cases that could not be prepared since the site was started."""
    return _reasons(noted(settings.folder, FAILED))


def must_prepare_all(settings: Settings, excluded: Mapping[str, tuple[str, str]]) -> None:
    """Check that every case that all parties have could be prepared; else note which could not, so that all leave them out.

    Raises:
        DataError: one could not (`case_failed`).
    """
    if not excluded:
        return
    lost = {key.partition("/")[2]: reason for key, reason in excluded.items()}
    note(settings.folder, FAILED, failed(settings) | lost)
    reasons = "; ".join(f"{key}: {text}" for key, (_, text) in list(excluded.items())[:5])
    raise DataError(
        f"{len(excluded)} cases that all parties have cannot be prepared here ({reasons}). Expected each of them, or that the "
        "alignment leaves them out before anything is trained. Put the files back as they were when the run began.",
        code="case_failed",
    )


def note_aligned(settings: Settings, names: Sequence[str], *, begins: bool = False) -> None:
    """Write which cases all parties have.

    Raises:
        DataError: they are not those that the run began with, unless it only `begins`.
    """
    file = _file(settings)
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if before is not None and before != sorted(names) and not begins:
        more, fewer = sorted(set(names) - set(before)), sorted(set(before) - set(names))
        raise DataError(
            f"{len(names)} cases are at all sites now, {len(before)} were when this run began: {len(more)} are new "
            f"({', '.join(more[:3]) or 'none'}), {len(fewer)} are gone ({', '.join(fewer[:3]) or 'none'}). A run goes on with "
            "the cases that it began with, or those that validate would be others. Put the data back, or start a new run.",
            code="cases_changed",
        )
    note(settings.folder, FILE, sorted(names))


def aligned(settings: Settings, found: Sequence[Entry]) -> tuple[Entry, ...]:
    """Of these cases those that all parties have, sorted by name: in the order of every party.

    Raises:
        ContractError: they were never aligned.
        DataError: one is gone (`case_failed`).
    """
    file = _file(settings)
    if not file.is_file():
        raise ContractError(
            f"{settings.name} was asked to prepare before its cases were aligned with those of the other parties. Expected Align "
            "first. Start the run again."
        )
    names = json.loads(file.read_text(encoding="utf-8"))
    there = {entry.case.name: entry for entry in found}
    (member,) = settings.data
    gone = ("unreadable", "its files were there, and are gone.")
    must_prepare_all(settings, {f"{member}/{name}": gone for name in names if name not in there})
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


def _reasons(told: Mapping[str, Sequence[str]]) -> Reasons:
    return {name: (code, text) for name, (code, text) in told.items()}


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
