"""`check`, one data set as a whole: what shows only beside its other cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from concilium.data._check_space import has_orientation, orientation, turned
from concilium.data._check_types import Finding, Listing, Seen, Space, count, some

Add = Callable[..., None]
LENGTHY = 1.15
"""Long side over short side from which on a picture is upright or lying."""
ODD = 8.0
"""Times that a voxel's edge may differ from that of most cases."""


def check_site(listing: Listing, seen: Sequence[Seen], *, folds: int, test: bool) -> list[Finding]:
    """What is wrong with a data set, by its cases together. `test`: it is held out, so that folds do not matter."""
    found: list[Finding] = []

    def add(severity: Any, code: str, text: str, fix: str, case: str | None = None) -> None:
        found.append(Finding(severity, code, listing.site, case, text, fix))

    readable = [s for s in seen if s.shape]
    _labels(listing, seen, add)
    if listing.annotated == () and listing.cases and not test:
        text = f"Of no case any label is annotated ({count(len(listing.cases), 'case')}): there is nothing to train on."
        add("error", "nothing_annotated", text, "List what was looked for under annotated, or take the site out.")
    _orientations(readable, add)
    _sideways(readable, add)
    _spacings(listing, readable, add)
    _patients(listing, seen, folds, test, add)
    return found


def _labels(listing: Listing, seen: Sequence[Seen], add: Add) -> None:
    """Labels that no case has."""
    maps = [s.values for s in seen if s.values is not None]
    labels = listing.about.labels or {}
    if not maps:
        return
    present = frozenset().union(*maps)
    if present <= {0}:
        add(
            "error",
            "no_foreground",
            f"All {count(len(maps), 'label map')} are empty.",
            "Check the annotation, and labelsTr.",
        )
        return
    wanted = {n: ids for n, ids in labels.items() if n != "ignore" and any(ids)}
    if listing.annotated is not None:
        wanted = {n: ids for n, ids in wanted.items() if n in listing.annotated}
    absent = [f"{n} ({' + '.join(map(str, ids))})" for n, ids in wanted.items() if not present & {*ids}]
    if absent:
        text = f"No case shows {some(absent)}, which dataset.json names."
        fix = (
            "If it is not annotated here, training would take it for background: list what is annotated under annotated. "
            "If its id is another, correct it."
        )
        add("warning", "absent_label", text, fix)


def _orientations(seen: Sequence[Seen], add: Add) -> None:
    """Volumes stored along other axes than most: nnU-Net reads voxels as stored, and does not look at the direction."""
    stored = {s.case: orientation(s.space) for s in seen if has_orientation(s.space)}
    most = majority(stored.values())
    for case, letters in stored.items():
        if letters != most:
            text = f"Stored {letters}, most of this site's cases {most}: to the network it is {turned(letters, most)}."
            fix = "Store all in one orientation, images and label maps alike (SimpleITK: DICOMOrient)."
            add("warning", "orientation", text, fix, case)


def _sideways(seen: Sequence[Seen], add: Add) -> None:
    """Pictures that lie where nearly all others stand, or the other way round."""
    flat = [(s, s.shape[1] / s.shape[2]) for s in seen if len(s.shape) == 3 and s.shape[0] == 1]
    upright = [s for s, ratio in flat if ratio >= LENGTHY]
    lying = [s for s, ratio in flat if ratio <= 1 / LENGTHY]
    few, many, words = upright, lying, ("upright", "lie")
    if len(lying) < len(upright):
        few, many, words = lying, upright, ("lying", "stand upright")
    if not few or len(few) > 0.1 * len(many):
        return
    usual, n = Counter(s.shape for s in many).most_common(1)[0]
    for s in few:
        alike = (1, s.shape[2], s.shape[1]) == usual and n > 1
        swapped = f" With sides swapped it has the size of {n} others." if alike else ""
        others = f"{len(many)} of {count(len(few) + len(many), 'long picture')} {words[1]}"
        text = f"{s.shape[2]} x {s.shape[1]} pixels: {words[0]}, where {others}.{swapped}"
        add("warning", "sideways", text, "Look at it. If it lies on its side, turn image and label map.", s.case)


