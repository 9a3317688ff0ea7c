"""Two label maps of one case -> a pair of masks for each label, cut to where the label is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from concilium.errors import ContractError
from concilium.metrics import Pair
from concilium.metrics._boxes import Box, grown, union

MAX_ID = 65535


def pairs(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    labels: Mapping[str, int | tuple[int, ...]],
    spacing: tuple[float, ...] | None,
    *,
    counted: NDArray[np.bool_] | None = None,
) -> Iterator[tuple[str, Pair]]:
    """Each label but the background (id 0), with its pair of masks. Equal to masks of the whole maps for every metric.

    The maps are looked through once, not once per label; a pair holds only the part where its label is in either map, and
    one voxel around.

    Args:
        prediction: whole numbers from 0 to 65535 of any type, (X, Y) or (X, Y, Z).
        reference: the same shape.
        labels: name -> id, or ids of the labels that together are a region.
        spacing: [mm] per axis; `None` where unknown.
        counted: the same shape: voxels that count. Elsewhere both masks are empty.

    Raises:
        ContractError: the shapes differ, or a map holds something else.
    """
    for name, other in (("prediction", prediction), ("mask of voxels that count", counted)):
        if other is not None and other.shape != reference.shape:
            raise ContractError(
                f"The {name} is {other.shape}, the reference {reference.shape}. Both must have the same shape. "
                "Resample it to the grid of the reference."
            )
    maps = [_compact(m, counted) for m in (prediction, reference)]
    if reference.ndim == 3 and 1 in reference.shape:  # a slice is 2D: one voxel around it would make it 3D
        axis = reference.shape.index(1)
        maps = [m.squeeze(axis) for m in maps]
        spacing = None if spacing is None else spacing[:axis] + spacing[axis + 1 :]
    return _cut(maps, labels, spacing)


def _cut(
    maps: list[NDArray[Any]], labels: Mapping[str, int | tuple[int, ...]], spacing: tuple[float, ...] | None
) -> Iterator[tuple[str, Pair]]:
    boxes = [ndimage.find_objects(m) for m in maps]
    shape = maps[0].shape
    for label, ids in labels.items():
        wanted = ids if isinstance(ids, tuple) else (ids,)
        if wanted == (0,):
            continue
        found: list[Box] = [b[i - 1] for b in boxes for i in wanted if 0 < i <= len(b) and b[i - 1] is not None]
        box = grown(union(found), shape) if found else (slice(0, 2),) * len(shape)
        prediction, reference = (_mask(m[box], wanted) for m in maps)
        yield label, Pair(prediction, reference, spacing)


def _mask(part: NDArray[Any], ids: tuple[int, ...]) -> NDArray[np.bool_]:
    return part == ids[0] if len(ids) == 1 else np.isin(part, ids)


def _compact(label_map: NDArray[Any], counted: NDArray[np.bool_] | None) -> NDArray[Any]:
    """The map in the smallest type that holds it, in memory order, 0 where nothing counts."""
    largest = label_map.max(initial=0)
    with np.errstate(invalid="ignore"):  # NaN is found below
        ids = np.ascontiguousarray(label_map, dtype=np.uint8 if largest < 256 else np.uint16)
    if ids.dtype != label_map.dtype and not np.array_equal(ids, label_map):
        raise ContractError(
            f"A label map of {label_map.dtype} holds values from {label_map.min()} to {largest}. Allowed are whole numbers "
            f"from 0 to {MAX_ID}. Save it as ids."
        )
    return ids if counted is None else ids * counted
