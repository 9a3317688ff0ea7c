"""`check`, several data sets together: the same image or patient twice, and sites that mean different things by one number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from concilium.data._check_site import majority
from concilium.data._check_space import orientation, turned
from concilium.data._check_types import Finding, Listing, Seen, count, some

Add = Callable[..., None]


def check_together(listings: Sequence[Listing], seen: Sequence[Seen], *, test: str | None) -> list[Finding]:
    """What is wrong between cases and between data sets; `test` is the name of the held-out one."""
    found: list[Finding] = []

    def add(severity: Any, code: str, site: str, case: str | None, text: str, fix: str) -> None:
        found.append(Finding(severity, code, site, case, text, fix))

    _duplicates(seen, test, add)
    _shared_patients(seen, test, add)
    _agreement(listings, add)
    _orientations(seen, add)
    return found


def _duplicates(seen: Sequence[Seen], test: str | None, add: Add) -> None:
    """Cases with the same image."""
    same: dict[bytes, list[Seen]] = {}
    for s in seen:
        if s.digest is not None:
            same.setdefault(s.digest, []).append(s)
    for first, *others in same.values():
        for s in others:
            if {first.site, s.site} >= {test} and first.site != s.site:
                held, trained = (first, s) if first.site == test else (s, first)
                text = (
                    f"It has the same image as case {held.case} of {held.site}: the test would ask what was trained on."
                )
                add(
                    "error",
                    "in_test_set",
                    trained.site,
                    trained.case,
                    text,
                    "Remove it from the site, or from the test set.",
                )
            else:
                _duplicate(first, s, test, add)


def _duplicate(first: Seen, s: Seen, test: str | None, add: Add) -> None:
    where = first.case if s.site == first.site else f"{first.case} of {first.site}"
    differ = " Their label maps differ." if s.label_digest != first.label_digest else ""
    text = f"It has the same image as case {where}.{differ}"
    if s.site == first.site and (s.patient == first.patient or s.site == test):
        add(
            "error" if differ else "warning",
            "duplicate",
            s.site,
            s.case,
            f"{text} It counts twice.",
            "Keep one of them.",
        )
    else:
        text = f"{text} Training on the one and validating on the other gives a score that is too good."
        add("error", "duplicate", s.site, s.case, text, "Keep one of them.")


def _shared_patients(seen: Sequence[Seen], test: str | None, add: Add) -> None:
    """Patients (by the tables, otherwise by the cases' names) that are in several data sets."""
    cases: dict[str, dict[str, list[Seen]]] = {}
    for s in seen:
        cases.setdefault(s.site, {}).setdefault(s.patient, []).append(s)
    for a, b in itertools.combinations(cases, 2):
        shared = sorted(cases[a].keys() & cases[b].keys())
        site, other = (b, a) if a == test else (a, b)
        if not shared:
            continue
        if test not in (a, b):
            ids = f"Shares {count(len(shared), 'patient id')} with {other} ({some(shared)})"
            text = f"{ids}: the same people, or the same numbering?"
            add("note", "patient_at_two_sites", site, None, text, "If they are the same people, keep each at one site.")
            continue
        for patient in shared:
            here, there = cases[site][patient], cases[other][patient]
            sure = all(s.named for s in (*here, *there))
            text = (
                f"Patient {patient} is in the test set too ({some([s.case for s in there])}; "
                f"here {count(len(here), 'case')})" + ("." if sure else ", by the cases' names.")
            )
            fix = "Keep a patient on one side, or the test score is too good. If only the numbering is the same, rename one."
            add("error" if sure else "warning", "patient_in_test_set", site, here[0].case, text, fix)


def _agreement(listings: Sequence[Listing], add: Add) -> None:
    """Channels and labels of every data set beside those of the first that says them."""
    first = next((x for x in listings if x.about.channels and x.about.labels), None)
    for other in listings:
        if first is None or other is first:
            continue
        for what, mine, theirs in (
            ("channels", _numbered(first.about.channels), _numbered(other.about.channels)),
            ("labels", _sorted(first.about.labels), _sorted(other.about.labels)),
        ):
            if not theirs or mine == theirs:
                continue
            if set(mine) == set(theirs):
                why = "The names are the same and the numbers are not: one site's would be taken for another's."
            else:
                why = f"Different: {some(sorted(set(mine) ^ set(theirs)))}."
            text = f"{what} are {_spelt(theirs)}; at {first.site} {_spelt(mine)}. {why}"
            add(
                "error",
                "sites_differ",
                other.site,
                None,
                text,
                f"Agree on one list of {what}, and change dataset.json and the files.",
            )


def _orientations(seen: Sequence[Seen], add: Add) -> None:
    """Sites whose volumes are stored along other axes than those of the first."""
    stored: dict[str, list[str]] = {}
    for s in seen:
        if s.space is not None and len(s.space.size) == 3:
            stored.setdefault(s.site, []).append(orientation(s.space))
    usual = {site: majority(letters) for site, letters in stored.items()}
    first = next(iter(usual), "")
    for site, letters in usual.items():
        if letters != usual[first]:
            how = turned(letters, usual[first])
            text = f"Most volumes are stored {letters}, at {first} {usual[first]}: to the network they are {how}."
            fix = "Agree on one orientation for all sites, images and label maps alike (SimpleITK: DICOMOrient)."
            add("warning", "sites_orientation", site, None, text, fix)


def _numbered(channels: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    return {name: (i,) for i, name in enumerate(channels or ())}


def _sorted(labels: Mapping[str, tuple[int, ...]] | None) -> dict[str, tuple[int, ...]]:
    return dict(sorted((labels or {}).items(), key=lambda item: item[1]))


def _spelt(numbers: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{'+'.join(map(str, ids))} {name}" for name, ids in numbers.items())
