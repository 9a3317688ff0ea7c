"""What a study may not say of sites with less memory or time than others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from concilium import catalog
from concilium.errors import StudyError
from concilium.local_updates import is_more_than_a_step

BOX = "box_s"
"""Parameter of a protocol that lets sites stop in time."""


def unequal(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with micro-batches, and with rounds that end in time."""
    return _undivided(found) + _unboxed(found["protocol"])


def _undivided(found: Mapping[str, Any]) -> list[str]:
    """Micro-batches where steps are not taken in parts."""
    p, update, test = found["protocol"], found["local_update"].name, found["test"]
    sites = {n: site.micro_batch for n, site in found["sites"].items() if isinstance(site.micro_batch, int)}
    problems = []
    if test and test.micro_batch is not None:
        problems.append(
            f"[test] micro_batch = {test.micro_batch} is not allowed: nobody trains there. Allowed: at a site. Remove it."
        )
    for name, size in sites.items():
        where = f"[sites.{name}] micro_batch = {size} is not allowed with"
        if p and p.name == "splitfed":
            problems.append(
                f"{where} splitfed: the body sees whole batches. Allowed: another protocol, or a smaller [training] batch_size."
            )
        if _brings(update):
            problems.append(
                f"{where} [local_update] name = {update!r}: its trainer runs whole batches. Allowed: another local update."
            )
    return problems


def _unboxed(p: Any) -> list[str]:
    """Rounds that are to end in time where nobody says in which, or where no site could."""
    if not p or not p.time_box:
        return []
    problems = []
    if p.round_seconds is None:
        problems.append("[protocol] time_box = true is not allowed without round_seconds. Allowed: with it. Add it.")
    if BOX not in inspect.signature(catalog.load("protocols", p.name)).parameters:
        able = [
            n for n in catalog.names("protocols") if BOX in inspect.signature(catalog.load("protocols", n)).parameters
        ]
        problems.append(
            f"[protocol] time_box = true is not allowed with {p.name!r}, whose sites do not choose their steps. Allowed with: "
            f"{', '.join(able)}. Take it out."
        )
    return problems


def _brings(update: str) -> bool:
    try:
        return is_more_than_a_step(update)
    except StudyError:  # no such update, which is told elsewhere
        return False
