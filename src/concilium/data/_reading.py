"""Files -> arrays by nnU-Net's readers; whatever is wrong is a `DataError`, with the reason found."""

from __future__ import annotations

import contextlib
import io
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.data._description import READERS
from concilium.data._nifti import is_nifti, scan
from concilium.data.labels import Labels, all_ids, to_nnunet
from concilium.errors import DataError


def reader(file_ending: str) -> Any:
    """nnU-Net's reader class for this file ending (for `.tif`, one that takes nnU-Net's two in turn).

    Raises:
        DataError: no reader is known for it.
    """
    if file_ending not in READERS:
        raise DataError(
            f"Files end in {file_ending!r}. Known are: {', '.join(READERS)}. Convert the images to one of them."
        )
    if file_ending == ".tif":
        from concilium.data._tiff import TiffIO

        return TiffIO
    from concilium import nnunet_parts  # brings torch along: some seconds

    return getattr(nnunet_parts, READERS[file_ending])


def reader_name(file_ending: str, *, flat: bool) -> str:
    """The name of nnU-Net's reader for a plan; `.tif` files are pictures (`flat`) or volumes. Raises as `reader` does."""
    reader(file_ending)
    return "Tiff3DIO" if file_ending == ".tif" and not flat else READERS[file_ending]


def read_files(paths: Sequence[Path], ending: str, name: str) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """What the reader makes of these files; the reason, where it fails, is found by reading them one by one."""
    read = reader(ending)().read_images
    for path in paths:
        _check_whole(path, name)
    image, properties = _read(read, paths, name)
    spacing = tuple(float(s) for s in properties["spacing"])
    if len(spacing) != 3 or not all(0 < s < math.inf for s in spacing):
        raise DataError(
            f"Case {name} has a spacing of {spacing} mm. Expected three numbers above 0, and one channel per file. Correct the "
            "files.",
            code="geometry_mismatch",
        )
    return image, properties


def read_label(path: Path, ending: str, name: str) -> NDArray[np.float32]:
    """What the reader makes of a label map."""
    _check_whole(path, name)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            label: NDArray[np.float32] = reader(ending)().read_seg(str(path))[0]
        except Exception as e:
            raise unreadable(name, path, e) from e
    return label


def _read(read: Any, paths: Sequence[Path], name: str) -> tuple[NDArray[np.float32], dict[str, Any]]:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            image, properties = read([str(p) for p in paths])
            return image, properties
        except Exception as e:
            failure = e
        single = []
        for path in paths:
            try:
                single.append(read([str(path)]))
            except Exception as e:
                raise unreadable(name, path, e) from e
    shapes = {image.shape[1:] for image, _ in single}
    if len(shapes) > 1:
        raise DataError(
            f"Channels of case {name} have shapes {sorted(shapes)}. All must be equal. Resample them.",
            code="shape_mismatch",
        )
    spacings = [tuple(float(s) for s in properties["spacing"]) for _, properties in single]
    if not np.allclose(spacings[0], spacings):
        raise DataError(
            f"Channels of case {name} have spacings {spacings} mm. All must be equal. Resample them.",
            code="geometry_mismatch",
        )
    raise unreadable(name, paths[0], failure) from failure


def _check_whole(path: Path, name: str) -> None:
    """Check what SimpleITK says nothing about: it fills what a cut-off file lacks with 0, and puts 0 where NIfTI has NaN."""
    try:
        payload = scan(path) if is_nifti(path) else None
    except (OSError, EOFError, zlib.error) as e:
        raise unreadable(name, path, e) from e
    if payload and payload.n_missing:
        raise unreadable(name, path, EOFError(f"{payload.n_missing} bytes of voxels are missing"))
    if payload and payload.n_not_finite:
        raise DataError(
            f"Case {name}: {payload.n_not_finite} voxels of {path} are not finite. All must be. Repair the file.",
            code="not_finite",
        )


def unreadable(name: str, path: Path, error: Exception) -> DataError:
    """The error of a file that cannot be read."""
    return DataError(f"Case {name}: {path} cannot be read ({error}). Replace the file.", code="unreadable")


def check_label(name: str, image: NDArray[Any], label: NDArray[Any], labels: Labels) -> None:
    """Check that a label map (1, X, Y, Z) belongs to its image and holds known ids only; raises `DataError`."""
    if len(label) != 1:
        raise DataError(
            f"The label map of case {name} has {len(label)} channels. Allowed is 1. Save it as ids, not as colours.",
            code="channel_mismatch",
        )
    if label.shape[1:] != image.shape[1:]:
        raise DataError(
            f"Case {name} has an image of {image.shape[1:]} voxels and a label map of {label.shape[1:]}. Both must be equal. "
            "Resample the label map to the image.",
            code="geometry_mismatch",
        )
    if not np.isfinite(label).all():
        raise DataError(f"The label map of case {name} is not finite. It must hold ids. Repair it.", code="not_finite")
    known = np.zeros(label.shape, dtype=bool)
    for value in all_ids(labels):
        known |= label == value
    if not known.all():
        unknown = [f"{v:g}" for v in np.unique(label[~known])]
        raise DataError(
            f"The label map of case {name} holds {some(unknown)}. dataset.json knows "
            f"{', '.join(f'{k} = {v}' for k, v in to_nnunet(labels)['labels'].items())}. Correct one of them.",
            code="unknown_label",
        )


def some(names: Sequence[str]) -> str:
    """The first few of them, as text."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
