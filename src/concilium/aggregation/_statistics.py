"""Which tensors of a network are measured, not learnt: an optimiser at the server has no business with them."""

from __future__ import annotations

from torch import Tensor

SUFFIXES = ("running_mean", "running_var", "num_batches_tracked")
"""What PyTorch's norms call their running statistics. A network from outside that has others under other names cannot be told
from one that learns them."""


def is_measured(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a running statistic of a norm, by its name, or a whole number."""
    return not tensor.is_floating_point() or name.rpartition(".")[2] in SUFFIXES
