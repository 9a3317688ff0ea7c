"""Ways of collecting that need all sites to have the same tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from concilium.aggregation import Block
from concilium.errors import StudyError


def same_names(blocks: Sequence[Block], sites: Mapping[str, object], *, way: str, why: str) -> Mapping[str, str]:
    """What all sites call the tensors of the network.

    Raises:
        StudyError: they do not all have the same.
    """
    if (
        len(blocks) != 1
        or blocks[0].sites != set(sites)
        or len({tuple(sorted(n.items())) for n in blocks[0].names.values()}) > 1
    ):
        raise StudyError(
            f"[collect] name = {way!r} is not allowed where sites have tensors of their own (here {len(blocks)} groups of sites "
            f"share some): {why}. Allowed there: 'plain', with another [aggregation] than 'quality'."
        )
    return next(iter(blocks[0].names.values()))
