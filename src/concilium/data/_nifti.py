"""The bytes of a NIfTI file, beside the library that reads it.

ITK replaces voxels of NIfTI files that are not finite by 0, fills what a file lacks with 0, and takes a spacing of 0 for 1 mm,
all without a word (measured with SimpleITK 2.5, which has no setting against it; voxels of NRRD, MHA and GIPL files are kept).
What a file holds is found here, from the header's 348 or 540 bytes (NIfTI-1, NIfTI-2) and a pass over the voxels in pieces.
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

PIECE = 1 << 22
"""Bytes read at a time; a multiple of the size of every kind of voxel."""
FLOATS = {16: "f4", 32: "f4", 64: "f8", 1792: "f8"}
"""NIfTI's datatype -> the floats that its voxels are made of (complex ones of two)."""


@dataclass(frozen=True)
class Payload:
    """What a NIfTI file holds. `size` [voxels] and `spacing` [of the header's unit] along the file's axes, up to three."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    placed: bool
    """Whether the header says where the voxels lie (qform_code or sform_code above 0)."""
    n_dimensions: int
    n_not_finite: int
    n_missing: int
    """Bytes that the header announces and the file lacks."""


def is_nifti(path: Path) -> bool:
    """Whether the file's name says that it is one."""
    return path.name.endswith((".nii", ".nii.gz"))


def scan(path: Path) -> Payload | None:
    """What the file holds, read to its end; `None` where it has no NIfTI header (its reader will say so).

    Raises:
        OSError, EOFError, zlib.error: it cannot be read, or its compressed part is damaged or cut off.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        head = file.read(544)
        found = _header(head)
        if found is None:
            while file.read(PIECE):
                pass
            return None
        size, spacing, n_dimensions, kind, n_bytes, offset, placed = found
        rest = head[min(offset, len(head)) :]
        for skipped in range(len(head), offset, PIECE):
            file.read(min(PIECE, offset - skipped))
        not_finite, present = _pass(file, rest, kind, n_bytes)
    return Payload(size[:3], spacing[:3], placed, n_dimensions, not_finite, max(0, n_bytes - present))


def _header(head: bytes) -> tuple[tuple[int, ...], tuple[float, ...], int, str, int, int, bool] | None:
    """Size, spacing, number of dimensions, kind of floats (or ""), bytes of all voxels, where they begin, whether placed."""
    for order in "<>":
        if len(head) >= 348 and struct.unpack_from(order + "i", head)[0] == 348:
            dim = struct.unpack_from(order + "8h", head, 40)
            pixdim = struct.unpack_from(order + "8f", head, 76)
            kind, bits = struct.unpack_from(order + "2h", head, 70)
            (start,) = struct.unpack_from(order + "f", head, 108)
            codes, least = struct.unpack_from(order + "2h", head, 252), 352
        elif len(head) >= 540 and struct.unpack_from(order + "i", head)[0] == 540:
            dim = struct.unpack_from(order + "8q", head, 16)
            pixdim = struct.unpack_from(order + "8d", head, 104)
            kind, bits = struct.unpack_from(order + "2h", head, 12)
            (start,) = struct.unpack_from(order + "q", head, 168)
            codes, least = struct.unpack_from(order + "2i", head, 344), 544
        else:
            continue
        n = dim[0]
        if not 1 <= n <= 7 or any(d < 1 for d in dim[1 : n + 1]) or not math.isfinite(start):
            return None
        floats = order + FLOATS[kind] if kind in FLOATS else ""
        n_bytes = math.prod(dim[1 : n + 1]) * bits // 8
        start = max(int(start), least)
        return tuple(dim[1 : n + 1]), tuple(pixdim[1 : n + 1]), n, floats, n_bytes, start, any(c > 0 for c in codes)
    return None


def _pass(file: IO[bytes] | gzip.GzipFile, rest: bytes, kind: str, n_bytes: int) -> tuple[int, int]:
    """Numbers of voxels that are not finite, and of bytes that are there, up to `n_bytes`; the file is read to its end."""
    not_finite = present = 0
    piece = rest + file.read(PIECE - len(rest))
    while piece:
        if kind and present < n_bytes:
            whole = piece[: min(len(piece), n_bytes - present) // np.dtype(kind).itemsize * np.dtype(kind).itemsize]
            not_finite += int(np.count_nonzero(~np.isfinite(np.frombuffer(whole, kind))))
        present += len(piece)
        piece = file.read(PIECE)
    return not_finite, present
