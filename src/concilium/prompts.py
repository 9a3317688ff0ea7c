"""Boxes and points by which a person says what to segment, for networks that can be asked (`sam`).

A file of prompts is JSON: the name of a case, then its boxes, or its boxes and points.

    {"case_001": [[12, 40, 80, 95]],
     "case_002": {"boxes": [[12, 40, 80, 95]], "points": [[[30, 60, 1], [5, 5, 0]]]}}

A box is first column, first row, last column, last row of the image file, in voxels from 0, both ends in it. Points are lists,
one for each prompt, of column, row, and whether the point is in what is meant (1) or beside it (0); as many lists as boxes, where
there are both. Several prompts of a case each give a mask; what any of them says is there is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from concilium.data._resize import resizes
from concilium.data.plan import Plan
from concilium.data.preprocess import Array
from concilium.errors import DataError, StudyError
from concilium.networks import Stages
from concilium.networks.sam import prompted
from concilium.optimization import autocast


@dataclass(frozen=True)
class Prompts:
    """Of one case, N of them."""

    boxes: Tensor | None
    """float64 (N, 4): first column, first row, last column, last row [voxels]."""
    points: Tensor | None
    """float64 (N, P, 2): column, row [voxels]."""
    positive: Tensor | None
    """bool (N, P): whether it is in what is meant."""


def read_prompts(path: Path) -> dict[str, Prompts]:
    """The prompts of each case.

    Raises:
        DataError: the file is no such JSON.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or not table:
            raise TypeError("it is no table of cases")
        return {str(case): _prompts(case, told) for case, told in table.items()}
    except (OSError, ValueError, TypeError) as e:
        raise DataError(
            f'{path} holds no prompts ({e}). Expected JSON such as {{"case_001": [[12, 40, 80, 95]]}}: of each case boxes, each '
            "first column, first row, last column, last row. Correct it."
        ) from e


def _prompts(case: str, told: Any) -> Prompts:
    given = told if isinstance(told, dict) else {"boxes": told}
    if not given or not given.keys() <= {"boxes", "points"}:
        raise TypeError(f"{case} has {', '.join(given) or 'nothing'}, not boxes or points")
    boxes, points = (_numbers(case, key, given[key]) if key in given else None for key in ("boxes", "points"))
    if boxes is not None and (boxes.ndim != 2 or boxes.shape[1] != 4 or not bool((boxes[:, :2] <= boxes[:, 2:]).all())):
        raise TypeError(f"boxes of {case} are not four numbers each, the first two no larger than the last two")
    if points is not None and (points.ndim != 3 or points.shape[2] != 3):
        raise TypeError(f"points of {case} are not lists of column, row, and 1 or 0, a list for each prompt")
    if boxes is not None and points is not None and len(boxes) != len(points):
        raise TypeError(f"{case} has {len(boxes)} boxes and {len(points)} lists of points")
    if points is None:
        return Prompts(boxes, None, None)
    return Prompts(boxes, points[..., :2], points[..., 2] > 0)


def _numbers(case: str, key: str, given: Any) -> Tensor:
    try:
        found = torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"{key} of {case} are no table of numbers") from e
    if not len(found) or not bool(torch.isfinite(found).all()):
        raise TypeError(f"{key} of {case} are empty, or not all finite")
    return found


def check_cases(prompts: Mapping[str, Prompts], cases: Sequence[str], path: Path) -> None:
    """Check that all prompts are for cases that there are.

    Raises:
        DataError: one is not.
    """
    if unknown := [case for case in prompts if case not in cases]:
        raise DataError(
            f"{path} has prompts for {len(unknown)} cases that have no image ({', '.join(unknown[:3])}). Expected names among "
            f"{', '.join(cases[:3])}{', ...' * (len(cases) > 3)}. Correct the names."
        )


def prompts_for(case: str, prompts: Mapping[str, Prompts]) -> Prompts:
    """Those of a case.

    Raises:
        DataError: there are none.
    """
    if case not in prompts:
        raise DataError(
            f"Case {case} has no prompt. Expected a box or a point, since others have some. Add it, or segment the case without "
            "--boxes.",
            code="unusable",
        )
    return prompts[case]


def check_asked(networks: Sequence[nn.Module], plan: Plan) -> None:
    """Check that these networks can be asked.

    Raises:
        StudyError: they cannot, or look at volumes.
    """
    asked = all(
        isinstance(network, Stages) and {"embed", "neck", "decoder"} <= set(network.names) for network in networks
    )
    if not asked or len(plan.patch_size) != 2:
        raise StudyError(
            f"--boxes is not possible with this model, of patches of {len(plan.patch_size)} axes. Allowed: a model of "
            "sam, in 2D. Leave --boxes out."
        )


def answered(
    network: nn.Module,
    image: Array,
    properties: Mapping[str, Any],
    *,
    prompts: Prompts,
    plan: Plan,
    device: torch.device,
    precision: str,
) -> Tensor:
    """Logits (L, 1, H, W) of a preprocessed image (C, 1, H, W): of each label the highest that any prompt gives.

    Raises:
        DataError: a prompt lies outside the image.
    """
    at = placed(prompts, image.shape, properties, plan)
    pixels = torch.from_numpy(image[:, 0].copy())[None].to(device)
    network.to(device).eval()
    with torch.no_grad(), autocast(device, precision):
        found = prompted(cast(Stages, network), pixels, boxes=at.boxes, points=at.points, positive=at.positive)
    logits = found.logits.float().cpu()  # (N, L, H, W)
    return logits.amax(0)[:, None]


def placed(prompts: Prompts, shape: Sequence[int], properties: Mapping[str, Any], plan: Plan) -> Prompts:
    """The prompts in voxels of the preprocessed image, whose `shape` is (C, 1, H, W).

    Raises:
        DataError: a prompt lies outside the image.
    """
    if len(shape) != 4 or shape[1] != 1:
        raise DataError(
            f"Prompts were given for an image of {shape[1]} slices. Allowed: pictures. Leave the case out of the file.",
            code="unusable",
        )
    whole = properties["shape_before_cropping"][-2:]
    if resizes(plan):
        low, size = (0, 0), whole
    else:
        box = properties["bbox_used_for_cropping"][-2:]
        low, size = (int(box[0][0]), int(box[1][0])), [int(b[1]) - int(b[0]) for b in box]
    # (column, row), as prompts have them; files of two axes keep theirs
    begins = torch.tensor([low[1], low[0]], dtype=torch.float64)
    factors = torch.tensor([shape[-1] / size[1], shape[-2] / size[0]], dtype=torch.float64)
    ends = torch.tensor([whole[1], whole[0]], dtype=torch.float64) - 1

    def moved(points: Tensor) -> Tensor:
        if not bool(((points >= 0) & (points <= ends)).all()):
            raise DataError(
                f"A prompt lies outside its image ({points.flatten(0, -2).tolist()[:2]}). Allowed: columns 0 to {int(ends[0])}, "
                f"rows 0 to {int(ends[1])}. Correct the file of prompts.",
                code="unusable",
            )
        return (points + 0.5 - begins) * factors - 0.5

    boxes = None if prompts.boxes is None else moved(prompts.boxes.reshape(-1, 2, 2)).reshape(-1, 4)
    return Prompts(boxes, None if prompts.points is None else moved(prompts.points), prompts.positive)
