"""Where patches are taken out of their cases, where several parties take the same ones: drawn by all alike, or told.

A place is drawn from a generator of its own, so that what follows, rotations and mirrorings, is the same at a party that draws
places and at one that is told them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from concilium.data.draws import drawn_from
from concilium.errors import ContractError

Key: TypeAlias = tuple[str | int, ...]
"""Of a batch."""
Box: TypeAlias = tuple[list[int], list[int]]
"""The first voxel of a patch, and the one after its last, along each axis of the prepared image."""


class Loader(Protocol):
    """What is asked of nnU-Net's loader."""

    has_ignore: bool
    patch_size: Any
    _data: Any

    def get_bbox(self, data_shape: Any, force_fg: bool, class_locations: Any) -> Box: ...
    def get_do_oversample(self, sample_idx: int) -> bool: ...
    def get_indices(self) -> Any: ...


class Placing:
    """Takes the place of a loader's choice. `follows`: whether places follow the labels, which nobody may then draw without."""

    def __init__(self, loader: Loader, *, follows: bool, labelled: bool) -> None:
        self._loader = loader
        self._blind = follows and not labelled
        self._told: Mapping[Key, Sequence[Sequence[int]]] = {}
        self._next: list[Sequence[int]] = []
        if not follows:
            loader.has_ignore = (
                False  # else patches are centred on what somebody annotated, which one party alone knows
            )
        loader.get_bbox = self  # type: ignore[method-assign]

    def tell(self, places: Mapping[Key, Tensor]) -> None:
        """Use these: of a batch's key, int32 (B, axes), the first voxel of each patch."""
        self._told = {key: of_batch.tolist() for key, of_batch in places.items()}

    def begin(self, key: Key) -> None:
        """The batch of this key is drawn next."""
        if self._blind and key not in self._told:
            raise ContractError(
                f"The places of the patches of batch {key} follow the labels, which are elsewhere, and were not told. Expected "
                "them with the round's first step. Start the round again."
            )
        self._next = list(self._told.get(key, ()))

    def __call__(self, data_shape: Any, force_fg: bool, class_locations: Any) -> Box:
        number = int(np.random.randint(2**31))
        if self._next:
            first = self._next.pop(0)
        else:
            with drawn_from(number, "place"):
                # by way of the class: the loader's own name for it is this object
                first = type(self._loader).get_bbox(self._loader, data_shape, force_fg, class_locations)[0]
        size = [int(n) for n in self._loader.patch_size]
        if len(first) != len(size) or not all(-n < a < m for a, n, m in zip(first, size, data_shape, strict=True)):
            raise ContractError(
                f"A patch of {size} was to begin at {list(first)} of a case of {list(data_shape)} voxels. Expected a place of "
                "which some lies in the case. Start the round again."
            )
        return list(first), [int(a) + n for a, n in zip(first, size, strict=True)]


def places_of(loader: Any, key: Key) -> Tensor:
    """Where the patches of this batch lie, int32 (B, axes), as nnU-Net's loader will draw them."""
    made = []
    with drawn_from(*key):
        for j, case in enumerate(loader.get_indices()):
            image, _, _, about = loader._data.load_case(case)
            made.append(loader.get_bbox(image.shape[1:], loader.get_do_oversample(j), about["class_locations"])[0])
            np.random.randint(2**31)  # of the transforms (`augment.in_step`)
    return torch.tensor(made, dtype=torch.int32)
