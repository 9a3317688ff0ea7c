"""Segment-Anything asked by boxes and points, one image at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from concilium.errors import ContractError
from concilium.networks import Stages
from concilium.networks._sam_decoder import FIRST_CORNER, LAST_CORNER, NEGATIVE, POSITIVE, Decoder
from concilium.networks._sam_stages import Embed, Head

NONE = -1
"""No point: beside points without a box there is one, as the authors do."""


@dataclass(frozen=True)
class Answers:
    """What the network says to N prompts on one image."""

    masks: Tensor
    """Logits (N, 4, H, W): the mask for a prompt that leaves no doubt, and three for one that does."""
    quality: Tensor
    """(N, 4): the intersection over union that the network expects of each."""
    coarse: Tensor
    """The masks before they were enlarged, (N, 4, 4h, 4w)."""
    logits: Tensor
    """Of the study's labels (N, L, H, W), made of the masks as without a prompt."""


def prompted(
    network: Stages,
    image: Tensor,
    *,
    boxes: Tensor | None = None,
    points: Tensor | None = None,
    positive: Tensor | None = None,
) -> Answers:
    """Segment what boxes and points show on an image; with the same weights as the authors' `Sam`.

    Weights that were trained without prompts only, as `sam` trains them, have not learnt to be asked.

    Args:
        network: `sam`, in 2D, all of it at one place.
        image: (1, C, H, W), preprocessed.
        boxes: (N, 4), each first column, first row, last column, last row [voxels]; one for each prompt.
        points: (N, P, 2), each column, row; as many prompts as boxes, where there are both.
        positive: bool (N, P): whether a point is in what is meant, or beside it; omitted: all are in it.

    Raises:
        ContractError: there is no prompt, or shapes do not fit together.
    """
    _check(image, boxes, points, positive)
    names = network.names
    front = Stages({name: network[name] for name in names[: names.index("decoder")]})
    embed, decoder, head = network["embed"], network["decoder"], network["head0"]
    if not (isinstance(embed, Embed) and isinstance(decoder, Decoder) and isinstance(head, Head)):
        raise ContractError(f"Prompts need the network sam. The stages are {', '.join(names)}. Use a model of sam.")
    frame, embedding = front.run((image,))
    h, w = embedding.shape[2:]
    at, kinds = _joined(boxes, points, positive)
    vectors = decoder.prompts.points(at.to(image.device), kinds.to(image.device), (h * embed.patch, w * embed.patch))
    large, tokens = decoder.decode(embedding.expand(len(vectors), -1, -1, -1), vectors)
    coarse = head.masks_of(large, tokens)
    return Answers(head.enlarged(coarse, frame), head.quality(tokens[:, 0]), coarse, head.logits_of(coarse, frame))


def _joined(boxes: Tensor | None, points: Tensor | None, positive: Tensor | None) -> tuple[Tensor, Tensor]:
    """All points (N, P, 2), and what each is (N, P): those given, then the corners of the box, or none."""
    at, kinds = [], []
    if points is not None:
        inside = torch.ones(points.shape[:2], dtype=torch.bool) if positive is None else positive.cpu()
        at, kinds = [points.cpu().double()], [torch.where(inside, POSITIVE, NEGATIVE)]
        if boxes is None:
            at.append(torch.zeros(len(points), 1, 2, dtype=torch.float64))
            kinds.append(torch.full((len(points), 1), NONE))
    if boxes is not None:
        at.append(boxes.cpu().double().reshape(-1, 2, 2))
        kinds.append(torch.tensor([[FIRST_CORNER, LAST_CORNER]]).expand(len(boxes), -1))
    return torch.cat(at, dim=1), torch.cat(kinds, dim=1)


def _check(image: Tensor, boxes: Tensor | None, points: Tensor | None, positive: Tensor | None) -> None:
    given = [tuple(t.shape) for t in (boxes, points, positive) if t is not None]
    fits = image.ndim == 4 and len(image) == 1 and (boxes is not None or points is not None)
    fits &= boxes is None or (boxes.ndim == 2 and boxes.shape[1] == 4)
    fits &= points is None or (points.ndim == 3 and points.shape[2] == 2)
    fits &= positive is None or (points is not None and positive.shape == points.shape[:2])
    if not fits or len({shape[0] for shape in given}) != 1:
        raise ContractError(
            f"An image {tuple(image.shape)} and prompts {', '.join(map(str, given)) or 'of no kind'} do not fit. Allowed: an "
            "image (1, C, H, W), boxes (N, 4), points (N, P, 2), positive (N, P), at least one of boxes and points. Correct them."
        )
