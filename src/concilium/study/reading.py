"""From a study file (TOML) to a `Study` and back; every error of a file is told at once."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from concilium.catalog import allowed, coerce, fill, names, options, spell
from concilium.constraints import check_range, check_ranges, confusions, contradictions
from concilium.data.division_rules import undivided
from concilium.data.partition import Partition
from concilium.data.shifts import Shift
from concilium.errors import StudyError
from concilium.messages import PlugIn
from concilium.study._hardware import unequal
from concilium.study._lists import LISTS, read_lists
from concilium.study._parties import is_vertical, misparted, parted, sites_of
from concilium.study._sharing import misshared, spelled_out
from concilium.study._trainers import network_of_trainer, overruled
from concilium.study._variants import FIXED, drawn_anew, variant_tables
from concilium.study.tables import ForecastTable, ProtocolTable, SiteTable, StartTable, Study, least_sites, training_of

T = TypeVar("T")
RESERVED = ("test", "pooled", "server", "all")
"""Names that no site may have: the simulation uses them itself."""

PLUG_INS = {
    "network": "networks",
    "aggregation": "aggregation",
    "collect": "collect",
    "loss": "losses",
    "local_update": "local_updates",
}
"""Table of the study file -> folder of plug-ins."""


def read_study(path: Path, *, check_data: bool = True) -> Study:
    """The study in a TOML file, every default filled in and every path absolute; with `check_data` the data must be there.

    Raises:
        StudyError: the file is no study; the message lists every error in it.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise StudyError(
            f"The study file {path} cannot be read ({e.strerror}). Expected a TOML file. Check the path."
        ) from e
    except (ValueError, RecursionError) as e:  # no TOML, no UTF-8, a number or a nesting without end
        raise StudyError(f"The study file {path} is not valid TOML ({e}). Correct it there.") from e
    return parse_study(raw, folder=path.parent.resolve(), source=str(path), check_data=check_data)


def parse_study(raw: Mapping[str, Any], *, folder: Path, source: str = "study", check_data: bool = True) -> Study:
    """The study in a parsed TOML document; relative paths are taken from `folder`.

    Raises:
        StudyError: lists every error in it.
    """
    problems: list[str] = []
    study = _parse(raw, folder, problems, check_data=check_data)
    variants: dict[str, Study] = {}
    for name, tables in variant_tables(raw, problems).items():
        wrong: list[str] = []
        variant = _parse(tables, folder, wrong, check_data=False)
        variants |= {name: variant} if variant else {}
        problems += [f"[variants.{name}]: {problem}" for problem in wrong if problem not in problems]
    if problems or study is None:
        raise StudyError(
            f"{source} has {len(problems)} error{'s' * (len(problems) > 1)}:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    return dataclasses.replace(study, variants=variants)


def _parse(raw: Mapping[str, Any], folder: Path, problems: list[str], *, check_data: bool) -> Study | None:
    """The study without its variants; `None` if it has errors, which are added to `problems`."""
    before = len(problems)
    raw, lists = read_lists({key: table for key, table in raw.items() if key != "variants"}, problems)
    hints = {key: hint for key, hint in typing.get_type_hints(Study).items() if key != "start"}
    for key in raw:
        if key not in hints:
            problems.append(f"[{key}] is not a known table. {allowed(key, hints)}")
    tables = {key: value for key, value in raw.items() if key in hints and isinstance(value, Mapping)}
    problems += [
        f"{key} = {raw[key]!r} is not allowed. Expected a table [{key}]."
        for key in raw
        if key in hints and key not in tables
    ]

    found: dict[str, Any] = {**lists, "protocol": _protocol(tables.get("protocol", {}), problems)}
    for key in ("study", "plan", "preprocessing", "training", "sharing", "personalize", "validation", "engine"):
        found[key] = _table(hints[key], tables.get(key, {}), f"[{key}]", problems)
    found["sharing"] = spelled_out(found)
    tables["network"], found["start"] = _start(tables.get("network", {}), problems)
    tables["network"] = network_of_trainer(tables["network"], tables.get("local_update", {}), problems)
    for key, kind in PLUG_INS.items():
        default = typing.cast(PlugIn, {f.name: f.default for f in dataclasses.fields(Study)}[key])
        found[key] = _plug_in(kind, tables.get(key, {}), default, f"[{key}]", problems)
    found["sites"] = _sites(tables.get("sites", {}), problems)
    found["test"] = _site(tables["test"], "[test]", problems) if "test" in tables else None
    for key, cls in (("partition", Partition), ("forecast", ForecastTable)):
        found[key] = _table(cls, tables[key], f"[{key}]", problems) if key in tables else None
    problems += _lost_data(found, "partition" in tables, folder if check_data else None)
    problems += [*undivided(found, "partition" in tables), *unequal(found), *misparted(found)]
    problems += [*contradictions(found, n_sites=len(tables.get("sites", {}))), *overruled(found), *misshared(found)]
    problems += confusions(found["sites"], found["test"], folder)
    return _resolve(Study(**found), folder) if len(problems) == before else None


def to_toml(study: Study) -> str:
    """The study as TOML, every default filled in; `read_study` of it gives the same study."""

    def plain(value: Any) -> Any:
        match value:
            case Study():
                table = {
                    f.name: plain(v) for f in dataclasses.fields(value) if (v := getattr(value, f.name)) is not None
                }
                start = table.pop("start")
                return table | {"network": table["network"] | (start if "weights" in start else {})}
            case PlugIn():
                return {"name": value.name} | plain(value.options)
            case ProtocolTable():
                table = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "options"}
                return plain(table | dict(value.options))
            case Mapping():
                return {k: plain(v) for k, v in value.items() if v is not None}
            case tuple():
                return [plain(v) for v in value]
            case Path():
                return str(value)
        if dataclasses.is_dataclass(value):
            return {
                f.name: plain(getattr(value, f.name))
                for f in dataclasses.fields(value)
                if getattr(value, f.name) is not None
            }
        return value

    tables = plain(dataclasses.replace(study, variants={}))
    del tables["variants"]
    tables = {key: table for key, table in tables.items() if table or key not in LISTS}
    for name, variant in study.variants.items():
        changed = {
            k: t for k, t in plain(variant).items() if k not in FIXED and t != tables.get(k, [] if k in LISTS else None)
        }
        network = {**changed.pop("network", {}), **drawn_anew(study, variant)}
        tables.setdefault("variants", {})[name] = {**changed, **({"network": network} if network else {})}
    return tomli_w.dumps(tables)


