"""A metric compares two masks of one case. One file here: one metric, named in the study file as the file is.

    metric(pair: Pair, *, ...options) -> float | None        pure: neither mask is changed
    UNIT: "1" or "distance"                                  a distance is in `pair.unit`: mm, or px of unknown size
    HIGHER_IS_BETTER: bool

Keyword-only parameters are options of the study file. `None` means undefined: counted, never averaged as a number.

**Empty masks.** One rule for all metrics, in `status` order:

| status             | dice, iou, nsd | hd95      |
|--------------------|----------------|-----------|
| `ok`               | defined        | defined   |
| `empty_reference`  | 0.0            | undefined |
| `empty_prediction` | 0.0            | undefined |
| `both_empty`       | undefined      | undefined |
| `not_annotated`    | no score       | no score  |

Two empty masks agree, but a score of 1 for them would let the share of empty cases decide a ranking. A label that was
missed or made up altogether scores 0 overlap; its distance has no finite value, and any number in its place would be
arbitrary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from concilium.errors import ContractError
from concilium.metrics._boxes import bounding_box, union
from concilium.metrics._surfaces import Surfaces, measure

NOT_ANNOTATED = "not_annotated"
"""The status of a label that nobody looked for in a case: it has no scores."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two masks of one label in one case.

    Raises:
        ContractError: a mask is not boolean, not 2D or 3D, the shapes differ, or the spacing does not fit them.
    """

    prediction: NDArray[np.bool_]
    """(X, Y) or (X, Y, Z); a 3D array with a single slice is a 2D image."""
    reference: NDArray[np.bool_]
    """The same shape."""
    spacing: tuple[float, ...] | None
    """[mm] per array axis; `None` where unknown: distances are then in pixels."""

    def __post_init__(self) -> None:
        for name, mask in (("prediction", self.prediction), ("reference", self.reference)):
            if mask.dtype != np.bool_ or mask.ndim not in (2, 3):
                raise ContractError(
                    f"The {name} is {mask.ndim}D of {mask.dtype}. Metrics take 2D or 3D masks of bool. "
                    "Compare the label map with one label first."
                )
        if self.prediction.shape != self.reference.shape:
            raise ContractError(
                f"The prediction is {self.prediction.shape}, the reference {self.reference.shape}. "
                "Both must have the same shape. Resample the prediction to the grid of the reference."
            )
        if self.spacing is not None and not (
            len(self.spacing) == self.reference.ndim and all(0 < s < math.inf for s in self.spacing)
        ):
            raise ContractError(
                f"The spacing is {self.spacing} for masks of shape {self.reference.shape}. It must be one positive "
                "number [mm] per axis. Give None where it is unknown."
            )

    @property
    def unit(self) -> str:
        """`mm`, or `px` where the spacing is unknown."""
        return "px" if self.spacing is None else "mm"

    @property
    def squeezed(self) -> Pair:
        """The pair as a 2D one if it is a single slice: the first axis of length 1 of three is dropped."""
        shape = self.reference.shape
        if len(shape) == 2 or 1 not in shape:
            return self
        axis = shape.index(1)
        spacing = None if self.spacing is None else self.spacing[:axis] + self.spacing[axis + 1 :]
        return Pair(self.prediction.squeeze(axis), self.reference.squeeze(axis), spacing)

    @cached_property
    def cropped(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Prediction and reference, squeezed and cut to the smallest box that holds both: all that a metric need read."""
        flat = self.squeezed
        found = [box for box in map(bounding_box, (flat.prediction, flat.reference)) if box is not None]
        box = union(found) if found else (slice(0, 0),) * flat.reference.ndim
        return flat.prediction[box], flat.reference[box]

    @cached_property
    def surfaces(self) -> Surfaces:
        """Surface elements of the squeezed masks and their distances in `unit`, computed once for all metrics."""
        prediction, reference = self.cropped
        spacing = self.squeezed.spacing or (1.0,) * reference.ndim
        return measure(prediction, reference, spacing=tuple(map(float, spacing)))


def status(pair: Pair) -> str:
    """Which masks are empty: `ok`, `empty_reference`, `empty_prediction` or `both_empty`."""
    prediction, reference = pair.cropped
    match bool(prediction.any()), bool(reference.any()):
        case True, True:
            return "ok"
        case True, False:
            return "empty_reference"
        case False, True:
            return "empty_prediction"
        case _:
            return "both_empty"
