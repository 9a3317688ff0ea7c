"""Mean weighted by cases and by how good others find each update.

It has the aim of QA-SplitFed (Hafezi Kafshgari et al. 2023, arXiv:2304.14976), which weights sites by the quality of their
annotations, and uses what other sites' validation cases say of it, as Zeno does with the server's (Xie et al. 2019,
arXiv:1805.10032).

    r_k = min(1, (q_k + 0.05) / (m_k + 0.05))          q_k: quality of the update, m_k: median of the others' qualities
    weight_k = cases_k · r̄_k ^ sharpness, and 0 where r̄_k < cutoff          r̄_k: running mean of r_k over rounds, from 1

Qualities come from `[collect] name = "judged"`, and are from 0 to 1. A site with wrong masks makes weights that fit nobody
else's. One that is as good as the others, or better, keeps the weight of its cases: where all are alike this is `mean`, and
nobody gains by luck. The 0.05 lets differences count little while all are poor.

It holds while most judges are right, and looks at what an update does, not at the labels: wrong ones that do the others no
harm cost a site nothing. A site that images otherwise than all others is judged on their images: where its own matter, lower
`cutoff`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from concilium.aggregation import Update
from concilium.aggregation._standing import mean_of_parts, remember
from concilium.errors import StudyError
from concilium.messages import Tensors

COMPARES = True
LEAST = 3

POOR = 0.05
"""A quality below which differences say little."""


def rule(
    updates: Sequence[Update],
    state: Tensors,
    *,
    before: Tensors,
    sharpness: float = 2.0,
    cutoff: float = 0.85,
    memory: float = 0.7,
) -> tuple[Tensors, Tensors]:
    """The mean of the updates, weighted by cases and quality.

    Args:
        sharpness: power of the ratio to the others' quality; 0: only the cutoff acts.
        cutoff: a site whose ratio is below it gets no weight.
        memory: what is kept of earlier rounds.

    Raises:
        StudyError: nobody was asked what the updates are worth.
    """
    qualities = [update.quality for update in updates if update.quality is not None]
    if len(qualities) < len(updates):
        raise StudyError(
            f"[aggregation] name = 'quality' got {len(updates) - len(qualities)} of {len(updates)} updates without a quality. "
            "Expected one of each. Add [collect] name = 'judged', which has sites judge each other's updates."
        )
    ratios = [ratio(i, qualities) for i in range(len(updates))]
    kept, means = remember(state, "ratio", updates, ratios, memory=memory, start=1.0)
    weights, given = mean_of_parts(updates, [0.0 if r < cutoff else r**sharpness for r in means])
    return weights, {**state, **kept, **given}


def ratio(place: int, qualities: Sequence[float]) -> float:
    """Of one quality to the median of the others, from 0 to 1; 1 for one alone."""
    others = [*qualities[:place], *qualities[place + 1 :]]
    if not others:
        return 1.0
    usual = max(0.0, statistics.median(others))
    return min(1.0, (max(0.0, qualities[place]) + POOR) / (usual + POOR))
