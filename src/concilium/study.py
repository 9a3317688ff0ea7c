"""The study file (TOML) as a frozen `Study`. Reading reports every error of the file at once."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from concilium.catalog import allowed, coerce, fill, names, options, spell
from concilium.constraints import check_range, confusions, contradictions
from concilium.errors import StudyError
from concilium.messages import PlugIn, Training

T = TypeVar("T")
RESERVED = ("test", "pooled", "server")
"""Names that no site may have: the simulation uses them itself."""


@dataclass(frozen=True)
class StudyTable:
    name: str
    seed: int = 0
    max_excluded: float = 0.1
    """Largest share of a site's cases that may be set aside before the study stops."""


@dataclass(frozen=True)
class SiteTable:
    data: Path | None = None
    """nnU-Net raw folder: dataset.json, imagesTr, labelsTr. Between hospitals each site knows its own, and this is not read."""


@dataclass(frozen=True)
class ProtocolTable:
    rounds: int
    name: str = "federated"
    steps: int | None = None
    """Optimiser steps per site and round ..."""
    epochs: float | None = None
    """... or passes over the site's own training cases per round."""
    compare: tuple[Literal["local", "centralized"], ...] = ()
    min_sites: int | None = None
    """A round in which fewer sites answer stops the study; omitted: 2, or 1 where there is only one site."""
    round_seconds: float | None = None
    """Deadline of a round; omitted: none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The protocol's own, which stand in the same table."""


@dataclass(frozen=True)
class PlanTable:
    configuration: str = "3d_fullres"
    planner: Literal["default", "resenc_m", "resenc_l", "resenc_xl"] = "default"
    memory_gb: float | None = None
    """GPU memory that the plan is made for; omitted: the planner's own (8 GB for the default)."""
    exact_geometry: bool = False
    """Let sites tell the shape and spacing of every case in full; otherwise binned."""


@dataclass(frozen=True)
class TrainingTable:
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float | None = None
    """Omitted: 0.01 for sgd (nnU-Net's), 0.001 for adam and adamw."""
    weight_decay: float = 3e-5
    momentum: float = 0.99
    batch_size: int | None = None
    patch_size: tuple[int, ...] | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    foreground: float = 0.33
    mirror: bool = True
    augmentation: Literal["nnunet", "none"] = "nnunet"
    clip_norm: float = 12.0
    deep_supervision: bool = True
    loader_workers: int = 0


@dataclass(frozen=True)
class ValidationTable:
    folds: int = 5
    fold: int = 0
    tolerance: float = 1.0
    """Of the normalised surface Dice: mm where the spacing is known, pixels where not."""


