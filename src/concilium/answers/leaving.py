"""What leaves a site in place of the weights that it trained, where the study has filters."""

from __future__ import annotations

from concilium.answers import Job
from concilium.data.draws import Secret
from concilium.filters import Leaving, filtered
from concilium.freezing import digest_of
from concilium.messages import Tensors


def leaving(job: Job, weights: Tensors, received: Tensors, *, model: str, round: int, n_steps: int) -> Tensors:
    """The weights that leave: those received, and what the study's filters make of the change.

    Args:
        received: what the round started from; empty: of this model nothing is filtered.
    """
    if not (job.filters and received and weights):
        return weights
    about = Leaving(model, round, n_steps, len(job.entries["training"]), received)
    key = (job.seed, job.site, model, round, Secret(job.secret), job.told, digest_of(received))
    return filtered(weights, about, job.filters, key)
