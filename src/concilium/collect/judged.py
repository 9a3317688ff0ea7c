"""As `plain`; then every update goes to the other sites, which judge it on their own validation cases. For the rule `quality`.

A judge answers with the mean soft Dice over its first `cases` validation cases, the same ones in every round. Nobody judges its
own update. Cases are harder at one judge than at another, and no two updates have the same judges; so two updates are
compared by the median, over the judges of both, of the difference of their scores. A judge with wrong labels, or one that
lies, does not decide. With two sites no judge has both, and their quality is the same.

What it costs: with n sites n − 1 times the bytes of a round once more to each site, and segmenting (n − 1) · `cases` cases
there. What it tells: each site sees every other site's update, raw, and the server what a site's cases score with it. A site
whose settings do not say `shown = true` refuses before it trains. One that fails as a judge is a failure of the round; its update
counts all the same. Without validation cases, or with so few that it tells no average, a site does not judge.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from concilium.aggregation import Block
from concilium.collect import Ask, Collected
from concilium.collect._receive import receive
from concilium.collect._same import same_names
from concilium.errors import StudyError
from concilium.messages import Failure, Finish, Judge, Judged, Reply, SiteError, Train, as_failure

Scores = Mapping[tuple[str, str], float]
"""Update and judge -> score."""


def collect(
    ask: Ask,
    requests: Mapping[str, Train | Finish],
    *,
    blocks: Sequence[Block],
    weigh: Callable[[int, float], int],
    asked: Mapping[str, int],
    see_updates: bool = False,
    spool: Path | None = None,
    cases: int = 8,
) -> Collected:
    """Sum the updates as they arrive, and have each judged, where the rule sees them.

    Args:
        cases: how many validation cases each site judges by, at most.

    Raises:
        StudyError: sites do not all have the same tensors, or none of them can judge.
    """
    names = same_names(blocks, requests, way="judged", why="a site cannot use another's network")
    if see_updates:
        requests = _shown(requests)
    got = receive(ask, requests, blocks=blocks, weigh=weigh, asked=asked, see_updates=see_updates, spool=spool)
    if not see_updates or not got.answers:
        return got
    (updates,) = got.updates
    scores: dict[tuple[str, str], float] = {}
    failures: dict[str, Failure] = {}
    about = next(iter(requests.values()))
    for update in updates if len(updates) > 1 else ():
        judges = [other.site for other in updates if other.site != update.site and other.site not in failures]
        weights = {names[key]: update.weights[key] for key in update.weights}
        for judge, reply in ask(dict.fromkeys(judges, Judge(about.model, about.round, weights, cases))):
            problem = _problem(reply, cases)
            if problem is not None:
                failures[judge] = problem
            elif isinstance(reply, Judged) and reply.n_cases:
                scores[update.site, judge] = reply.score
    if len(updates) > 1 and not scores and not failures:
        raise StudyError(
            f"[collect] name = 'judged': no site judged any of {len(updates)} updates. Expected validation cases at two sites or "
            "more, and of 5 patients or more where a site keeps the scores of its cases back. Choose another [aggregation]."
        )
    quality = qualities([update.site for update in updates], scores)
    judged = [replace(update, quality=quality[update.site]) for update in updates]
    return replace(got, updates=(judged,), failures={**got.failures, **failures})


def _shown(requests: Mapping[str, Train | Finish]) -> dict[str, Train | Finish]:
    """The requests, which say that other sites will see the update; sites that share one still do."""
    said = {id(r): replace(r, shown=True) for r in requests.values() if isinstance(r, Train)}
    return {site: said.get(id(r), r) for site, r in requests.items()}


def _problem(reply: Reply | Failure, cases: int) -> Failure | None:
    if not isinstance(reply, Judged):
        return as_failure(reply)
    if not (math.isfinite(reply.score) and 0 <= reply.score <= 1 and 0 <= reply.n_cases <= cases):
        return SiteError("ContractError", "wrong_score", "")
    return None


def qualities(updates: Sequence[str], scores: Scores) -> dict[str, float]:
    """How good each update is: the median score, plus the median over all updates of how much better than that one it is.

    Two updates are compared on what the judges of both gave them, by the median of the differences; where nobody judged both, not
    at all. Compared with itself an update is neither better nor worse.
    """
    level = statistics.median(scores.values()) if scores else 0.0
    judges = sorted({judge for _, judge in scores})
    found = {}
    for update in updates:
        gains = [0.0]
        for other in updates:
            both = [j for j in judges if other != update and {(update, j), (other, j)} <= scores.keys()]
            if both:
                gains.append(statistics.median(scores[update, j] - scores[other, j] for j in both))
        found[update] = level + statistics.median(gains)
    return found
