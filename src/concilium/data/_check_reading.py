"""`check`, one file: its voxels as they are stored, and where they lie."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from concilium.data._check_pictures import read_picture
from concilium.data._check_types import Picture, Space, Unusable, n_not_finite
from concilium.data._description import READERS
from concilium.data._nifti import Payload, is_nifti, scan


def read_file(path: Path, ending: str, case: str, *, label_of_stack: bool = False) -> Picture | Unusable:
    """The file's voxels and geometry, or why there are none; the arguments are those of `read_picture`."""
    try:
        if path.stat().st_size == 0:
            return Unusable("unreadable", "is empty.")
        if READERS.get(ending) == "SimpleITKIO":
            return _read_volume(path)
        return read_picture(path, ending, case, label_of_stack=label_of_stack)
    except Exception as e:  # readers of other people raise what they like
        return Unusable("unreadable", f"cannot be read ({_short(e)}).")


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
        return Picture(voxels, space, n_not_finite(voxels), None, n == 2)
    return Picture(voxels, space, payload.n_not_finite, _no_spacing(path, payload.spacing[:d]), n == 2)


def _no_spacing(path: Path, spacing: tuple[float, ...]) -> tuple[str, str] | None:
    if all(np.isfinite(s) and s > 0 for s in spacing):
        return None
    given = f"The header of {path.name} gives a spacing of {' x '.join(f'{s:g}' for s in spacing)}"
    text = f"{given}. It must be above 0; the reader would take 0 for 1 mm."
    return text, "Write the spacing of the acquisition [mm] into the header (pixdim), label map included."


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


def _short(e: Exception) -> str:
    """The last line of an error of a library that has something to say."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    if any("Unable to determine ImageIO reader" in line for line in lines):
        return "it is not what its name says"
    return lines[-1] if lines else type(e).__name__
