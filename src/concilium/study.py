"""The study file (TOML) as a frozen `Study`. Reading reports every error of the file at once."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from concilium._variants import FIXED, variant_tables
from concilium.catalog import allowed, coerce, fill, names, options, spell
from concilium.constraints import check_range, confusions, contradictions
from concilium.data.division_rules import undivided
from concilium.data.partition import Partition
from concilium.data.shifts import Shift
from concilium.errors import StudyError
from concilium.messages import PlugIn, Training

T = TypeVar("T")
RESERVED = ("test", "pooled", "server", "all")
"""Names that no site may have: the simulation uses them itself."""


@dataclass(frozen=True)
class StudyTable:
    name: str
    seed: int = 0
    max_excluded: float = 0.1
    """Largest share of a site's cases that may be set aside before the study stops."""
    seeds: int = 1
    """Every model is trained with so many seeds: `seed`, `seed` + 1, ..."""


@dataclass(frozen=True)
class SiteTable:
    data: Path | None = None
    """nnU-Net raw folder: dataset.json, imagesTr, labelsTr. Between hospitals each site knows its own, and this is not read."""
    values: tuple[str, ...] | None = None
    """In a partition by key or csv: the values of the site's cases; omitted: its name."""
    share: float | None = None
    """In a partition by size: its part of the patients, relative to the others'; omitted by all: equal parts."""
    annotated: tuple[str, ...] | None = None
    """In a partition by labels: the labels that its label maps keep."""
    shift: Shift | None = None
    """What is done to its images, in a simulation."""
    labels: Mapping[str, str] | None = None
    """Its own names of labels, where they differ -> the study's. Between hospitals: `label_names` in the site's `site.toml`."""
    channels: Mapping[str, str] | None = None
    """The same of channels (`channel_names`)."""


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
class StartTable:
    """What stands in `[network]` beside the network's own options, and is the server's business."""

    weights: Path | None = None
    """Start from these: a run folder (`RUN`, or `RUN#MODEL`), nnU-Net's model folder, a .safetensors or .pth file."""
    min_matched: float = 0.9
    """Smallest share of the network's values, heads not counted, that the weights must give."""


@dataclass(frozen=True)
class PreprocessingTable:
    name: Literal["nnunet", "resize"] = "nnunet"
    """nnU-Net's own, or every image at one size, which is then one patch."""
    size: tuple[int, ...] | None = None
    """Of resize: voxels along the last two axes (configuration 2d) or all three, the file's last axis first."""
    intensity: Literal["zscore", "0-1"] | tuple[float, ...] = "zscore"
    """Of resize: each image's mean and deviation to 0 and 1, its range to 0 to 1, or the range from low to high."""


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
    fold: int | Literal["all"] = 0
    """`all`: every model is trained once per fold, and the members of a model together segment the test set."""
    every: int | None = None
    """Score the validation cases after every so many rounds, for the curves; omitted: only at the end."""
    select: Literal["last", "best"] = "last"
    """Which weights a model ends with: those of the last round, or of the scored round whose validation Dice is best."""
    leave_one_site_out: bool = False
    """Train also once without each site, and score there."""
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
    partition: Partition | None = None
    """One data set that is divided into the sites; omitted: every site has its own."""
    plan: PlanTable = PlanTable()
    preprocessing: PreprocessingTable = PreprocessingTable()
    network: PlugIn = PlugIn("nnunet")
    start: StartTable = StartTable()
    """Its keys stand in `[network]`."""
    training: TrainingTable = TrainingTable()
    aggregation: PlugIn = PlugIn("mean")
    collect: PlugIn = PlugIn("plain")
    loss: PlugIn = PlugIn("dice_ce")
    local_update: PlugIn = PlugIn("plain")
    validation: ValidationTable = ValidationTable()
    engine: EngineTable = EngineTable()
    variants: Mapping[str, Study] = field(default_factory=dict)
    """The same study with some tables replaced, by name; trained in the same run on the same folds."""


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
    raw = {key: table for key, table in raw.items() if key != "variants"}
    hints = typing.get_type_hints(Study)
    del hints["start"]
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
    for key in ("study", "plan", "preprocessing", "training", "validation", "engine"):
        found[key] = _table(hints[key], tables.get(key, {}), f"[{key}]", problems)
    tables["network"], found["start"] = _start(tables.get("network", {}), problems)
    for key, kind in PLUG_INS.items():
        default = typing.cast(PlugIn, {f.name: f.default for f in dataclasses.fields(Study)}[key])
        found[key] = _plug_in(kind, tables.get(key, {}), default, f"[{key}]", problems)
    found["sites"] = _sites(tables.get("sites", {}), problems)
    found["test"] = _site(tables["test"], "[test]", problems) if "test" in tables else None
    found["partition"] = (
        _table(Partition, tables["partition"], "[partition]", problems) if "partition" in tables else None
    )
    problems += _lost_data(found, "partition" in tables, folder if check_data else None)
    problems += undivided(found, "partition" in tables)
    problems += contradictions(found, n_sites=len(tables.get("sites", {})))
    problems += confusions(found["sites"], found["test"], folder)
    return _resolve(Study(**found), folder) if len(problems) == before else None