@dataclass(frozen=True)
class EngineTable:
    name: str = "simulation"
    workers: int = 1
    """1: sites are answered one at a time in this process; more: in that many processes."""
    threads: int = 0
    """Threads a site computes with; 0: the machine's cores divided by the workers. Other thread counts give other bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache: Path | None = None
    """Folder for preprocessed cases; omitted: inside the run folder."""
    pictures: bool = True
    """Whether sites keep a picture of each scored case, for the report of a simulation and for their own."""


@dataclass(frozen=True)
class Study:
    """Everything that a run depends on."""

    study: StudyTable
    sites: Mapping[str, SiteTable]
    protocol: ProtocolTable
    test: SiteTable | None = None
    plan: PlanTable = PlanTable()
    network: PlugIn = PlugIn("nnunet")
    training: TrainingTable = TrainingTable()
    aggregation: PlugIn = PlugIn("mean")
    collect: PlugIn = PlugIn("plain")
    loss: PlugIn = PlugIn("dice_ce")
    local_update: PlugIn = PlugIn("plain")
    validation: ValidationTable = ValidationTable()
    engine: EngineTable = EngineTable()


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
    hints = typing.get_type_hints(Study)
    for key in raw:
        if key not in hints:
            problems.append(f"[{key}] is not a known table. {allowed(key, hints)}")
    tables = {key: value for key, value in raw.items() if key in hints and isinstance(value, Mapping)}
    problems += [
        f"{key} = {raw[key]!r} is not allowed. Expected a table [{key}]."
        for key in raw
        if key in hints and key not in tables
    ]

    found: dict[str, Any] = {"protocol": _protocol(tables.get("protocol", {}), problems)}
    for key in ("study", "plan", "training", "validation", "engine"):
        found[key] = _table(hints[key], tables.get(key, {}), f"[{key}]", problems)
    for key, kind in PLUG_INS.items():
        default = typing.cast(PlugIn, {f.name: f.default for f in dataclasses.fields(Study)}[key])
        found[key] = _plug_in(kind, tables.get(key, {}), default, f"[{key}]", problems)
    found["sites"] = _sites(tables.get("sites", {}), problems)
    found["test"] = _table(SiteTable, tables["test"], "[test]", problems) if "test" in tables else None
    elsewhere = found["engine"] is not None and found["engine"].name == "flare"  # each site knows where its data lie
    for name, table in (("[test]", found["test"]), *((f"[sites.{n}]", s) for n, s in found["sites"].items())):
        if table is None or elsewhere:
            continue
        if table.data is None:
            problems.append(f"{name} data is missing. Expected a path. Add it.")
        elif check_data and not (folder / table.data / "dataset.json").is_file():
            problems.append(
                f"{name} data = '{table.data}' is no nnU-Net raw folder: it has no dataset.json. Correct the path."
            )
    problems += contradictions(found, n_sites=len(tables.get("sites", {})))
    problems += confusions(found["sites"], found["test"], folder)
    if problems:
        raise StudyError(
            f"{source} has {len(problems)} error{'s' * (len(problems) > 1)}:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    return _resolve(Study(**found), folder)


def to_toml(study: Study) -> str:
    """The study as TOML, every default filled in; `read_study` of it gives the same study."""

    def plain(value: Any) -> Any:
        match value:
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

    return tomli_w.dumps(plain(study))


def training_of(study: Study) -> Training:
    """The part of the study that a site needs to train."""
    t = study.training
    rate = t.learning_rate if t.learning_rate is not None else (0.01 if t.optimizer == "sgd" else 0.001)
    return Training(
        t.optimizer, rate, t.weight_decay, t.momentum, t.precision, t.foreground, t.mirror, t.augmentation, t.clip_norm,
        t.deep_supervision, t.loader_workers, study.loss, study.local_update,
    )  # fmt: skip


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
    for key, value in filled.items():
        try:
            check_range("[protocol]", key, value)
        except ValueError as e:
            problems.append(f"[protocol] {key} = {value!r} is not allowed. {e}")
    rest = {key: value for key, value in raw.items() if key not in given}
    table = _table(ProtocolTable, rest, "[protocol]", problems, more=own)
    return table and dataclasses.replace(table, options=filled)


def _plug_in(kind: str, raw: Mapping[str, Any], default: PlugIn, where: str, problems: list[str]) -> PlugIn:
    name = raw.get("name", default.name)
    if not isinstance(name, str):
        problems.append(
            f"{where} name = {name!r} is not allowed. Known: {', '.join(names(kind))}, or `module:function`."
        )
        return default
    given = {k: v for k, v in raw.items() if k != "name"}
    options, wrong = fill(kind, name, given, where)
    problems += wrong
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
        site = _table(SiteTable, table, where, problems)
        if site is not None:
            sites[name] = site
    return sites


def _resolve(study: Study, folder: Path) -> Study:
    """Fill in what depends on other tables or on the machine, so that the file written beside the results says it."""
    engine = study.engine
    threads = engine.threads or max(1, (os.cpu_count() or 1) // engine.workers)
    cache = None if engine.cache is None else (folder / engine.cache).resolve()
    training = dataclasses.replace(study.training, learning_rate=training_of(study).learning_rate)
    sites = {name: _resolved(site, folder) for name, site in study.sites.items()}
    test = None if study.test is None else _resolved(study.test, folder)
    protocol = dataclasses.replace(study.protocol, min_sites=study.protocol.min_sites or min(2, len(study.sites)))
    return dataclasses.replace(
        study,
        sites=sites,
        test=test,
        engine=dataclasses.replace(engine, threads=threads, cache=cache),
        training=training,
        protocol=protocol,
    )


def _resolved(site: SiteTable, folder: Path) -> SiteTable:
    return SiteTable(None if site.data is None else (folder / site.data).resolve())
