"""What stages at a network's beginning that do not train make of views that do not change: computed once, and kept.

Where a study has a fixed number of augmented views of each case (`[training] views`), and the first stages train no tensor, their
maps of a view are the same in every step of every round. They are kept as files in the site's folder, named by a digest of all
that they depend on, and read from then on. The rest of the network trains as it does without.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from concilium.answers import Job
from concilium.data.kept import kept
from concilium.data.labels import Labels
from concilium.data.patches import Batch
from concilium.freezing import digest_of, front_of
from concilium.local_updates import in_parts
from concilium.messages import Prepare
from concilium.networks import Stack, Stages

FOLDER = "features"
"""In the site's folder; what is in it goes when its model is forgotten."""


def views_of(request: Prepare, labels: Labels) -> str:
    """A digest of what views depend on, beside seed and case."""
    told = [request.plans, request.configuration, repr(request.training), repr(labels)]
    return blake2b("\0".join(told).encode(), digest_size=16).hexdigest()


def features_of(
    job: Job, network: nn.Module, folder: Path | None
) -> Callable[[Batch, int | None], Sequence[Tensor]] | None:
    """What answers for stages that do not train, where cases have views that do not change; kept in `folder`."""
    views = None if job.batches is None else job.batches.views_in
    if views is None or folder is None or (divided := front_of(network)) is None:
        return None
    return Features(*divided, folder, about=(job.training.precision, str(views), str(job.seed))).logits


class Features:
    """The maps of views.

    Args:
        front, rest: of the network, as `front_of` divides it.
        folder: of the site.
        about: what views and maps depend on beside the case, its number, and the front's weights.
    """

    def __init__(self, front: Stages, rest: Stages, folder: Path, *, about: Sequence[str]) -> None:
        self._front, self._rest = front, rest
        tensors = {**dict(front.named_parameters()), **dict(front.named_buffers())}
        made_by = blake2b("\0".join([digest_of(tensors), *about]).encode(), digest_size=16).hexdigest()
        self._folder = folder / FOLDER / made_by
        for old in (folder / FOLDER).glob("*"):
            if old != self._folder:  # of other weights, or of other views
                shutil.rmtree(old)

    def logits(self, batch: Batch, size: int | None) -> Sequence[Tensor]:
        """As the whole network says of the batch, `size` patches at a time."""
        each = [
            kept(self._folder, view, partial(self._make, batch.image[i : i + 1])) for i, view in enumerate(batch.views)
        ]
        stack = [torch.cat(maps).to(batch.image.device) for maps in zip(*each, strict=True)]
        return in_parts(lambda *maps: self._rest.run(maps)[::-1], stack, size)

    def _make(self, image: Tensor) -> Stack:
        self._front.eval()  # it trains nothing: as when it is used
        with torch.no_grad():
            return tuple(m.cpu() for m in self._front.run((image,)))
