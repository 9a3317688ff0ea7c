"""What the parts of `check` hand to each other: findings, and what is remembered of a data set and of a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Severity = Literal["error", "warning", "note"]
REPLACE = "Export it again from its source, or move the case away."
"""What to do about a file that cannot be used."""


@dataclass(frozen=True)
class Mend:
    """A change of files that is right beyond doubt: it decides nothing that only a person can know."""

    how: Literal["rename", "header", "remove", "count"]
    """`count`: `numTraining` becomes the number of complete cases."""
    files: tuple[Path, ...]
    """Those that change."""
    to: Path | None = None
    """`rename`: the right name. `header`: the file whose spacing, origin and direction it gets."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing. It names cases and folders: it is for the site itself, and stays there.

    `error`: training would fail, would set the case aside, or would be silently wrong. `warning`: look at it. `note`: know it.
    """

    severity: Severity
    code: str
    site: str
    case: str | None
    text: str
    """What is wrong, by how much, what is allowed."""
    fix: str
    """What to do."""
    mend: Mend | None = None
    """The same as a change of files, where that is right beyond doubt."""

    @property
    def safe(self) -> bool:
        """Whether `--fix` mends it in a copy."""
        return self.mend is not None


@dataclass(frozen=True)
class About:
    """What `dataset.json` says, as far as it can be made out; `None` where it cannot."""

    channels: tuple[str, ...] | None = None
    labels: Mapping[str, tuple[int, ...]] | None = None
    """Name -> ids: one, or several for a region."""
    ending: str | None = None
    patients: Mapping[str, str] = field(default_factory=dict)
    annotated: tuple[str, ...] | None = None
    by_case: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Case -> what was looked for in it, where `annotated` is a table."""
    n_stated: int | None = None


@dataclass(frozen=True)
class Files:
    """The files of one case."""

    name: str
    images: Mapping[int, Path]
    label: Path | None
    n_images: int
    """Files of images that there should be."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that are there, the label map last."""
        return (*(self.images[i] for i in sorted(self.images)), *([self.label] if self.label else []))

    @property
    def whole(self) -> bool:
        """Whether none is missing."""
        return len(self.images) >= self.n_images and self.label is not None


@dataclass(frozen=True)
class Listing:
    """A data set before any image is read."""

    site: str
    folder: Path
    about: About
    cases: tuple[Files, ...]
    findings: tuple[Finding, ...]

    @property
    def annotated(self) -> tuple[str, ...] | None:
        """The labels that were looked for in some case; `None`: all, in some."""
        named, by_case = self.about.annotated, self.about.by_case
        if not by_case or not all(case.name in by_case for case in self.cases):
            return named
        some_case = {name for case in self.cases for name in by_case[case.name]}
        return tuple(name for name in self.about.labels or {} if name in some_case and (named is None or name in named))


@dataclass(frozen=True)
class Space:
    """Where voxels lie. Along the file's axes x, y, z: `size` [voxels], `spacing` [mm]; `origin` [mm]; `direction`: columns."""

    size: tuple[int, ...]
    spacing: NDArray[np.float64]
    origin: NDArray[np.float64]
    direction: NDArray[np.float64]
    placed: bool = True
    directed: bool = True
    """Whether the format can say where voxels lie at all, and not how large they are only."""

    @property
    def edge(self) -> float:
        """Of a voxel [mm]: the geometric mean of its sides."""
        return float(np.exp(np.log(np.maximum(self.spacing, 1e-9)).mean()))

    @property
    def numbers(self) -> tuple[float, ...]:
        """All that it says, to compare with another's."""
        return (*self.size, *self.spacing, *self.origin, *self.direction.ravel())

    def corners(self) -> NDArray[np.float64]:
        """Places [mm] of the centres of the corner voxels, (2**d, d), the first axis quickest."""
        n = len(self.size)
        steps = np.array([[(i >> a & 1) * (self.size[a] - 1) for a in range(n)] for i in range(2**n)], float)
        place: NDArray[np.float64] = self.origin + steps * self.spacing @ self.direction.T
        return place


@dataclass(frozen=True)
class Picture:
    """One file. `voxels`: (C, X, Y, Z) in the order of nnU-Net's readers (the file's last axis first), of the file's own type."""

    voxels: NDArray[Any]
    space: Space | None
    """None where the format has none, or the file says nothing."""
    n_not_finite: int
    no_spacing: tuple[str, str] | None = None
    """What is wrong with a spacing that cannot be used, and what to do."""
    flat: bool = False
    """A 2D file in a format for volumes."""
    stack: bool = False
    """A volume in TIFF, whose spacing lies in a file beside it."""
    lacks: str = ""
    """That file, where it is not there."""
    tag: int = 1
    """How viewers are told to turn it (EXIF); 1: not at all."""


@dataclass(frozen=True)
class Unusable:
    """Why a file cannot be used: `code`, and the end of a sentence that begins with its name."""

    code: str
    why: str


@dataclass(frozen=True)
class Seen:
    """What is remembered of a case once it has been read; never its voxels."""

    site: str
    case: str
    files: tuple[Path, ...]
    patient: str
    named: bool
    """Whether the patient is from the table."""
    shape: tuple[int, ...] = ()
    """Axes as in the array, without channels."""
    space: Space | None = None
    """None where the format has none, or the file says nothing."""
    lacks: str = ""
    """The file beside it that should say the spacing, where it is not there."""
    digest: bytes | None = None
    """Of the voxels of all channels, whatever the files' names, types and compression; None where they say nothing."""
    label_digest: bytes | None = None
    headers: tuple[object, ...] = ()
    """What the files say besides voxels: equal where those say the same."""
    values: frozenset[int] | None = None
    """Ids in the label map; None where there is none that can be read."""


def n_not_finite(voxels: NDArray[Any]) -> int:
    """How many of them are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(voxels))) if np.issubdtype(voxels.dtype, np.inexact) else 0


def some(names: Sequence[object], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    shown = ", ".join(str(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def count(n: int, noun: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
