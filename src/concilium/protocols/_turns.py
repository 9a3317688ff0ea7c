"""In which order the sites of a chain are visited, and what a study of one may not ask for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from concilium.data.draws import digest


def order_of(sites: Iterable[str], number: int, *, order: Sequence[str], seed: int) -> tuple[str, ...]:
    """The sites in the order of round `number`: the listed one, or drawn for this round."""
    there = tuple(sites)
    if order:
        return tuple(site for site in order if site in there)
    return tuple(sorted(there, key=lambda site: (digest(seed, "turn", number, site), site)))


def turn_problems(
    sites: Collection[str], options: Mapping[str, Any], found: Mapping[str, Any], *, personal: bool
) -> list[str]:
    """What is wrong with a study (its tables) of a protocol in which sites pass one model on."""
    problems = []
    order = options.get("order") or tuple(sites)
    if sorted(order) != sorted(sites):
        problems.append(
            f"[protocol] order = {list(order)} is not allowed. Allowed: every site once ({', '.join(sites)}). Correct it."
        )
    for table, default in (("aggregation", "mean"), ("collect", "plain")):
        if (name := found[table].name) != default:
            problems.append(f"[{table}] name = {name!r} is not allowed with cyclic: nothing is aggregated. Remove it.")
    sharing, plan = found["sharing"], found["plan"]
    if sharing and sharing.keep:
        problems.append(
            f"[sharing] keep = {list(sharing.keep)} is not allowed with cyclic, which passes all tensors on. Allowed: none."
        )
    if plan and plan.fingerprint == "site":
        problems.append(
            "[plan] fingerprint = 'site' is not allowed with cyclic, in which all sites train one network. Allowed: 'pooled'."
        )
    if personal:
        problems.append(
            f"[local_update] name = {found['local_update'].name!r} is not allowed with cyclic, where a site trains nothing of "
            "its own. Allowed: 'plain', and what else changes a step only."
        )
    if (v := found["validation"]) and v.select == "best":
        problems.append(
            "[validation] select = 'best' is not allowed with cyclic: nobody keeps earlier weights. Allowed: 'last'."
        )
    return problems
