"""`check`, one data set that a study divides: its parts, each of which will be a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from concilium.data._check_types import Finding, Listing, Seen, count
from concilium.data.partition import Layout, Part
from concilium.errors import DataError, StudyError

DataSet = tuple[Listing, list[Seen]]


def into_parts(
    whole: Listing, seen: Sequence[Seen], found: Sequence[Finding], divide: Callable[[], Layout]
) -> tuple[list[DataSet], list[Finding]]:
    """Each part as a data set, and the findings: those about a case are its part's, and there may be new ones.

    Where it cannot be divided, that is a finding, and the whole stays one.
    """
    if not whole.cases:
        return [(whole, list(seen))], list(found)
    try:
        layout = divide()
    except (DataError, StudyError) as e:
        what, _, fix = str(e).strip().rpartition(". ")  # the last sentence says what to do
        text = f"It cannot be divided as the study says. {what}."
        return [(whole, list(seen))], [*found, Finding("error", "partition", whole.site, None, text, fix)]
    owner = {case: name for name in layout.divided for case in layout.parts[name].cases}
    mine = [replace(f, site=owner.get(f.case or "", f.site)) for f in found]
    mine += [Finding("note", "partition", whole.site, None, n, "Nothing, if it is meant so.") for n in layout.notes]
    parts = [_part(whole, seen, name, layout.parts[name], owner) for name in layout.divided]
    for part, _ in parts:
        if not any(case.whole for case in part.cases):
            text = f"None of its {count(len(part.cases), 'case')} is complete, so that it has nothing to train on."
            mine.append(
                Finding("error", "no_training_cases", part.site, None, text, "Complete them, or change [partition].")
            )
    return parts, mine


def _part(whole: Listing, seen: Sequence[Seen], name: str, part: Part, owner: Mapping[str, str]) -> DataSet:
    """What would be listed and seen of the folder that a run makes of it."""
    about = whole.about if part.annotated is None else replace(whole.about, annotated=part.annotated)
    cases = tuple(case for case in whole.cases if owner.get(case.name) == name)
    own = [replace(s, site=name) for s in seen if owner.get(s.case) == name]
    if part.annotated is not None and about.labels is not None:  # the others become background
        kept = {i for label, ids in about.labels.items() if label in (*part.annotated, "ignore") for i in ids} | {0}
        own = [replace(s, values=s.values and s.values & kept) for s in own]
    return replace(whole, site=name, about=about, cases=cases, findings=()), own
