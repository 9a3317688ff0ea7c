"""Where a mask, or each label of a label map, lies: metrics look at that part only."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Box: TypeAlias = "tuple[slice, ...]"


def bounding_box(mask: NDArray[np.bool_]) -> Box | None:
    """The smallest box that holds all that is true; `None` for an empty mask."""
    first = next((i for i, plane in enumerate(mask) if plane.any()), None)
    if first is None:
        return None
    last = next(i for i in reversed(range(len(mask))) if mask[i].any())
    # One pass over the planes between; what is beyond them is not read again.
    shadow = np.bitwise_or.reduce(mask[first : last + 1].view(np.uint8), axis=0)
    box = [slice(first, last + 1)]
    for axis in range(shadow.ndim):
        found = np.flatnonzero(shadow.any(axis=tuple(a for a in range(shadow.ndim) if a != axis)))
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def union(boxes: list[Box]) -> Box:
    """The smallest box that holds these, of which there is at least one."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def grown(box: Box, shape: tuple[int, ...]) -> Box:
    """The box with one voxel more on every side, where the array has one."""
    return tuple(slice(max(s.start - 1, 0), min(s.stop + 1, n)) for s, n in zip(box, shape, strict=True))
