"""`check`: whether two files lie in the same place, and in what orientation a file is stored."""

from __future__ import annotations

import itertools
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from concilium.data._check_types import Severity, Space

ROUNDING = 0.02
"""Voxels by which corners may lie apart because headers hold rounded numbers (float32, or text with a few digits)."""
COPY = "Copy spacing, origin and direction of the image into the other file's header (SimpleITK: other.CopyInformation(image))"
Difference = tuple[Severity, str, str, str, bool]


def compare(one: Space, other: Space, *, tolerant: bool = True) -> Difference | None:
    """How two files of equal shape differ in place, or None where they differ by rounding only: severity, code, text, fix,
    and whether copying the header is right beyond doubt.

    What counts is how far apart [mm] the same voxel lies in both: the largest distance is at a corner. Training pairs voxels by
    their index and never looks at the headers, so a difference is harmless exactly where the indices belong together.
    With `tolerant` false the reader refuses the pair whatever the distance.
    """
    if not other.directed:
        return _compare_spacing(one, other)
    if len(one.size) != len(other.size):
        text = f"are stored with {len(other.size)} and {len(one.size)} dimensions. Both must have the same."
        return "error", "geometry_mismatch", text, f"{COPY}, after saving both in the same way.", False
    distance = float(np.linalg.norm(one.corners() - other.corners(), axis=1).max())
    voxel = float(np.min(one.spacing))
    if distance <= ROUNDING * voxel and tolerant:
        return None
    spacings = (
        ""
        if np.allclose(one.spacing, other.spacing, rtol=1e-3)
        else f" Spacing: {_mm(other.spacing)} and {_mm(one.spacing)} mm."
    )
    apart = f"lie up to {distance:.3g} mm apart ({distance / voxel:.2g} voxels)"
    text = f"{apart}; rounding of the header explains {ROUNDING:g} voxels."
    if distance <= voxel:
        severity: Severity = "warning" if tolerant else "error"
        refused = (
            "" if tolerant else " nnU-Net's reader refuses channels whose spacings differ by more than 1 in 100,000."
        )
        return severity, "geometry_mismatch", f"{text}{spacings}{refused}", f"{COPY}: safe below one voxel.", True
    mirrored = _mirrored(one, other, tolerance=0.1 * voxel)
    if mirrored:
        text = f"fill the same place but are stored along other axes ({mirrored}): voxels of one index do not belong together."
        fix = "Resample the file onto the image's grid (nearest neighbour for label maps), so that its voxels move too."
        return "error", "mirrored", text, fix, False
    if not other.placed or (_is_blank(other) and not _is_blank(one)):
        blank = (
            "The first has a header without a place (origin 0, axes straight), as if saved without that of the image."
        )
        return (
            "error",
            "geometry_mismatch",
            f"{text}{spacings} {blank}",
            f"Look at one, voxel by voxel. Where they match: {COPY}.",
            False,
        )
    fix = f"Look at one in a viewer. Where voxels match: {COPY}. Where places match: resample onto the image's grid."
    return "error", "geometry_mismatch", f"{text}{spacings}", fix, False


def _compare_spacing(one: Space, other: Space) -> Difference | None:
    """The same of files that say how large voxels are and not where they lie."""
    if np.allclose(one.spacing, other.spacing, rtol=1e-3):
        return None
    text = f"have spacings of {_mm(other.spacing)} and {_mm(one.spacing)} mm. Training takes the image's."
    fix = "Find out which is right, and write it into the files beside both."
    return "warning", "geometry_mismatch", text, fix, False


def _mirrored(one: Space, other: Space, *, tolerance: float) -> str:
    """In what way the one is the other stored along other axes; empty where it is not."""
    n = len(one.size)
    place, target = other.corners(), one.corners()
    for order in itertools.permutations(range(n)):
        for flips in itertools.product((0, 1), repeat=n):
            moved = _reindexed(n, order, flips)
            if moved != list(range(2**n)) and np.abs(place[moved] - target).max() <= tolerance:
                axes = "".join("xyz"[a] for a in range(n) if flips[a])
                return f"mirrored along {axes}" if order == tuple(range(n)) else "axes in another order"
    return ""


def _reindexed(n: int, order: tuple[int, ...], flips: tuple[int, ...]) -> list[int]:
    """Corner i (one bit per axis) of the one is this corner of the other."""
    return [sum(((i >> a & 1) ^ flips[a]) << order[a] for a in range(n)) for i in range(2**n)]


def _is_blank(space: Space) -> bool:
    """Whether the header is what libraries write where they are told nothing."""
    return (
        bool((space.spacing == 1).all())
        and not space.origin.any()
        and bool((np.abs(np.abs(space.direction) - np.eye(len(space.size))) < 1e-6).all())
    )


def has_orientation(space: Space | None) -> TypeGuard[Space]:
    """Whether the file says where the axes of a volume lead."""
    return space is not None and space.directed and len(space.size) == 3


def orientation(space: Space) -> str:
    """Where the file's axes lead, as letters: `LPS` = to the patient's left, back and head."""
    letters = ("LR", "PA", "SI")
    found = ""
    for column in space.direction.T:
        axis = int(np.argmax(np.abs(column)))
        found += letters[axis][int(column[axis] < 0)]
    return found


def turned(one: str, other: str) -> str:
    """What has to be done to files in one orientation to be seen as in the other."""
    pairs = {letter: pair for pair in ("LR", "PA", "SI") for letter in pair}
    if [pairs[a] for a in one] != [pairs[b] for b in other]:
        return "with its axes in another order"
    return "mirrored along " + ", ".join("xyz"[i] for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


def _mm(spacing: NDArray[np.float64]) -> str:
    return " x ".join(f"{s:.5g}" for s in spacing)
