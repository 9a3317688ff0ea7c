"""`check`, several data sets together: the same image or patient twice, and sites that mean different things by one number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from concilium.data._check_site import ODD, majority
from concilium.data._check_space import has_orientation, orientation, turned
from concilium.data._check_types import Finding, Listing, Mend, Seen, count, some
from concilium.data.matching import Names, Space, renamed, require_known, translate, united
from concilium.errors import DataError

Add = Callable[..., None]


def check_together(
    listings: Sequence[Listing], seen: Sequence[Seen], *, test: str | None, names: Mapping[str, Names]
) -> list[Finding]:
    """What is wrong between cases and between data sets; `test` is the name of the held-out one.

    `names`: what a data set calls otherwise than the study.
    """
    found: list[Finding] = []

    def add(
        severity: Any, code: str, site: str, case: str | None, text: str, fix: str, mend: Mend | None = None
    ) -> None:
        found.append(Finding(severity, code, site, case, text, fix, mend))

    _duplicates(seen, test, add)
    _shared_patients(seen, test, add)
    _agreement(listings, names, add)
    _orientations(seen, add)
    _spacings(seen, add)
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
    if s.site != first.site or (s.patient != first.patient and s.site != test):
        text = f"{text} Training on the one and validating on the other gives a score that is too good."
        add("error", "duplicate", s.site, s.case, text, "Keep one of them.")
        return
    severity = "error" if differ else "warning"
    known = s.label_digest is not None and first.named and s.named and s.patient == first.patient
    equal = known and not differ and s.headers == first.headers
    mend = Mend("remove", s.files) if equal else None
    add(severity, "duplicate", s.site, s.case, f"{text} It counts twice.", "Keep one of them.", mend)


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
            _at_two_sites(site, other, {p: [*cases[a][p], *cases[b][p]] for p in shared}, add)
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


def _at_two_sites(site: str, other: str, shared: Mapping[str, Sequence[Seen]], add: Add) -> None:
    """A patient who is trained on at one site may be validated on at the other."""
    named = [patient for patient, seen in shared.items() if all(s.named for s in seen)]
    unnamed = [patient for patient in shared if patient not in named]
    if named:
        ids = f"Shares {count(len(named), 'patient id')} with {other}, by the tables of both ({some(named)})"
        text = f"{ids}. If they are the same people, one site trains on whom the other validates on."
        fix = "Keep each patient at one site. If only the numbering is the same, rename those of one site."
        add("warning", "patient_at_two_sites", site, None, text, fix)
    if unnamed:
        ids = f"Shares {count(len(unnamed), 'patient id')} with {other} ({some(unnamed)})"
        text = f"{ids}, by the cases' names: the same people, or the same numbering?"
        add("note", "patient_at_two_sites", site, None, text, "If they are the same people, keep each at one site.")


def _agreement(listings: Sequence[Listing], names: Mapping[str, Names], add: Add) -> None:
    """Channels and labels of every data set beside those of the first that says them, matched by name as a run does."""
    spaces: dict[str, Space] = {}

    def differ(site: str, e: DataError) -> None:
        text, _, fix = str(e).rpartition(". ")  # the last sentence says what to do
        add("error", "sites_differ", site, None, f"{text}.", fix)

    for listing in listings:
        said = _said(listing)
        try:
            if said is not None:
                spaces[listing.site] = renamed(said, names.get(listing.site, Names()), listing.site)
        except DataError as e:
            differ(listing.site, e)
    if not spaces:
        return
    first = next(iter(spaces))
    study = Space(spaces[first].channels, united(spaces.values()))
    for site, own in spaces.items():
        try:
            require_known(own, study.labels, where=site)
            how = translate(own, study, where=site, other=first)
        except DataError as e:
            differ(site, e)
            continue
        if site != first and (how.moves_ids or how.moves_channels):
            text = f"{' '.join(how.notes)} The study's are those of {first}."
            add("note", "sites_renumbered", site, None, text, "Nothing, if equal names mean the same.")


def _said(listing: Listing) -> Space | None:
    """What `dataset.json` says, where it can be made out."""
    about = listing.about
    if not about.channels or not about.labels:
        return None
    labels = {n: ids[0] if len(ids) == 1 else ids for n, ids in about.labels.items()}
    return Space(about.channels, labels, listing.annotated)


def _orientations(seen: Sequence[Seen], add: Add) -> None:
    """Sites whose volumes are stored along other axes than those of the first."""
    stored: dict[str, list[str]] = {}
    for s in seen:
        if has_orientation(s.space):
            stored.setdefault(s.site, []).append(orientation(s.space))
    usual = {site: majority(letters) for site, letters in stored.items()}
    first = next(iter(usual), "")
    for site, letters in usual.items():
        if letters != usual[first]:
            how = turned(letters, usual[first])
            text = f"Most volumes are stored {letters}, at {first} {usual[first]}: to the network they are {how}."
            fix = "Agree on one orientation for all sites, images and label maps alike (SimpleITK: DICOMOrient)."
            add("warning", "sites_orientation", site, None, text, fix)


def _spacings(seen: Sequence[Seen], add: Add) -> None:
    """Sites whose voxels are so much larger or smaller than the first's that a unit may be wrong, or of no known size."""
    edges: dict[str, list[float]] = {}
    for s in (s for s in seen if s.shape):
        edges.setdefault(s.site, []).extend([s.space.edge] if s.space else [])
    usual = {site: float(np.median(sizes)) for site, sizes in edges.items() if sizes}
    first = next(iter(usual), "")
    for site in edges:
        if usual and site not in usual:
            text = f"No case says its spacing, where those of {first} do: one plan for all takes its voxels for 1 mm."
            add(
                "warning",
                "sites_spacing",
                site,
                None,
                text,
                "Write the spacing into this site's files, or leave it out.",
            )
        elif usual and max(usual[site] / usual[first], usual[first] / usual[site]) > ODD:
            sizes = f"{usual[site]:.3g} mm (geometric mean, usually), at {first} {usual[first]:.3g} mm"
            fix = "Check the unit in the files: it should be mm."
            add("warning", "sites_spacing", site, None, f"Voxels have edges of {sizes}.", fix)
