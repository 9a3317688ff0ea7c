"""The server sees the sum of the updates only: each leaves its site under masks that cancel when all are added (`masking.py`).

Bonawitz et al. 2017 (doi:10.1145/3133956.3133982), with the consistency check of its figure 4, in five requests a round:

1. `Hold`: a site trains, holds its update back, tells how many cases and steps it is of, and shows two new public keys;
2. `Deal`: it gets all keys, and divides the secrets behind its masks among all sites;
3. `Mask`: it gets its shares of the others' secrets, and sends its update under one mask for each of them and one of its own;
4. `Agree`: it signs whose masked updates are in the sum;
5. `Unmask`: it gets these signatures, and gives its shares: of the own masks of those in the sum, of the keys of the others.

Sites train first, so that those that fail there, as most that fail do, cost the others nothing. Of one that is lost later the
masks are worked out from the others' shares. In each step `threshold` sites must be left; with fewer nothing is unmasked, and the
round fails. What a site does not do, whatever the server asks: `answers/secure.py`.

What is masked is by how much each value changed since the round's start, times the site's part of what all count: small numbers,
whose steps can be small. 32 bits a value, as many as without masks, say changes of up to 16 to 1.5e-8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from concilium.aggregation import Block, Sum, weight_of
from concilium.collect import Ask, Collected
from concilium.collect._gathering import Gathering
from concilium.collect._same import same_names
from concilium.errors import EngineError, StudyError
from concilium.masking import COUNTS
from concilium.messages import Finish, Masking, Train


def collect(
    ask: Ask,
    requests: Mapping[str, Train | Finish],
    *,
    blocks: Sequence[Block],
    weigh: Callable[[int, float], int],
    asked: Mapping[str, int],
    see_updates: bool = False,
    spool: Path | None = None,
    threshold: int | None = None,
    bits: Literal[16, 32, 64] = 32,
    range: float = 16.0,
) -> Collected:
    """Learn the sum of the updates, and no single one.

    Args:
        threshold: so many sites must be in the sum; omitted: more than half of those asked, and 3 where there are so many.
        bits: of a masked value: 16, 32 or 64.
        range: the largest change of a value in a round; one that changes by more is an error of its site. Values are rounded to
            steps of range · 2 ** (2 - bits). Counters (whole numbers) have ranges of their own: 4096, 2 ** 20 and 2 ** 36.

    Raises:
        StudyError: the rule must see each update, or sites have tensors of their own.
        EngineError: fewer sites are there than must be in the sum, or what was unmasked is no sum of updates.
    """
    trains = _trains(requests, see_updates)
    names = same_names(blocks, requests, way="secure_sum", why="of what few have, the sum tells too much of each")
    how = Masking(threshold_of(threshold, len(requests)), bits, range, _counts(weigh))
    (block,) = blocks
    gathering = Gathering(ask, how, {names[key]: tensor for key, tensor in block.like.items()})
    gathering.hold(trains, asked)
    found = gathering.changes()
    if found is None:
        return Collected((Sum(),), gathering.answers, gathering.failures)
    changes, beside = found
    before = next(iter(trains.values())).weights
    parts = [{key: tensors[name] for key, name in names.items()} for tensors in (before, changes)]
    total = Sum.of(parts, block.like, weight=gathering.weight, count=len(gathering.inside))
    control = Sum()
    if beside:
        like = {name: gathering.like[name] for name in beside}
        nothing = {name: t.new_zeros(t.shape) for name, t in beside.items()}
        control = Sum.of([nothing, beside], like, weight=gathering.n_cases, count=len(gathering.inside))
    return Collected((total,), gathering.answers, gathering.failures, (), control)


def _trains(requests: Mapping[str, Train | Finish], see_updates: bool) -> dict[str, Train]:
    """The requests, which must be such that a sum is enough and a site can hold its update back.

    Raises:
        StudyError: they are not.
    """
    trains = {site: r for site, r in requests.items() if isinstance(r, Train)}
    if see_updates or len(trains) < len(requests):
        reason = "the rule must see each update" if see_updates else "in splitfed the server has a body of each site"
        raise StudyError(
            f"[collect] name = 'secure_sum' is not allowed here: {reason}. Allowed: protocol 'federated', with a rule for which "
            "the sum is enough, such as 'mean'."
        )
    return trains


def threshold_of(given: int | None, n_sites: int) -> int:
    """How many sites must be in a sum over those that are asked.

    Raises:
        StudyError: so few that two halves could be told different things.
        EngineError: more than there are.
    """
    least = max(2, n_sites // 2 + 1)
    threshold = given if given is not None else max(least, min(3, n_sites))
    if threshold > n_sites:
        raise EngineError(
            f"A round of {n_sites} site{'s' * (n_sites != 1)} cannot be summed: {threshold} must be in the sum. Nothing was "
            "asked of them. Mend the sites that are missing, or lower [collect] threshold, and go on with --resume."
        )
    if threshold < least:
        raise StudyError(
            f"[collect] threshold = {threshold} is not possible in a round of {n_sites} sites. Allowed: more than half of them, "
            f"2 at least, and no more than there are ({least} to {n_sites}). Correct it, or have more sites take part."
        )
    return threshold


def _counts(weigh: Callable[[int, float], int]) -> str:
    """What an update counts, in a word that a site knows: it must know by itself how much its own does.

    Raises:
        StudyError: the rule lets updates count otherwise.
    """
    tried = ((1, 1.0), (3, 1.0), (7, 0.5), (100, 0.3))
    for word, rule in COUNTS.items():
        if all(weigh(*each) == weight_of(rule)(*each) for each in tried):
            return word
    raise StudyError(
        "[collect] name = 'secure_sum' is not allowed with a rule in which updates count otherwise than by cases or all the same "
        f"(3 cases count {weigh(3, 1.0)}). Allowed: 'mean', 'unweighted' and others that do. Choose one of these."
    )
