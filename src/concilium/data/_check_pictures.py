"""`check`, pictures and TIFF stacks: what nnU-Net's readers look for beside such a file, and what in it they do not look at."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from concilium.data._check_types import Picture, Space, n_not_finite
from concilium.data._description import FLAT
from concilium.data.dataset import reader

TIFF = (".tif", ".tiff")
TAG = 274
"""Number of the tag of EXIF and TIFF that says how a viewer is to turn the picture; 1: not at all."""
MARKS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""What a PNG file holds if it says so. To read it from all, Pillow would decode all."""


def read_picture(path: Path, ending: str, case: str, *, label_of_stack: bool) -> Picture:
    """The file as nnU-Net's reader of pictures, or of stacks, gives it; raises what that raises.

    Args:
        case: the spacing of a stack lies in a file of this name.
        label_of_stack: it is the label map of an image that is none of the pictures.
    """
    tag = orientation_tag(path)
    told = _spacing_beside(path.with_name(f"{case}.json")) if ending in TIFF else None
    unusable = isinstance(told, str)
    # Either way of reading looks for the spacing under another name: if it is unusable, the wrong one gives voxels at least.
    voxels, flat = _voxels(path, ending, as_label=label_of_stack != unusable)
    if flat:
        return Picture(voxels, None, n_not_finite(voxels), tag=tag)
    where, no_spacing, space = f"{path.parent.name}/{case}.json", None, None
    if isinstance(told, str):
        text = f"{where}, which says the spacing of {path.name}, {told}. Allowed are three numbers above 0."
        no_spacing = text, 'Write the spacing of the acquisition into it: {"spacing": [z, y, x]} in mm.'
    elif told is not None:
        size = voxels.shape[:0:-1]
        space = Space(size, np.array(told[::-1]), np.zeros(3), np.eye(3), directed=False)
    lacks = where if told is None else ""
    return Picture(voxels, space, n_not_finite(voxels), no_spacing, stack=True, lacks=lacks, tag=tag)


def _voxels(path: Path, ending: str, *, as_label: bool) -> tuple[NDArray[Any], bool]:
    """The voxels, and whether they are a picture's."""
    read = reader(ending)()
    with contextlib.redirect_stdout(io.StringIO()):
        voxels, about = read.read_seg(str(path)) if as_label else read.read_images([str(path)])
    return voxels, tuple(about["spacing"]) == FLAT


def _spacing_beside(path: Path) -> tuple[float, ...] | str | None:
    """Along z, y, x [mm], from the file beside a stack; what is wrong with it, in words; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        spacing = json.loads(path.read_text(encoding="utf-8"))["spacing"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return 'holds no "spacing"'
    numbers = isinstance(spacing, list) and len(spacing) == 3 and all(type(s) in (int, float) for s in spacing)
    if not numbers or not all(0 < s < math.inf for s in spacing):
        return f"gives {json.dumps(spacing)}"
    return tuple(float(s) for s in spacing)


def orientation_tag(path: Path) -> int:
    """How viewers are told to turn the picture (1 to 8), from its header; 1 where nothing is said that can be read."""
    try:
        if path.name.endswith(TIFF):
            found = _tag_of_tiff(path)
        elif path.suffix == ".png" and any(mark in path.read_bytes() for mark in MARKS):
            with Image.open(path) as picture:
                found = picture.getexif().get(TAG, 1)
        else:
            found = 1
    except Exception:  # a damaged file is a finding of its own, and a damaged tag none
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _tag_of_tiff(path: Path) -> Any:
    """From the first page's header: Pillow opens few of the types of voxels that a stack may have."""
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(8) if 43 in head[2:4] else b""  # the format for large files
        tags = ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
    return tags.get(TAG, 1)
