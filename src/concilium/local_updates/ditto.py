"""Ditto: each site has a network of its own besides, held near to the shared one, which trains as ever.

Li et al. 2021, arXiv:2012.04221, algorithm 1: on each batch the shared network takes a plain step, and the site's own, v,
a step down its loss plus weight / 2 (lambda / 2 in the paper) times the squared distance of v to the weights that the
round started from. With `weight` = 0 it is a network that the site trains alone, on the same batches; the larger it is,
the nearer to the shared one. It begins where the shared one was when the site first trained, and never leaves the site.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concilium.data.patches import Batch
from concilium.errors import ContractError
from concilium.local_updates import Local, pull, take

TOGETHER = COMPUTES_MORE = True
PERSONAL = True


def step(local: Local, batch: Batch, *, weight: float = 0.1) -> Tensor:
    """Take a step with each network; the loss of the shared one before it.

    Args:
        weight: how near a site's own network is held to the shared one; 0: not at all. The paper tries 0.05 to 2.

    Raises:
        ContractError: there is no second network.
    """
    own = local.personal
    if own is None:
        raise ContractError(f"ditto was lent {own} as a second network. Expected one of the site's own. Report this.")
    where = batch.image.device
    with torch.random.fork_rng([where] if where.type == "cuda" else []):  # both draw dropout as if each were alone
        take(own, batch, pull(own, weight))
    return take(local, batch)
