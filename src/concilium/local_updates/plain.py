"""The step of nnU-Net's own training: forward, loss, backward, clip, optimise.

Isensee et al. 2021, doi:10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

from torch import Tensor

from concilium.data.patches import Batch
from concilium.local_updates import Local, take


def step(local: Local, batch: Batch) -> Tensor:
    """Take one step; the loss before it. Where nothing is annotated there is none to take."""
    return take(local, batch)
