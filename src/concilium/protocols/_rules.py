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
    if p and p.name == "splitfed" and collect.name == "judged":
        problems.append(
            "[collect] name = 'judged' is not allowed with splitfed: a site has no whole network to judge. Allowed: 'federated'. "
            "Choose it, or take [collect] out."
        )
    elif p and p.name == "splitfed" and sees and p.options.get("variant") == "sequential":
        problems.append(
            f"{where} splitfed, variant = 'sequential': it compares sites' updates, and there sites take turns. Allowed: "
            "'v1', 'v2' and 'v3', or a rule for which the sum is enough, such as 'mean'."
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
    if collect.name == "secure_sum" and p:
        problems += _unsummed(found, p, sees)
    n_sites = fewest(tuple(found["sites"]), p.options, p.min_sites or 1) if p and found["sites"] else n_sites
    return problems or _too_few(rule, n_sites) or _too_few_summed(found, n_sites)


def _unsummed(found: Mapping[str, Any], p: Any, sees: bool) -> list[str]:
    """Why no secure sum is formed in a study that asks for one."""
    reasons = {
        f"[aggregation] name = {found['aggregation'].name!r}: it must see each site's update": sees,
        "splitfed: its server has each site's body, and the activations that it came of": p.name == "splitfed",
        f"{p.name}: no updates are added up there": p.name in ("local", "centralized"),
        "[plan] fingerprint = 'site': of tensors that few sites have, the sum tells too much of each": (
            found["plan"] and found["plan"].fingerprint == "site"
        ),
    }
    update, bits = found["local_update"].name, found["collect"].options.get("bits")
    small = [
        f"[local_update] name = 'fedadamw' is not allowed with [collect] bits = {bits}: its second moments, squares of "
        "gradients, are smaller than the steps of masked values. Allowed: bits = 64. Set it, or choose another update."
    ]
    return (small if update == "fedadamw" and bits != 64 else []) + [
        f"[collect] name = 'secure_sum' is not allowed with {reason}. Allowed: 'federated', with one plan, and a rule for which "
        "the sum is enough, such as 'mean'. Correct that, or take [collect] out."
        for reason, given in reasons.items()
        if given
    ]


def _too_few_summed(found: Mapping[str, Any], n_sites: int) -> list[str]:
    """What is wrong with how many sites must be in a secure sum, in the smallest round and in the largest."""
    p, collect = found["protocol"], found["collect"]
    if collect.name != "secure_sum" or not p or not found["sites"]:
        return []
    threshold = cast(Any, collect.options.get("threshold"))
    most = max((len(set(names)) for names in p.options.get("cohorts") or ()), default=n_sites)
    if n_sites < 2:
        return [
            "[collect] name = 'secure_sum' is not allowed with one site in a round: a sum of one update is that update. Allowed: "
            "2 sites or more in every round ([protocol] participation, cohorts)."
        ]
    if (threshold or 0) >= 2 and not most / 2 < threshold <= n_sites:
        rounds = f"{n_sites}" if most == n_sites else f"{n_sites} to {most}"
        allowed = f"{most // 2 + 1} to {n_sites}" if most // 2 < n_sites else "none; leave it out"
        return [
            f"[collect] threshold = {threshold} is not allowed with {rounds} sites in a round. Allowed: {allowed}. It must be "
            "more than half of the sites of each round, and no more than there are."
        ]
    return []


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
