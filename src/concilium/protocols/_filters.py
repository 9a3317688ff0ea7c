"""What a study may not say of filters: where something would leave a site beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from concilium.errors import StudyError
from concilium.local_updates import exchanges

FILTERED = ("federated", "splitfed")
"""Protocols in which every update goes through the study's filters."""


def filter_problems(found: Mapping[str, Any]) -> list[str]:
    """What is wrong between filters and the other tables."""
    p, sharing, update = found["protocol"], found["sharing"], found["local_update"].name
    given = f"[[filters]] {', '.join(repr(f.name) for f in found['filters'])} are not allowed with"
    out = "Take them out (of a variant: filters = [])"
    problems = []
    if not found["filters"] or not p:
        return []
    if p.name not in FILTERED:
        problems.append(
            f"{given} protocol {p.name!r}, in which updates leave no site, or sealed for another. Allowed: "
            f"{', '.join(map(repr, FILTERED))}. {out}, or choose one of these."
        )
    if sharing and sharing.unseen != "none":
        problems.append(
            f"{given} [sharing] unseen = {sharing.unseen!r}: what stays would leave once, unfiltered. Allowed: 'none'. {out}, or "
            "choose that."
        )
    try:
        sends_more = exchanges(update)
    except StudyError:  # there is no such update, which is told elsewhere
        sends_more = False
    if sends_more:
        problems.append(
            f"{given} [local_update] name = {update!r}, which sends tensors beside the weights that no filter sees. Allowed: "
            f"'plain' and others that do not. {out}, or choose one of these."
        )
    return problems
