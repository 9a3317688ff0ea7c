"""What the parts of `check` hand to each other: findings, and what is remembered of a data set and of a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Severity = Literal["error", "warning", "note"]


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


@dataclass(frozen=True)
class About:
    """What `dataset.json` says, as far as it can be made out; `None` where it cannot."""

    channels: tuple[str, ...] | None = None
    labels: Mapping[str, tuple[int, ...]] | None = None
    """Name -> ids: one, or several for a region."""
    ending: str | None = None
    patients: Mapping[str, str] = field(default_factory=dict)
    annotated: tuple[str, ...] | None = None
    n_stated: int | None = None


@dataclass(frozen=True)
class Files:
    """The files of one case."""

    name: str
    images: Mapping[int, Path]
    label: Path | None
    n_images: int
    """Files of images that there should be."""


@dataclass(frozen=True)
class Listing:
    """A data set before any image is read."""

    site: str
    folder: Path
    about: About
    cases: tuple[Files, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Space:
    """Where voxels lie. Along the file's axes x, y, z: `size` [voxels], `spacing` [mm]; `origin` [mm]; `direction`: columns."""

    size: tuple[int, ...]
    spacing: NDArray[np.float64]
    origin: NDArray[np.float64]
    direction: NDArray[np.float64]
    placed: bool = True

    def corners(self) -> NDArray[np.float64]:
        """Places [mm] of the centres of the corner voxels, (2**d, d), the first axis quickest."""
        n = len(self.size)
        steps = np.array([[(i >> a & 1) * (self.size[a] - 1) for a in range(n)] for i in range(2**n)], float)
        place: NDArray[np.float64] = self.origin + steps * self.spacing @ self.direction.T
        return place


@dataclass(frozen=True)
class Seen:
    """What is remembered of a case once it has been read; never its voxels."""

    site: str
    case: str
    patient: str
    named: bool
    """Whether the patient is from the table."""
    shape: tuple[int, ...] = ()
    """Axes as in the array, without channels."""
    space: Space | None = None
    """None where the format has none."""
    digest: bytes | None = None
    """Of the voxels of all channels, whatever the files' names, types and compression; None where they say nothing."""
    label_digest: bytes | None = None
    values: frozenset[int] | None = None
    """Ids in the label map; None where there is none that can be read."""


def some(names: Sequence[object], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    shown = ", ".join(str(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def count(n: int, noun: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
