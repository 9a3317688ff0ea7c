"""The variants of a study: what each of them changes, as the tables of a study of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from concilium.catalog import allowed
from concilium.study._lists import LISTS

CHANGEABLE = (
    "protocol",
    "plan",
    "preprocessing",
    "network",
    "training",
    "aggregation",
    "collect",
    "loss",
    "local_update",
    "defences",
    "filters",
    "sharing",
    "personalize",
)
FIXED = ("study", "sites", "test", "partition", "validation", "engine", "forecast", "variants")
"""Tables of the study that all its variants share: who takes part, and which cases are held out."""


def variant_tables(raw: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Variant -> its whole study as tables. What is wrong with a variant's name or tables is added to `problems`.

    A key given in a variant replaces that of the base study. Where a table names another plug-in, the base table's options go;
    of a protocol's table what every protocol has stays. `steps` takes the place of `epochs`, and `epochs` of `steps`.
    """
    variants = raw.get("variants", {})
    if not isinstance(variants, Mapping):
        problems.append(f"variants = {variants!r} is not allowed. Expected tables [variants.NAME]. Correct it.")
        return {}
    base = {key: table for key, table in raw.items() if key != "variants"}
    taken = {str(base.get("protocol", {}).get("name", "federated")), "local", "centralized", "centralized_long"}
    found = {}
    for name, tables in variants.items():
        before = len(problems)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name) or name in taken:
            problems.append(
                f"[variants.{name}] is not a name for a variant. Allowed: letters, digits and _, but not "
                f"{', '.join(sorted(taken))}. Rename it."
            )
        elif not isinstance(tables, Mapping) or not tables:
            problems.append(
                f"[variants.{name}] = {tables!r} is not allowed. Expected tables that it replaces. Add one."
            )
        else:
            problems += _wrong_tables(name, tables)
        if len(problems) == before:
            found[name] = {**base, **{key: _changed(key, base.get(key, {}), table) for key, table in tables.items()}}
            own = tables.get("protocol", {})
            found[name]["protocol"] = {**found[name].get("protocol", {}), "compare": own.get("compare", [])}
    return found


def _wrong_tables(name: str, tables: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, table in tables.items():
        if key in FIXED:
            problems.append(
                f"[variants.{name}] {key} is not allowed: variants share sites, folds and test set. Allowed: "
                f"{', '.join(CHANGEABLE)}. Make it a study of its own."
            )
        elif key not in CHANGEABLE:
            problems.append(f"[variants.{name}] {key} is not known. {allowed(key, CHANGEABLE)}")
        elif key in LISTS:
            continue  # read as those of a study are
        elif not isinstance(table, Mapping):
            problems.append(f"[variants.{name}] {key} = {table!r} is not allowed. Expected a table. Write one.")
    compare = tables.get("protocol", {})
    if isinstance(compare, Mapping) and compare.get("compare"):
        problems.append(
            f"[variants.{name}] protocol.compare = {compare['compare']!r} is not allowed. Allowed: [protocol] compare of the "
            "study itself, whose baselines serve its variants too. Move it there."
        )
    return problems


def _changed(key: str, base: Any, table: Any) -> Any:
    """A table of the base study with a variant's keys in place of its own; a list as a whole."""
    if key in LISTS:
        return table
    if not isinstance(base, Mapping):
        return dict(table)
    kept = dict(base)
    if "name" in table and table["name"] != base.get("name"):
        common = ("rounds", "steps", "epochs", "min_sites", "round_seconds", "time_box")
        kept = {k: v for k, v in kept.items() if key == "protocol" and k in common}
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if given in table:
            kept.pop(other, None)
    return kept | dict(table)


def drawn_anew(study: Any, variant: Any) -> dict[str, Any]:
    """What a variant's table of the network says beside its changes, where it has the study's network and not its weights."""
    same = variant.network.name == study.network.name
    return {"weights": ""} if same and study.start.weights and not variant.start.weights else {}
