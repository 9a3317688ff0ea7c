"""FedProx: a site's weights are held near to those that it received.

Li et al. 2020, arXiv:1812.06127, eq. 2: a site minimises its loss plus mu / 2 times the squared distance of its weights
to those that the round started from, here by a fixed number of steps. The distance is over the parameters that train,
each once; running statistics are no parameters. That slow sites take fewer steps, as in the paper, is not this file's to
say. With Adam the term is a part of the gradient that is normalised, unlike a decay of weights.
"""

from __future__ import annotations

from torch import Tensor

from concilium.data.patches import Batch
from concilium.local_updates import Local, pull, take

TOGETHER = True


def step(local: Local, batch: Batch, *, mu: float = 0.01) -> Tensor:
    """Take one step; the loss before it, without the term.

    Args:
        mu: weight of the term; 0 is `plain`. The paper tries 0.001 to 1.
    """
    return take(local, batch, pull(local, mu))