def with_seeds(study: Study, seeds: int | None) -> Study:
    """The study, with so many seeds in place of its own."""
    return study if seeds is None else dataclasses.replace(study, study=dataclasses.replace(study.study, seeds=seeds))


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
    for name, variant in study.variants.items():
        changed = {key: table for key, table in plain(variant).items() if key not in FIXED and table != tables.get(key)}
        tables.setdefault("variants", {})[name] = changed
    return tomli_w.dumps(tables)


def training_of(study: Study) -> Training:
    """The part of the study that a site needs to train."""
    t = study.training
    rate = t.learning_rate if t.learning_rate is not None else (0.01 if t.optimizer == "sgd" else 0.001)
    return Training(
        t.optimizer, rate, t.weight_decay, t.momentum, t.precision, t.foreground, t.mirror, t.augmentation, t.clip_norm,
        t.deep_supervision, t.loader_workers, study.loss, study.local_update,
    )  # fmt: skip


def data_sets(what: Sequence[Path], test: Path | None = None) -> tuple[dict[str, Path], Path | None, int]:
    """Sites with their folders, held-out set and number of folds, of one study file or of raw folders.

    `test` goes before the study's own.

    Raises:
        StudyError: no such study or folder, or a study that does not say where data lie.
    """
    if len(what) == 1 and not what[0].is_dir():
        study = read_study(what[0], check_data=False)
        sites = {name: site.data for name, site in study.sites.items() if site.data is not None}
        if not sites:
            raise StudyError(
                f"{what[0]} says of no site where its data lie. Expected data = PATH. Give the raw folders."
            )
        return sites, test or (study.test.data if study.test else None), study.validation.folds
    for path in (*what, *([test] if test else [])):
        if not (path / "dataset.json").exists() and not (path / "imagesTr").exists():
            raise StudyError(
                f"{path} is no data set. Expected a folder with dataset.json and imagesTr. Correct the path."
            )
    names = [path.resolve().name for path in what]
    if len({*names, "test"}) <= len(names):  # two of one name
        names = [str(path) for path in what]
    return dict(zip(names, what, strict=True)), test, ValidationTable.folds


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


def _start(raw: Mapping[str, Any], problems: list[str]) -> tuple[Mapping[str, Any], StartTable | None]:
    """The table of the network without what is not the network's, and that."""
    keys = [f.name for f in dataclasses.fields(StartTable)]
    start = _table(StartTable, {key: value for key, value in raw.items() if key in keys}, "[network]", problems)
    if "min_matched" in raw and "weights" not in raw:
        problems.append(
            f"[network] min_matched = {raw['min_matched']!r} is not allowed without weights. Give weights, or leave it out."
        )
    return {key: value for key, value in raw.items() if key not in keys}, start


def _plug_in(kind: str, raw: Mapping[str, Any], default: PlugIn, where: str, problems: list[str]) -> PlugIn:
    name = raw.get("name", default.name)
    if not isinstance(name, str):
        problems.append(
            f"{where} name = {name!r} is not allowed. Known: {', '.join(names(kind))}, or `module:function`."
        )
        return default
    given = {k: v for k, v in raw.items() if k != "name"}
    more = [f.name for f in dataclasses.fields(StartTable)] if kind == "networks" else []
    options, wrong = fill(kind, name, given, where, more=more)
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
    sites = {name: _resolved(site, folder) for name, site in study.sites.items()}
    test = None if study.test is None else _resolved(study.test, folder)
    protocol = dataclasses.replace(study.protocol, min_sites=study.protocol.min_sites or min(2, len(study.sites)))
    partition = study.partition and dataclasses.replace(
        study.partition,
        data=(folder / study.partition.data).resolve(),
        file=study.partition.file and (folder / study.partition.file).resolve(),
        seed=study.study.seed if study.partition.seed is None else study.partition.seed,
    )
    return dataclasses.replace(
        study,
        sites=sites,
        test=test,
        partition=partition,
        engine=dataclasses.replace(engine, threads=threads, cache=cache),
        start=dataclasses.replace(study.start, weights=weights),
        training=training,
        protocol=protocol,
    )


def _resolved(site: SiteTable, folder: Path) -> SiteTable:
    return dataclasses.replace(site, data=None if site.data is None else (folder / site.data).resolve())
