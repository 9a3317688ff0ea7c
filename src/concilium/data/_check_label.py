"""`check`, one label map: the ids that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concilium.data._check_types import REPLACE, About, Picture, some

Add = Callable[..., None]


def check_label(label: Picture, about: About, add: Add) -> frozenset[int] | None:
    """The ids in a label map; None where it holds none that can be used."""
    if len(label.voxels) != 1:
        text = f"The label map has {len(label.voxels)} channels. Allowed is 1."
        add("error", "channel_mismatch", text, "Save ids (0, 1, 2, ...), not colours.")
        return None
    if label.n_not_finite:
        text = f"{label.n_not_finite:,} of {label.voxels.size:,} voxels of the label map are NaN or infinite. It must hold ids."
        add("error", "not_finite", text, REPLACE)
    counted = _counted(label.voxels)
    broken = {v: n for v, n in counted.items() if v != int(v)}
    whole = {int(v): n for v, n in counted.items() if v == int(v)}
    size = label.voxels.size
    if broken:
        values = some([f"{v:g}" for v in broken])
        text = f"{_share(sum(broken.values()), size)} of the label map hold no whole numbers ({values})."
        add(
            "error",
            "fractional_label",
            text,
            "It was resampled by interpolation: resample it by nearest neighbour instead.",
        )
    known = {i for ids in (about.labels or {}).values() for i in ids}
    unknown = {v: n for v, n in whole.items() if v not in known} if about.labels else {}
    if unknown:
        hold = f"{_share(sum(unknown.values()), size)} of the label map hold {some(list(unknown))}"
        text = f"{hold}. Allowed: {_ids(about.labels or {})}."
        add("error", "unknown_label", text, _remedy(unknown, known))
    if set(whole) <= {0} and not broken:
        text = "The label map is empty: background only."
        add(
            "warning",
            "empty_label",
            text,
            "Right where the case shows none of the structures; otherwise the annotation is missing.",
        )
    return frozenset(whole)


def _counted(voxels: NDArray[Any]) -> dict[float, int]:
    """Value -> number of voxels, of those that are finite."""
    flat = voxels.ravel()
    if np.issubdtype(flat.dtype, np.floating):
        flat = flat[np.isfinite(flat)]
        whole = flat.astype(np.int64)
        if (whole != flat).any():
            values, n = np.unique(flat, return_counts=True)
            return {float(v): int(k) for v, k in zip(values, n, strict=True)}
        flat = whole
    if not flat.size:
        return {}
    low, high = int(flat.min()), int(flat.max())
    if high - low < 1 << 16:  # much quicker than sorting the voxels
        n = np.bincount((flat - low if low else flat).astype(np.int64, copy=False))
        return {float(low + v): int(n[v]) for v in np.flatnonzero(n)}
    values, n = np.unique(flat, return_counts=True)
    return {float(v): int(k) for v, k in zip(values, n, strict=True)}


def _remedy(unknown: Mapping[int, int], known: set[int]) -> str:
    if set(unknown) == {255} and 1 in known:
        return "If 255 means 1 (a mask saved for viewing), write 1 instead."
    return "Correct the label map, or add the label to dataset.json."


def _share(n: int, of: int) -> str:
    return f"{n:,} voxels ({100 * n / of:.2g} %)"


def _ids(labels: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} = {' + '.join(map(str, ids))}" for name, ids in labels.items())
