"""`check`, one file: its voxels as they are stored, and where they lie."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.data._check_types import Space
from concilium.data._description import READERS
from concilium.data._nifti import Payload, is_nifti, scan
from concilium.data.dataset import reader


@dataclass(frozen=True)
class Picture:
    """One file. `voxels`: (C, X, Y, Z) in the order of nnU-Net's readers (the file's last axis first), of the file's own type."""

    voxels: NDArray[Any]
    space: Space | None
    """None where the format has none."""
    n_not_finite: int
    no_spacing: tuple[float, ...] | None = None
    """The header's, where it is none that can be used."""
    flat: bool = False
    """A 2D file in a format for volumes."""


@dataclass(frozen=True)
class Unusable:
    """Why a file cannot be used: `code`, and the end of a sentence that begins with its name."""

    code: str
    why: str


def read_file(path: Path, ending: str) -> Picture | Unusable:
    """The file's voxels and geometry, or why there are none."""
    try:
        return _read_volume(path) if READERS.get(ending) == "SimpleITKIO" else _read_picture(path, ending)
    except Exception as e:  # readers of other people raise what they like
        return Unusable("unreadable", f"cannot be read ({_short(e)}).")


def _read_picture(path: Path, ending: str) -> Picture:
    with contextlib.redirect_stdout(io.StringIO()):
        voxels, _ = reader(ending)().read_images([str(path)])
    return Picture(voxels, None, _n_not_finite(voxels))


def _read_volume(path: Path) -> Picture | Unusable:
    import SimpleITK as sitk

    payload = _whole(path)
    if isinstance(payload, Unusable):
        return payload
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    image = sitk.ReadImage(str(path))
    n, n_values = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if n_values > 1:
        return Unusable("channel_mismatch", f"holds {n_values} values in each voxel: colours, or layers of segments.")
    if n > 4:
        return Unusable("unreadable", f"has {n} dimensions. Allowed are 2 to 4.")
    d = min(n, 3)
    voxels = sitk.GetArrayFromImage(image)
    voxels = voxels[None, None] if n == 2 else voxels[None] if n == 3 else voxels
    space = Space(
        image.GetSize()[:d],
        np.array(image.GetSpacing()[:d]),
        np.array(image.GetOrigin()[:d]),
        np.array(image.GetDirection()).reshape(n, n)[:d, :d],
        payload.placed if payload else True,
    )
    if path.suffix == ".gipl" and path.stat().st_size < 256 + voxels.nbytes:  # ITK reads it without a word
        return Unusable("unreadable", "is cut off.")
    if payload is None:
        return Picture(voxels, space, _n_not_finite(voxels), None, n == 2)
    bad = not all(np.isfinite(s) and s > 0 for s in payload.spacing[:d])
    return Picture(voxels, space, payload.n_not_finite, payload.spacing if bad else None, n == 2)


def _whole(path: Path) -> Payload | Unusable | None:
    """What a NIfTI file holds; None for other formats. Its reader would fill with zeros what a file lacks."""
    if not is_nifti(path):
        return None
    try:
        payload = scan(path)
    except gzip.BadGzipFile as e:
        return Unusable("unreadable", f"is not compressed, or damaged ({e}).")
    except (OSError, EOFError, zlib.error) as e:
        return Unusable("unreadable", f"is cut off or damaged ({_short(e)}).")
    if payload and payload.n_missing:
        why = f"is cut off: {payload.n_missing:,} bytes of voxels are missing that its header announces."
        return Unusable("unreadable", why)
    return payload


def _n_not_finite(voxels: NDArray[Any]) -> int:
    return int(np.count_nonzero(~np.isfinite(voxels))) if np.issubdtype(voxels.dtype, np.inexact) else 0


def _short(e: Exception) -> str:
    """The last line of an error of a library that has something to say."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[-1] if lines else type(e).__name__
