"""What a study may not say of split training, and of defences where nothing is split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from concilium.catalog import names

SPLITS = ("splitfed", "vertical")
"""Protocols in which maps leave a site."""


def split_problems(found: Mapping[str, Any]) -> list[str]:
    """What is wrong between the protocol and the tables that it does not go with."""
    return _cannot_split(found) + _cannot_defend(found)


def _cannot_split(found: Mapping[str, Any]) -> list[str]:
    """What split training does not do (yet), in studies that ask for it."""
    p, t, update = found["protocol"], found["training"], found["local_update"]
    if not p or p.name != "splitfed":
        return []
    problems = []
    if t and t.precision == "float16":
        problems.append(
            "[training] precision = 'float16' is not allowed with splitfed: the scale of the loss would have to travel. "
            "Allowed: 'float32', 'bfloat16'."
        )
    if update.name != "plain":
        problems.append(
            f"[local_update] name = {update.name!r} is not allowed with splitfed: no owner of a part sees the whole step. "
            "Allowed: 'plain'."
        )
    return problems


def _cannot_defend(found: Mapping[str, Any]) -> list[str]:
    """Defences of maps in a study in which none leaves a site."""
    p, defences = found["protocol"], [repr(d.name) for d in found["defences"]]
    splits = [name for name in SPLITS if name in names("protocols")]
    if not p or not defences or p.name in splits:
        return []
    return [
        f"[[defences]] {', '.join(defences)} are not allowed with protocol {p.name!r}: no network is split, so no map leaves a "
        f"site that they could disturb. Allowed: {', '.join(map(repr, splits))}. Take them out (of a variant: defences = []), or "
        "choose such a protocol."
    ]