def _table(
    cls: type[T], raw: Mapping[str, Any], where: str, problems: list[str], *, more: Iterable[str] = ()
) -> T | None:
    """One table as its dataclass; `None` if it has errors, which are added to `problems`. `more`: other keys it may have."""
    hints = typing.get_type_hints(cls)
    hints.pop("options", None)  # those stand beside the other keys
    before = len(problems)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in hints:
            problems.append(f"{where} {key} = {value!r} is not known. {allowed(key, [*hints, *more])}")
            continue
        try:
            values[key] = coerce(value, hints[key])
            check_range(where, key, values[key])
        except ValueError as e:
            problems.append(f"{where} {key} = {value!r} is not allowed. {e}")
    for f in dataclasses.fields(typing.cast(Any, cls)):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in raw:
            problems.append(f"{where} {f.name} is missing. Expected {spell(hints[f.name])}. Add it.")
    return cls(**values) if len(problems) == before else None


def _protocol(raw: Mapping[str, Any], problems: list[str]) -> ProtocolTable | None:
    """The table of the protocol, which holds its own options too."""
    name = raw.get("name", ProtocolTable.name)
    own: Mapping[str, Any] = options("protocols", name) if name in names("protocols") else {}
    given = {key: value for key, value in raw.items() if key in own}
    filled, wrong = fill("protocols", name, given, "[protocol]") if own else ({}, [])
    problems += wrong
    check_ranges("[protocol]", filled, problems)
    rest = {key: value for key, value in raw.items() if key not in given}
    table = _table(ProtocolTable, rest, "[protocol]", problems, more=own)
    return table and dataclasses.replace(table, options=filled)


def _start(raw: Mapping[str, Any], problems: list[str]) -> tuple[Mapping[str, Any], StartTable | None]:
    """The table of the network without what is not the network's, and that."""
    keys = [f.name for f in dataclasses.fields(StartTable)]
    given = {} if raw.get("weights") == "" else {key: value for key, value in raw.items() if key in keys}
    start = _table(StartTable, given, "[network]", problems)
    if "min_matched" in raw and "weights" not in raw:
        problems.append(
            f"[network] min_matched = {raw['min_matched']!r} is not allowed without weights. Give weights, or leave it out."
        )
    return {key: value for key, value in raw.items() if key not in keys}, start


