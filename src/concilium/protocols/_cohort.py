"""Which of the sites take part in a round: all, a share of them drawn anew each round, or named cohorts that take turns.

A pure function of the sites' names, the seed and the round's number, so that a run that was stopped goes on with the same sites.
Drawing without replacement is the sampling of McMahan et al. 2017 (arXiv:1602.05629, algorithm 1, C) and of Karimireddy et al.
2020 (arXiv:1910.06378). A site that is not asked is sent nothing and keeps its optimiser as it was.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from concilium.aggregation import Block
from concilium.data.draws import digest

Cohorts = Sequence[Sequence[str]]


def cohort(
    steps: Mapping[str, int], number: int, *, participation: float, cohorts: Cohorts, least: int, seed: int
) -> dict[str, int]:
    """The sites of round `number` (from 1), each with its steps, in the order of `steps`.

    Args:
        participation: share of the sites, rounded to the nearest number, but `least` at least, and one.
        cohorts: names that take turns, in place of that; one of whose sites none is there is passed over.
    """
    there = [sites for sites in cohorts if not steps.keys().isdisjoint(sites)]
    if there:
        chosen: Collection[str] = there[(number - 1) % len(there)]
    else:
        n = size(len(steps), participation, least)
        # each site draws for itself: who else is there does not change its number
        chosen = sorted(steps, key=lambda site: (digest(seed, "cohort", number, site), site))[:n]
    return {site: n_steps for site, n_steps in steps.items() if site in chosen}


def restricted(blocks: Sequence[Block], sites: Collection[str]) -> tuple[Block, ...]:
    """The blocks with these sites alone, in their order; a block that none of them has stays, and stays empty."""
    return tuple(replace(b, names={site: names for site, names in b.names.items() if site in sites}) for b in blocks)


def size(n_sites: int, participation: float, least: int) -> int:
    """How many of so many sites a share of them is."""
    share = participation * n_sites
    return min(n_sites, max(1, least, math.floor(share + 0.5) if math.isfinite(share) else 0))


def fewest(sites: Collection[str], options: Mapping[str, Any], least: int) -> int:
    """How many sites the smallest round of a protocol with these options asks."""
    if options.get("cohorts"):
        return min(len(set(names)) for names in options["cohorts"])
    return size(len(sites), options.get("participation", 1.0), least)


def cohort_problems(sites: Collection[str], options: Mapping[str, Any], min_sites: int | None) -> list[str]:
    """What is wrong with the options of a protocol that say who takes part, as sentences for the study's author."""
    cohorts: Cohorts = options.get("cohorts", ())
    if not cohorts:
        return []
    given = f"[protocol] cohorts = {[list(names) for names in cohorts]} is not allowed"
    known = f"Known: {', '.join(sites)}."
    problems = []
    if options.get("participation", 1.0) != 1.0:
        problems.append(
            f"{given} with participation = {options['participation']}. Allowed: one of the two. Take one out."
        )
    strange = sorted({name for names in cohorts for name in names} - set(sites))
    if strange:
        problems.append(f"{given}: no site is called {', '.join(strange)}. {known}")
    left = [site for site in sites if not any(site in names for names in cohorts)]
    if left:
        problems.append(f"{given}: {', '.join(left)} would never take part. Allowed: every site in one cohort or more.")
    if any(not names or len(set(names)) < len(names) for names in cohorts):
        problems.append(f"{given}: a cohort is empty, or names a site twice. Allowed: each with one site or more.")
    elif min_sites is not None and fewest(sites, options, 1) < min_sites:
        problems.append(
            f"[protocol] min_sites = {min_sites} is not allowed with a cohort of {fewest(sites, options, 1)}. Allowed: at most "
            "as many as the smallest cohort has."
        )
    return problems


def left_out(found: Mapping[str, Any], *, personal: bool) -> list[str]:
    """What is wrong in a study (its tables) where every site is to have tensors of its own: one that is never asked has none."""
    p, s, sharing, plan, sites = (found[table] for table in ("protocol", "study", "sharing", "plan", "sites"))
    who = {"participation": p.options.get("participation", 1.0), "cohorts": p.options.get("cohorts", ())}
    reasons = {f"[local_update] name = {found['local_update'].name!r}": personal}
    reasons |= {f"[sharing] keep = {list(sharing.keep)}": bool(sharing.keep)} if sharing else {}
    reasons |= {"[plan] fingerprint = 'site'": plan.fingerprint == "site"} if plan else {}
    reason = next((reason for reason, given in reasons.items() if given), None)
    if reason is None or who == {"participation": 1.0, "cohorts": ()}:
        return []
    least = p.min_sites or min(2, fewest(sites, p.options, 2))
    every = dict.fromkeys(sites, 1)
    problems = []
    for seed in range(s.seed, s.seed + s.seeds):
        asked = {s for number in range(1, p.rounds + 1) for s in cohort(every, number, least=least, seed=seed, **who)}
        if never := [site for site in sites if site not in asked]:
            problems.append(
                f"[protocol] rounds = {p.rounds} is not allowed with {reason}: with seed {seed} {', '.join(never)} would never "
                "take part, and have nothing of their own. Allowed: more rounds, or a larger participation."
            )
    return problems
