"""The study file (TOML) as a frozen `Study`. Reading reports every error of the file at once."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from concilium.catalog import allowed, coerce, fill, names, spell
from concilium.errors import StudyError
from concilium.messages import PlugIn, Training

T = TypeVar("T")
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
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
    data: Path
    """nnU-Net raw folder: dataset.json, imagesTr, labelsTr."""


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

    found: dict[str, Any] = {}
    for key in ("study", "protocol", "plan", "training", "validation", "engine"):
        found[key] = _table(hints[key], tables.get(key, {}), f"[{key}]", problems)
    for key, kind in PLUG_INS.items():
        default = typing.cast(PlugIn, {f.name: f.default for f in dataclasses.fields(Study)}[key])
        found[key] = _plug_in(kind, tables.get(key, {}), default, f"[{key}]", problems)
    found["sites"] = _sites(tables.get("sites", {}), problems)
    found["test"] = _table(SiteTable, tables["test"], "[test]", problems) if "test" in tables else None
    if check_data:
        for name, table in (("[test]", found["test"]), *((f"[sites.{n}]", s) for n, s in found["sites"].items())):
            if table is not None and not (folder / table.data / "dataset.json").is_file():
                problems.append(
                    f"{name} data = '{table.data}' is no nnU-Net raw folder: it has no dataset.json. Correct the path."
                )
    problems += _contradictions(found, n_sites=len(tables.get("sites", {})))
    problems += _confusions(found["sites"], found["test"], folder)
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


def _table(cls: type[T], raw: Mapping[str, Any], where: str, problems: list[str]) -> T | None:
    """One table as its dataclass; `None` if it has errors, which are added to `problems`."""
    hints = typing.get_type_hints(cls)
    before = len(problems)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in hints:
            problems.append(f"{where} {key} = {value!r} is not known. {allowed(key, hints)}")
            continue
        try:
            values[key] = coerce(value, hints[key])
            _check_range(where, key, values[key])
        except ValueError as e:
            problems.append(f"{where} {key} = {value!r} is not allowed. {e}")
    for f in dataclasses.fields(typing.cast(Any, cls)):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in raw:
            problems.append(f"{where} {f.name} is missing. Expected {spell(hints[f.name])}. Add it.")
    return cls(**values) if len(problems) == before else None


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


RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "[study] max_excluded": (lambda x: 0 <= x <= 1, "0 to 1"),
    "[protocol] rounds": (lambda x: x >= 1, "1 or more"),
    "[protocol] steps": (lambda x: x >= 1, "1 or more"),
    "[protocol] epochs": (lambda x: x > 0, "more than 0"),
    "[protocol] min_sites": (lambda x: x >= 1, "1 to the number of sites"),
    "[protocol] round_seconds": (lambda x: x > 0, "more than 0"),
    "[plan] memory_gb": (lambda x: x > 0, "more than 0"),
    "[training] learning_rate": (lambda x: x > 0, "more than 0"),
    "[training] weight_decay": (lambda x: x >= 0, "0 or more"),
    "[training] momentum": (lambda x: 0 <= x < 1, "0 to below 1"),
    "[training] batch_size": (lambda x: x >= 1, "1 or more"),
    "[training] patch_size": (lambda x: len(x) in (2, 3) and min(x) >= 1, "2 or 3 whole numbers of 1 or more"),
    "[training] foreground": (lambda x: 0 <= x <= 1, "0 to 1"),
    "[training] clip_norm": (lambda x: x > 0, "more than 0"),
    "[training] loader_workers": (lambda x: x >= 0, "0 or more"),
    "[validation] folds": (lambda x: x >= 2, "2 or more"),
    "[validation] fold": (lambda x: x >= 0, "0 to folds - 1"),
    "[validation] tolerance": (lambda x: x > 0, "more than 0"),
    "[engine] workers": (lambda x: x >= 1, "1 or more"),
    "[engine] threads": (lambda x: x >= 0, "0 (share the cores) or more"),
}
"""Table and key -> test of a value of the right type, and what is allowed; no number may be without end."""


def _check_range(where: str, key: str, value: Any) -> None:
    """Raise ValueError, which says what is allowed, where a value is of the right type and still none of those."""
    full = f"{where} {key}"
    known = {
        "[protocol] name": names("protocols"),
        "[engine] name": names("engines"),
        "[plan] configuration": CONFIGURATIONS,
    }.get(full)
    if known is not None and value not in known:
        cascade = (
            "The cascade's second network trains on the predictions of the first, which no federation here makes. "
        )
        raise ValueError((cascade if value == "3d_cascade_fullres" else "") + allowed(value, known))
    fine, text = RANGES.get(full, (lambda _: True, ""))
    if not fine(value) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"Allowed: {text}.")


def _contradictions(found: Mapping[str, Any], *, n_sites: int) -> list[str]:
    """What is wrong between values that are each allowed, in the tables that have no error of their own."""
    p, v, t, e = (found[table] for table in ("protocol", "validation", "training", "engine"))
    problems = []
    s = found["study"]
    if s and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", s.name):
        problems.append(
            f"[study] name = {s.name!r} is not allowed. Allowed: letters, digits, - . and _ (it names a folder)."
        )
    if p and (p.steps is None) == (p.epochs is None):
        problems.append(
            f"[protocol] steps = {p.steps}, epochs = {p.epochs} is not allowed. Allowed: exactly one of the two."
        )
    if p and p.min_sites is not None and p.min_sites > n_sites:
        problems.append(
            f"[protocol] min_sites = {p.min_sites} is not allowed. Allowed: 1 to {n_sites}, the number of sites."
        )
    if p and p.name == "centralized":
        problems.append(
            "[protocol] name = 'centralized' is not allowed: it pools all cases. Allowed: another protocol with "
            "compare = ['centralized'], in a simulation."
        )
    if v and v.fold >= v.folds:
        problems.append(f"[validation] fold = {v.fold} is not allowed. Allowed: 0 to {v.folds - 1}.")
    if t and e and t.precision == "float16" and e.device == "cpu":
        problems.append(
            "[training] precision = 'float16' is not allowed on a CPU. Allowed there: 'float32', 'bfloat16'."
        )
    return problems


def _confusions(sites: Mapping[str, SiteTable], test: SiteTable | None, folder: Path) -> list[str]:
    """Sites that would be taken for one another, or for the held-out set."""
    problems = [
        f"[sites.{name}] is also written [sites.{other}]. Some disks take both for one folder. Rename one."
        for name, other in itertools.combinations(sites, 2)
        if name.casefold() == other.casefold()
    ]
    for name, site in sites.items():
        if test is not None and (folder / site.data).resolve() == (folder / test.data).resolve():
            problems.append(
                f"[test] data = '{test.data}' is that of [sites.{name}] too. Nobody may train on a held-out set. Give another."
            )
    return problems


def _resolve(study: Study, folder: Path) -> Study:
    """Fill in what depends on other tables or on the machine, so that the file written beside the results says it."""
    engine = study.engine
    threads = engine.threads or max(1, (os.cpu_count() or 1) // engine.workers)
    cache = None if engine.cache is None else (folder / engine.cache).resolve()
    training = dataclasses.replace(study.training, learning_rate=training_of(study).learning_rate)
    sites = {name: SiteTable((folder / site.data).resolve()) for name, site in study.sites.items()}
    test = None if study.test is None else SiteTable((folder / study.test.data).resolve())
    protocol = dataclasses.replace(study.protocol, min_sites=study.protocol.min_sites or min(2, len(study.sites)))
    return dataclasses.replace(
        study,
        sites=sites,
        test=test,
        engine=dataclasses.replace(engine, threads=threads, cache=cache),
        training=training,
        protocol=protocol,
    )
