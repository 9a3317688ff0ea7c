"""Sites by a value that each case has: in a table of dataset.json, in its name, or in a CSV file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from concilium.errors import DataError, StudyError


def values_of_names(cases: Iterable[str], pattern: str) -> dict[str, str]:
    """Case -> what the expression's one group finds in its name, where it finds something."""
    found = {case: re.search(pattern, case) for case in cases}
    return {case: match[1] for case, match in found.items() if match and match[1] is not None}


def values_of_table(folder: Path, key: str, patients: Mapping[str, str]) -> dict[str, str]:
    """Case -> its value in a table of dataset.json, or that of its patient, where there is one.

    Raises:
        StudyError: there is no such table.
    """
    path = folder / "dataset.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    table = settings.get(key)
    if not isinstance(table, dict):
        tables = [name for name, value in settings.items() if isinstance(value, dict)]
        raise StudyError(
            f"[partition] key = {key!r} is no table in {path}. There are: {', '.join(tables)}. Add it there, from case or "
            "patient to a value, or correct key."
        )
    values = {case: table.get(case, table.get(patient)) for case, patient in patients.items()}
    return {case: str(value) for case, value in values.items() if value is not None}


def values_of_file(path: Path) -> dict[str, str]:
    """Case -> site, from a CSV file with these two columns.

    Raises:
        DataError: it cannot be read, or has a row without a case, without a site, or with a second site for a case.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(
            f"{path} cannot be read ({e}). Expected a CSV file with columns case and site. Repair it."
        ) from e
    values: dict[str, str] = {}
    for row in rows:
        case, site = ((row.get(column) or "").strip() for column in ("case", "site"))
        if not case or not site or values.setdefault(case, site) != site:
            raise DataError(
                f"{path} has the row {row}. Expected a header with case and site, and one site for each case. Correct it."
            )
    return values


def deal_by_value(
    patients: Mapping[str, str], values: Mapping[str, str], owner: Mapping[str, str], *, rest: str | None, by: str
) -> dict[str, str]:
    """Patient -> site. `patients`: case -> patient; `owner`: value -> site; `rest`: the site of those without an owner.

    Raises:
        DataError: a case belongs to no site, or a patient to two.
    """
    homes: dict[str, set[str]] = {}
    nowhere: list[str] = []
    for case, patient in patients.items():
        value = values.get(case)
        home = rest if value is None else owner.get(value, rest)
        if home is None:
            nowhere.append(f"{case}: {'no value' if value is None else repr(value)}")
        else:
            homes.setdefault(patient, set()).add(home)
    if nowhere:
        raise DataError(
            f"[partition] by = {by!r}: {len(nowhere)} of {len(patients)} cases belong to no site ({some(nowhere)}). Sites have "
            f'the values {", ".join(map(repr, owner))}. Add values to a site, or name the site that gets them: rest = "SITE".'
        )
    torn = [f"{patient}: {', '.join(sorted(names))}" for patient, names in sorted(homes.items()) if len(names) > 1]
    if torn:
        raise DataError(
            f"[partition] by = {by!r} divides {len(torn)} patients ({some(torn)}). All cases of a patient must be at one site. "
            "Give them one value, or correct patient in dataset.json."
        )
    return {patient: names.pop() for patient, names in homes.items()}


def some(names: Sequence[str]) -> str:
    """The first of them, for a sentence."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