def _spacings(listing: Listing, seen: Sequence[Seen], add: Add) -> None:
    spaced = [(s, s.space) for s in seen if s.space is not None]
    _unspaced(listing, seen, len(spaced), add)
    if not spaced:
        return
    _ones(spaced, add)
    edges = {s.case: space.edge for s, space in spaced}
    usual = float(np.median(list(edges.values())))
    for case, edge in edges.items():
        if max(edge / usual, usual / edge) > ODD:
            text = f"Voxels have edges of {edge:.3g} mm (geometric mean), usually {usual:.3g} mm at this site."
            add("warning", "odd_spacing", text, "Check the unit in the file: it should be mm.", case)


def _ones(spaced: Sequence[tuple[Seen, Space]], add: Add) -> None:
    """Cases with a spacing of exactly 1 mm, which may be unknown."""
    ones = [s for s, space in spaced if (space.spacing == 1).all()]
    blank = {s.case for s, space in spaced if (space.spacing == 1).all() and not space.placed}
    others = [s.case for s, space in spaced if not (space.spacing == 1).all()]
    fix = "Compare with the acquisition. If it is wrong, write the true one [mm] into the files."
    exact = "a spacing of exactly 1 mm along all axes"
    if len(ones) > len(others) and not blank:
        meant = "right after resampling, and also what is written where none is known"
        if others:
            text = (
                f"{len(ones)} of {len(spaced)} cases have {exact} ({meant}), and the others have not ({some(others)})."
            )
        else:
            text = f"Every case has {exact}: {meant}."
        add("warning" if others else "note", "unit_spacing", text, fix)
        return
    for s in ones if others else [s for s in ones if s.case in blank]:
        unlike = f"unlike that of {count(len(others), 'other case')}"
        why = "and the header gives no position either" if s.case in blank else unlike
        add(
            "warning",
            "unit_spacing",
            f"The spacing is exactly 1 mm along all axes, {why}: it may be unknown.",
            fix,
            s.case,
        )


def _unspaced(listing: Listing, seen: Sequence[Seen], n_spaced: int, add: Add) -> None:
    """Cases whose format has no spacing, or keeps it in a file beside it that is not there."""
    lacking = [s for s in seen if s.lacks]
    write = 'Write the file where the spacing is known: {"spacing": [z, y, x]} in mm.'
    if n_spaced:
        for s in lacking:
            others = count(n_spaced, "other case")
            text = f"There is no {s.lacks}, so its voxels count as 1 x 1 x 1 mm, unlike those of {others}."
            add("error", "no_spacing", text, write, s.case)
    elif lacking:
        name = f"{lacking[0].lacks.split('/')[0]}/CASE.json"
        text = f"No case has its spacing beside it ({name}): voxels count as cubes, distances and volumes in voxels."
        add("note", "pixels", text, write)
    elif seen and all(s.shape[0] == 1 for s in seen):
        text = f"{listing.about.ending or 'This'} files have no spacing: distances and areas are counted in pixels."
        add("note", "pixels", text, "Nothing, if the pictures have about one scale.")


def _patients(listing: Listing, seen: Sequence[Seen], folds: int, test: bool, add: Add) -> None:
    if not seen:
        return
    patients = {s.patient for s in seen}
    if not listing.about.patients:
        what = "statistics cannot tell patients apart" if test else "folds cannot keep a patient's cases on one side"
        text = f"dataset.json has no table patient, so every case counts as a patient: {what}."
        add(
            "warning",
            "no_patients",
            text,
            'Where patients have several cases, add "patient": {"case": "patient", ...}.',
        )
    if test or len(patients) >= folds:
        return
    if len(patients) == 1:
        text = f"There is a single patient ({count(len(seen), 'case')}): nothing is left to validate on."
    else:
        text = f"There are {len(patients)} patients for {folds} folds: {len(patients)} folds are made."
    add("warning", "few_patients", text, "Add patients, or read this site's validation scores with care.")


def majority(values: Any) -> str:
    """The most frequent of them; the first in the alphabet among equals; empty where there is none."""
    counted = Counter(values)
    return min(counted, key=lambda v: (-counted[v], v)) if counted else ""
