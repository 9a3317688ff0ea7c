"""Filters: what is done at a site to an update before it leaves. One file here: one filter.

    filter(update: Tensors, about: Leaving, *, ...options) -> Tensors

`update` is what training changed of each tensor of floats that is sent, float64; a filter leaves it as it is and gives new
tensors of the same names and shapes. Whole numbers (counts of batches) pass unseen. A study's `[[filters]]` are applied in their
order. What is drawn is drawn from torch's generator, which the site seeds from a key of the round, a secret of its own, and the
weights that the round started from. Settings that change nothing leave every bit. Activations are no updates: there are
`defences` for those.

A clipped and noised update bounds what a site as a whole tells, all its data together. That is **no** guarantee for a patient,
whose share of an update nobody has bounded here (that is `dp_sgd`), and results say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from concilium import catalog
from concilium.data.draws import drawn_from
from concilium.errors import ContractError
from concilium.messages import PlugIn, Tensors


@dataclass(frozen=True)
class Leaving:
    """What is known of an update that leaves."""

    model: str
    round: int
    n_steps: int
    n_cases: int
    received: Tensors
    """The weights that the round started from."""


def filtered(
    weights: Mapping[str, torch.Tensor], about: Leaving, filters: Sequence[PlugIn], key: tuple[str | int, ...]
) -> dict[str, torch.Tensor]:
    """The weights that leave in place of these: those received, and the filtered change. Without filters, to the bit the same.

    Raises:
        ContractError: a filter gives other tensors than it got.
        FloatingPointError: it gives values that are not finite.
    """
    floats = {n: t for n, t in weights.items() if t.is_floating_point()}
    change: Tensors = {n: t.double() - about.received[n].double() for n, t in floats.items()}
    first = change
    with drawn_from(*key, "filters"):
        for plug_in in filters:
            after = catalog.load("filters", plug_in.name)(change, about, **plug_in.options)
            if {n: t.shape for n, t in after.items()} != {n: t.shape for n, t in change.items()}:
                raise ContractError(
                    f"Filter {plug_in.name} made {len(after)} tensors of {len(change)}. Expected the same names and shapes. "
                    "Correct the filter."
                )
            change = after
    if not all(bool(torch.isfinite(t).all()) for t in change.values()):
        raise FloatingPointError(f"What filters made of the update of {about.model} is not finite.")
    made = {
        n: weights[n] if change[n] is first[n] else (about.received[n].double() + change[n]).to(weights[n].dtype)
        for n in floats
    }
    return {n: made.get(n, t) for n, t in weights.items()}


def site_level(title: str, filters: Sequence[PlugIn]) -> list[str]:
    """What results say of a setting whose updates are filtered."""
    if not filters:
        return []
    return [
        f"{title}: updates leave through {', '.join(f.name for f in filters)}. What that bounds is at the level of a site, all "
        "its data together; it is no guarantee for a patient."
    ]
