"""Which rules of aggregation go with the protocol, the way of collecting and the number of sites that a study names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from concilium.aggregation import least_updates, must_see_updates
from concilium.errors import StudyError
from concilium.messages import PlugIn
from concilium.protocols._cohort import fewest


def rule_problems(found: Mapping[str, Any], n_sites: int) -> list[str]:
    """What a rule does not get from the protocol or from the way of collecting that the study names."""
    p, rule, collect = found["protocol"], found["aggregation"], found["collect"]
    problems = []
    sees = _must_see(rule.name)
    where = f"[aggregation] name = {rule.name!r} is not allowed with"
    if p and p.name == "splitfed" and sees:
        problems.append(
            f"{where} splitfed: it must see each site's update, and only sums are formed there. Allowed: a rule for which the "
            "sum is enough, such as 'mean'."
        )
    if rule.name == "quality" and collect.name == "plain":
        problems.append(
            f"{where} [collect] name = 'plain': nobody judges the updates. Allowed: 'judged'. Add [collect] name = 'judged'."
        )
    if collect.name == "judged" and not sees:
        problems.append(
            f"{where} [collect] name = 'judged': it does not look at single updates, which would be judged for nothing. Allowed: "
            "'quality'. Choose it, or take [collect] out."
        )
    n_sites = fewest(tuple(found["sites"]), p.options, p.min_sites or 1) if p and found["sites"] else n_sites
    return problems or _too_few(rule, n_sites)


def _too_few(rule: PlugIn, n_sites: int) -> list[str]:
    """What a rule cannot do with the sites of the smallest round."""
    faulty, keep = (cast(Any, rule.options.get(key)) if rule.name == "krum" else None for key in ("faulty", "keep"))
    problems = []
    if faulty and n_sites < 2 * faulty + 3:
        problems.append(
            f"[aggregation] faulty = {faulty} is not allowed with {n_sites} sites in a round. Allowed: 0 to "
            f"{max(0, (n_sites - 3) // 2)}, since krum needs 2 · faulty + 3 sites."
        )
    if keep and keep > n_sites >= _least(rule.name):
        problems.append(
            f"[aggregation] keep = {keep} is not allowed with {n_sites} sites in a round. Allowed: 1 to {n_sites}: "
            "no more updates can be kept than there are."
        )
    least = _least(rule.name)
    if not problems and 1 <= n_sites < least:
        problems.append(
            f"[aggregation] name = {rule.name!r} is not allowed with {n_sites} site{'s' * (n_sites != 1)} in a round: of fewer "
            f"than {least} none can be told from the others. Allowed: {least} sites or more in every round ([protocol] "
            "participation, cohorts), or a rule such as 'mean'."
        )
    return problems


def _must_see(rule: str) -> bool:
    try:
        return must_see_updates(rule)
    except StudyError:  # there is no such rule, which is told elsewhere
        return False


def _least(rule: str) -> int:
    try:
        return least_updates(rule)
    except StudyError:
        return 1
