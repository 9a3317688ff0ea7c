"""What a study may not say of the division of one data set, and of shifts: as `constraints`, for these tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from concilium.catalog import allowed

DIVISION_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "[partition] test": (
        lambda x: x > 0 and x < 1 if isinstance(x, float) else len(x) > 0,
        "above 0 and below 1, or values",
    ),
    "[partition] pattern": (lambda x: _n_groups(x) == 1, "a regular expression with one group, like '^([a-z]+)_'"),
    "[partition] alpha": (lambda x: 0.01 <= x <= 1e6, "0.01 to 1000000"),
    "[partition] min_patients": (lambda x: x >= 1, "1 or more"),
    "[sites.NAME] values": (lambda x: len(x) > 0, "one or more"),
    "[sites.NAME] share": (lambda x: x > 0, "more than 0"),
    "[sites.NAME] annotated": (lambda x: len(x) > 0, "one or more labels"),
    "[sites.NAME] micro_batch": (lambda x: x == "auto" or x >= 1, "1 or more, or 'auto'"),
    "[sites.NAME.shift] gamma": (lambda x: 0.1 <= x <= 10, "0.1 to 10"),
    "[sites.NAME.shift] noise": (lambda x: 0 <= x <= 10, "0 to 10 (of the image's standard deviation)"),
    "[sites.NAME.shift] blur": (lambda x: 0 <= x <= 50, "0 to 50 mm (or pixels)"),
    "[sites.NAME.shift] bias": (lambda x: 0 <= x < 1, "0 to below 1"),
    "[sites.NAME.shift] spacing": (
        lambda x: len(x) in (2, 3) and all(0.05 <= s <= 50 for s in x),
        "2 or 3 numbers of 0.05 to 50 mm (or pixels)",
    ),
}
"""The same for the division of one data set; `[sites.NAME]` stands for every site and the test set."""

PARTITIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "key": (("key", "pattern", "rest"), ("values",)),
    "csv": (("file", "rest"), ("values",)),
    "size": ((), ("share",)),
    "dirichlet": (("alpha", "min_patients"), ()),
    "labels": (("rest",), ("annotated",)),
}
"""Way to divide -> the keys of [partition] and of a site that it reads, beside those that every way does."""

DEALT = ("values", "share")
"""Keys of a site that only a partition reads."""


def _n_groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error:
        return -1


def undivided(found: Mapping[str, Any], divided: bool) -> list[str]:
    """What is wrong with the division of one data set, or asks for one where there is none."""
    sites, test, p, engine = (found[table] for table in ("sites", "test", "partition", "engine"))
    tables = {f"[sites.{name}]": site for name, site in sites.items()} | ({"[test]": test} if test else {})
    problems = []
    if engine and engine.name == "flare":
        problems += [
            "[partition] is not allowed with engine flare: each hospital has its own data. Remove it."
        ] * divided
        problems += [
            f"{where[:-1]}.shift] is not allowed with engine flare. Allowed: in a simulation. Remove it."
            for where, table in tables.items()
            if table.shift
        ]
    used = PARTITIONS[p.by][1] if p else DEALT if divided else ()
    for where, table in tables.items():
        for key in DEALT:
            if getattr(table, key) is not None and (key not in used or where == "[test]"):
                ways = [f"by = {way!r}" for way, (_, keys) in PARTITIONS.items() if key in keys]
                problems.append(
                    f"{where} {key} = {_plain(getattr(table, key))} is not allowed here. Allowed: at a site, with [partition] "
                    f"{' or '.join(ways)}. Remove it, or divide so."
                )
    return problems + (_misdivided(p, sites, test) if p else [])


def _misdivided(p: Any, sites: Mapping[str, Any], test: Any) -> list[str]:
    """What is wrong within a partition whose values are each allowed."""
    used = PARTITIONS[p.by][0]
    problems = []
    for key in sorted({key for keys, _ in PARTITIONS.values() for key in keys}):
        value = getattr(p, key)
        if value is not None and key not in used:
            problems.append(
                f"[partition] {key} = {_plain(value)} is not used by = {p.by!r}. "
                f"Used there: {', '.join(used) or 'none'}. Remove it."
            )
    if p.by == "key" and (p.key is None) == (p.pattern is None):
        problems.append(
            f"[partition] key = {p.key!r}, pattern = {p.pattern!r} is not allowed. Allowed: exactly one of the two."
        )
    needed = {"csv": ("file", "a path"), "dirichlet": ("alpha", "a number")}.get(p.by)
    if needed and getattr(p, needed[0]) is None:
        problems.append(f"[partition] {needed[0]} is missing. by = {p.by!r} needs it ({needed[1]}). Add it.")
    if "rest" in used and p.rest is not None and p.rest not in sites:
        problems.append(f"[partition] rest = {p.rest!r} is not allowed. {allowed(p.rest, sites)}")
    if isinstance(p.test, tuple) and p.by not in ("key", "csv"):
        problems.append(
            f"[partition] test = {list(p.test)} is not allowed by = {p.by!r}. Allowed: above 0 and below 1, the share of "
            "patients."
        )
    return problems + _two_sources(p, sites, test) + _unclear(p, sites)


def _two_sources(p: Any, sites: Mapping[str, Any], test: Any) -> list[str]:
    """Data that would come from the partition and from elsewhere, or from nowhere."""
    problems = []
    for name, site in sites.items():
        if site.data is not None:
            problems.append(
                f"[sites.{name}] data = '{site.data}' is not allowed with [partition], which divides one data set. "
                "Remove one of both."
            )
    if p.test is not None and test is not None and test.data is not None:
        problems.append(
            f"[partition] test = {_plain(p.test)}, [test] data = '{test.data}' is not allowed. Allowed: one of the two."
        )
    if p.test is None and test is not None and test.data is None:
        problems.append("[test] data is missing. Expected a path, or a share in [partition] test. Add one.")
    return problems


def _unclear(p: Any, sites: Mapping[str, Any]) -> list[str]:
    """Values that two sites have, shares or labels that only some have."""
    problems = []
    owners: dict[str, list[str]] = {}
    for name, site in sites.items() if p.by in ("key", "csv") else ():
        for value in site.values or (name,):
            owners.setdefault(value, []).append(name)
    for value in p.test if isinstance(p.test, tuple) else ():
        owners.setdefault(value, []).append("test")
    problems += [
        f"[sites] values: {value!r} belongs to {' and '.join(names)}. Allowed: one site for each value. Correct them."
        for value, names in owners.items()
        if len(names) > 1
    ]
    without = [name for name, site in sites.items() if site.share is None]
    if p.by == "size" and 0 < len(without) < len(sites):
        problems.append(
            f"[sites] share is missing for {', '.join(without)}. Allowed: a share for every site, or for none. Add it."
        )
    if p.by == "labels":
        problems += [
            f"[sites.{name}] annotated is missing. by = 'labels' needs it (a list, each text). Add it."
            for name, site in sites.items()
            if site.annotated is None
        ]
    return problems


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else repr(str(value) if isinstance(value, Path) else value)
