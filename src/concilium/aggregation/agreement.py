"""Mean weighted by cases and by how well a site's labels seem to agree with the others', from what its updates tell alone.

It has the aim of QA-SplitFed (Hafezi Kafshgari et al. 2023, arXiv:2304.14976), that sites with wrong masks do not spoil the
model, and takes the two signs by which such sites are told from their training: what they cannot learn stays in their loss,
as in FedA3I (Wu et al. 2024, arXiv:2312.12838), and their updates point elsewhere. The rule itself is Concilium's. In every
round, over the sites k that answered,

    excess_k = loss_k − median(loss)          turn_k = 1 − c_k / median(c), from 0 to 1
    c_k = cosine of (update_k − before) and the coordinate-wise median of all (update − before)

and of both the running mean over rounds, ē_k and t̄_k, with `memory`; they begin at 0, so nobody is suspected before it has
been seen a few times. Then

    tolerated = max(lag · max(|first|, first − median(loss)), 2 · 1.4826 · median |ē|)          first: median(loss) of round 1
    D_k = max(0, ē_k) / tolerated + t̄_k / turn
    weight_k = cases_k · (1 where D_k ≤ 1, falling in a line to 0 at D_k = 1.5)

A site may thus lag behind by a tenth of what the others have learnt, and by what sites differ anyway (two robust standard
deviations: Hampel 1974), or point half as much where the others point: it keeps all its weight, and where all agree this is
`mean`. Half of the masks wrong makes about twice as much. An update ten times as long as the median one is not training, and
gets no weight at once. At least three sites must answer in a round for it to tell anything.

It holds while most sites are right. A site whose cases are much harder than all others' looks like one with wrong labels:
then raise `lag` and `turn`. Wrong labels that all cases of a site share are learnt as easily as right ones and show in the
direction only; `quality` sees them better.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from concilium.aggregation import Update
from concilium.aggregation._each import middle, pieces
from concilium.aggregation._standing import mean_of_parts, recall, remember
from concilium.aggregation._statistics import is_measured
from concilium.messages import Tensors

COMPARES = True
LEAST = 3

FIRST, REACH = "first", "reach"
"""In the state: the median loss of the first round, and what the tolerated lag is a share of."""
TOO_LONG = 10.0
"""Times the median length of an update."""


def rule(
    updates: Sequence[Update],
    state: Tensors,
    *,
    before: Tensors,
    lag: float = 0.1,
    turn: float = 0.5,
    memory: float = 0.7,
) -> tuple[Tensors, Tensors]:
    """The mean of the updates, weighted by cases and agreement.

    Args:
        lag: the share of what others have learnt by which a site may lag behind.
        turn: how much less than the others a site may point where all point.
        memory: what is kept of earlier rounds.
    """
    long = [False] * len(updates)
    if len(updates) >= 3:
        cosines, lengths = directions(updates, before)
        long = [length > TOO_LONG * statistics.median(lengths) for length in lengths]
        state = {**state, **_observed(updates, state, cosines, memory)}
    off = deviations(updates, state, lag=lag, turn=turn)
    parts = [0.0 if out else min(1.0, max(0.0, 3 - 2 * d)) for d, out in zip(off, long, strict=True)]
    weights, given = mean_of_parts(updates, parts)
    return weights, {**state, **given}


def directions(updates: Sequence[Update], before: Tensors) -> tuple[list[float], list[float]]:
    """Of each difference, over all that is learnt: its cosine with the median one (0 where one has no length), and its length."""
    dots, squares = (torch.zeros(len(updates), dtype=torch.float64) for _ in range(2))
    square = 0.0
    for name in (name for name, tensor in before.items() if not is_measured(name, tensor)):
        for values in pieces([*updates, Update(before, 1, 1, 0.0)], name):
            differences = values[:-1] - values[-1]
            median = middle(differences, (len(updates) - 1) // 2)
            dots += differences @ median
            squares += differences.square().sum(dim=1)
            square += float(median @ median)
    lengths = squares.sqrt()
    cosines = torch.where((lengths > 0) & (square > 0), dots / (lengths * square**0.5), 0.0)
    return cosines.tolist(), lengths.tolist()


def _observed(updates: Sequence[Update], state: Tensors, cosines: Sequence[float], memory: float) -> dict[str, Tensor]:
    """What this round adds to what is remembered."""
    losses = [update.loss for update in updates]
    median, usual = statistics.median(losses), statistics.median(cosines)
    first = float(state[FIRST]) if FIRST in state else median
    turns = [min(1.0, max(0.0, 1 - c / usual)) if usual > 0 else 0.0 for c in cosines]
    excess, _ = remember(state, "excess", updates, [x - median for x in losses], memory=memory, start=0.0)
    turned, _ = remember(state, "turn", updates, turns, memory=memory, start=0.0)
    reach = max(abs(first), first - median)
    return {**excess, **turned, FIRST: torch.tensor(first), REACH: torch.tensor(reach)}


def deviations(updates: Sequence[Update], state: Tensors, *, lag: float, turn: float) -> list[float]:
    """How far each site is from the others, in what is tolerated: above 1 is more."""
    excess = recall(state, "excess", updates, start=0.0)
    turned = recall(state, "turn", updates, start=0.0)
    usual = 2 * 1.4826 * statistics.median(map(abs, excess))
    tolerated = max(lag * float(state[REACH]) if REACH in state else 0.0, usual, 1e-12)
    return [max(0.0, e) / tolerated + t / turn for e, t in zip(excess, turned, strict=True)]