def _plug_in(kind: str, raw: Mapping[str, Any], default: PlugIn, where: str, problems: list[str]) -> PlugIn:
    name = raw.get("name", default.name)
    if not isinstance(name, str):
        known = ", ".join(names(kind))
        problems.append(f"{where} name = {name!r} is not allowed. Known: {known}, or `module:function`.")
        return default
    given = {k: v for k, v in raw.items() if k != "name"}
    more = [f.name for f in dataclasses.fields(StartTable)] if kind == "networks" else []
    options, wrong = fill(kind, name, given, where, more=more)
    problems += wrong
    check_ranges(where, {} if ":" in name else options, problems)
    return PlugIn(name, options)


def _sites(raw: Mapping[str, Any], problems: list[str]) -> dict[str, SiteTable]:
    if not raw:
        problems.append("[sites.NAME] is missing. Expected a table for each site, with its data. Add at least one.")
    sites: dict[str, SiteTable] = {}
    for name, table in raw.items():
        where = f"[sites.{name}]"
        if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            problems.append(
                f"{where} is not a name for a site. Allowed: letters, digits, - and _, but not {', '.join(RESERVED)}. Rename it."
            )
        if not isinstance(table, Mapping):
            problems.append(f"{where} = {table!r} is not allowed. Expected a table with data = PATH.")
            continue
        site = _site(table, where, problems)
        if site is not None:
            sites[name] = site
    return sites


def _site(raw: Mapping[str, Any], where: str, problems: list[str]) -> SiteTable | None:
    """The table of a site or of the test set, with the table of its shift."""
    given = raw.get("shift", {})
    if not isinstance(given, Mapping):
        problems.append(f"{where} shift = {given!r} is not allowed. Expected a table {where[:-1]}.shift].")
        given = {}
    shift = _table(Shift, given, f"{where[:-1]}.shift]", problems)
    site = _table(SiteTable, {k: v for k, v in raw.items() if k != "shift"}, where, problems)
    return site and dataclasses.replace(site, shift=shift if given else None)


def _lost_data(found: Mapping[str, Any], divided: bool, folder: Path | None) -> list[str]:
    """Data that are not where the study says, or of which it says nothing; without `folder` only the latter."""
    if found["engine"] is not None and found["engine"].name == "flare":  # each site knows where its data lie
        return []
    problems = []
    tables = {"[test]": found["test"]} | {f"[sites.{n}]": s for n, s in found["sites"].items()}
    for name, table in (tables | {"[partition]": found["partition"]}).items():
        if table is not None and table.data is None and not divided:
            problems.append(f"{name} data is missing. Expected a path. Add it.")
        elif folder and table and table.data and not (folder / table.data / "dataset.json").is_file():
            problems.append(
                f"{name} data = '{table.data}' is no nnU-Net raw folder: it has no dataset.json. Correct the path."
            )
    return problems


def _resolve(study: Study, folder: Path) -> Study:
    """Fill in what depends on other tables or on the machine, so that the file written beside the results says it."""
    engine = study.engine
    threads = engine.threads or max(1, (os.cpu_count() or 1) // engine.workers)
    cache = None if engine.cache is None else (folder / engine.cache).resolve()
    training = dataclasses.replace(study.training, learning_rate=training_of(study).learning_rate)
    weights = None if study.start.weights is None else (folder / study.start.weights).resolve()
    least = len(sites_of(study)) if is_vertical(study) else least_sites(study)
    protocol = dataclasses.replace(study.protocol, min_sites=least)
    partition = study.partition and dataclasses.replace(
        study.partition,
        data=(folder / study.partition.data).resolve(),
        file=study.partition.file and (folder / study.partition.file).resolve(),
        seed=study.study.seed if study.partition.seed is None else study.partition.seed,
    )
    return dataclasses.replace(
        study,
        sites={name: _resolved(site, folder) for name, site in study.sites.items()},
        test=study.test and _resolved(study.test, folder),
        partition=partition,
        engine=dataclasses.replace(engine, threads=threads, cache=cache),
        start=dataclasses.replace(study.start, weights=weights),
        training=training,
        protocol=protocol,
        network=parted(study),
    )


def _resolved(site: SiteTable, folder: Path) -> SiteTable:
    return dataclasses.replace(site, data=None if site.data is None else (folder / site.data).resolve())
