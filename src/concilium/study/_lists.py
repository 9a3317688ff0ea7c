"""Lists of plug-ins in a study: `[[defences]]` and `[[filters]]`, applied in their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from concilium.catalog import fill, names
from concilium.constraints import check_ranges
from concilium.messages import PlugIn

LISTS = {"defences": "defences", "filters": "filters"}
"""List in the study file -> folder of plug-ins."""


def read_lists(raw: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Any], dict[str, tuple[PlugIn, ...]]]:
    """The document without these lists, and the lists; what is wrong with them is added to `problems`."""
    rest = {key: table for key, table in raw.items() if key not in LISTS}
    return rest, {key: _read(key, raw.get(key, []), problems) for key in LISTS}


def _read(key: str, raw: Any, problems: list[str]) -> tuple[PlugIn, ...]:
    if not isinstance(raw, list) or not all(isinstance(table, Mapping) for table in raw):
        problems.append(f"{key} = {raw!r} is not allowed. Expected tables [[{key}]], one for each. Write them so.")
        return ()
    return tuple(_plug_in(key, table, problems) for table in raw)


def _plug_in(key: str, table: Mapping[str, Any], problems: list[str]) -> PlugIn:
    name, where = table.get("name"), f"[[{key}]]"
    if not isinstance(name, str):
        known = ", ".join(names(LISTS[key]))
        problems.append(f"{where} name = {name!r} is not allowed. Known: {known}, or `module:function`. Name one.")
        return PlugIn("")
    given = {option: value for option, value in table.items() if option != "name"}
    options, wrong = fill(LISTS[key], name, given, where)
    problems += wrong
    check_ranges(where, {} if ":" in name else options, problems)
    return PlugIn(name, options)
