"""What a report is made from: the files of a run folder, or of a site's own folder. No torch: a report is there at once."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from concilium.errors import StudyError
from concilium.statistics import ALL_SITES, NOT_ANNOTATED, Scale, summarize

Row: TypeAlias = Mapping[str, Any]
Key: TypeAlias = tuple[str, str, str, str]
"""Site whose table it is, model there, subset, case."""
SCALES = {
    "dice": Scale(highest=1),
    "iou": Scale(highest=1),
    "hd95": Scale(higher_is_better=False),
    "nsd": Scale(highest=1),
}
"""Those of `results.SCALES`, which would bring torch along."""


@dataclass(frozen=True)
class Picture:
    """What a site's own table says of a case beside its scores."""

    path: Path | None
    spacing: tuple[float, ...] | None
    """[mm]"""
    medians: tuple[float, ...] | None
    """Median intensity of each channel in the reference's foreground."""


@dataclass(frozen=True)
class Found:
    """Everything that was found. What is not there is empty."""

    folder: Path
    results: Mapping[str, Any]
    site: str | None = None
    """Whose own report it is; `None` for that of a run."""
    rounds: tuple[Row, ...] = ()
    curves: tuple[Row, ...] = ()
    study: Mapping[str, Any] = field(default_factory=dict)
    study_text: str = ""
    sessions: tuple[Row, ...] = ()
    plans: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    file_ending: str = ""
    forecasts: Mapping[str, Row] = field(default_factory=dict)
    """Model -> what a round of it was to cost (`costs.Cost`)."""
    pictures: Mapping[Key, Picture] = field(default_factory=dict)
    colours: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Label -> colours of its outlines in the pictures: reference, prediction."""
    notes: tuple[str, ...] = ()
    """What a site's own tables say went wrong."""

    @property
    def is_shared(self) -> bool:
        """Whether the data are others' than whose folder this is: not in a site's own, nor where a simulation is stated."""
        return self.site is None and not is_simulation(self.study)

    def picture(self, row: Row) -> Picture | None:
        """What is known of the case of this score."""
        model, _, owner = row["model"].partition(":")
        subset = "all" if row["subset"] == "unseen" else row["subset"]
        return self.pictures.get((owner or row["site"], row.get("key", model + self._suffix(row)), subset, row["case"]))

    def _suffix(self, row: Row) -> str:
        """What the name of the model's files ends with, where there are several seeds or folds (`schedule.py`)."""
        seed = row.get("seed", self.results.get("seed"))
        several = self.study.get("validation", {}).get("fold") == "all"
        fold = "" if not several else ".all" if row.get("fold") is None else f".f{row['fold']}"
        return ("" if seed == self.results.get("seed") else f".s{seed}") + fold


def find(folder: Path) -> Found:
    """What is in the folder of a run, or of a site.

    Raises:
        StudyError: it is neither.
    """
    if (folder / "results.json").is_file():
        return _find_run(folder)
    if any(folder.glob("scores/*.json")):
        return _find_site(folder)
    raise StudyError(
        f"{folder} holds nothing to report: neither results.json nor scores. Expected the folder of a run that has ended, or "
        "of a site within one. Check the path."
    )


def is_simulation(study: Mapping[str, Any]) -> bool:
    """Whether the study says that it ran on one machine; one that is lost, or says nothing, may be of others' data."""
    return bool(study.get("engine", {}).get("name") == "simulation")


def study_of(folder: Path) -> tuple[Mapping[str, Any], str]:
    """The study of a run as tables and as text; both empty where there is none.

    Raises:
        StudyError: it is damaged.
    """
    path = folder / "study.toml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as e:
        raise StudyError(f"{path} cannot be read ({e}). Expected the study as the run wrote it. Put it back.") from e


def file_ending(folder: Path) -> str:
    """The ending of the files that a run was made with; empty where it is not noted."""
    return str(_json(folder / "dataset.json", {}).get("file_ending", ""))


def _find_run(folder: Path) -> Found:
    results = _json(folder / "results.json", {})
    if "cases" in results:  # of what nobody looked for there is nothing to show
        results["cases"] = [case for case in results["cases"] if case.get("status") != NOT_ANNOTATED]
    study, text = study_of(folder)
    tables = [t for path in sorted(folder.glob("sites/*/scores/*.json")) if (t := _table(path))]
    return Found(
        folder,
        results,
        rounds=_lines(folder / "rounds.jsonl"),
        curves=tuple(
            {"model": line["model"], "round": line["round"], "site": site, "subset": "validation", "dice": dice}
            for line in _lines(folder / "curves.jsonl")
            for site, dice in line["dice"].items()
            if site != ALL_SITES
        ),
        study=study,
        study_text=re.sub(r"(?m)^((?:data|cache|file|weights) = ).*$", r'\1"..."', text),
        sessions=tuple(_json(folder / "environment.json", {}).get("sessions", ())),
        plans=_json(folder / "plans.json", {}),
        fingerprint=_json(folder / "fingerprint.json", {}),
        file_ending=file_ending(folder),
        forecasts=_forecasts(folder),
        pictures={key: picture for t in tables for key, picture in _pictures(t).items()},
        colours={label: tuple(c) for t in tables for label, c in t.get("colours", {}).items()},
    )


def _forecasts(folder: Path) -> dict[str, Row]:
    """Of several seeds and folds the first tells of all: they differ by the hundredth of a second."""
    found: dict[str, Row] = {}
    for path in sorted(folder.glob("forecast/*.json"), key=lambda path: (len(path.name), path.name)):
        cost = _json(path, None)
        if isinstance(cost, dict):
            found.setdefault(path.name.partition(".")[0], cost)
    return found


def _find_site(folder: Path) -> Found:
    """A site's own tables as results, its own log as rounds."""
    paths = sorted(folder.glob("scores/*.json"), key=lambda path: (path.stat().st_mtime, path.name))
    tables = [t for path in paths if (t := _table(path))]
    cases = [dict(row) | _told(t) for t in tables for row in t["cases"]]
    models = [{"name": name} for name in dict.fromkeys(_told(t)["model"] for t in tables)]
    excluded = [
        {"site": case.partition("/")[0], "case": case.partition("/")[2], "reason": reason, "text": text}
        for case, (reason, text) in _json(folder / "excluded.json", {}).items()
    ]
    site = tables[-1]["site"] if tables else folder.name
    results = {
        "study": folder.name, "complete": True, "models": models, "cases": cases, "summary": summarize(cases, SCALES),
        "comparisons": [], "excluded": excluded, "warnings": [], "problems": [],
    }  # fmt: skip
    trained = [line for line in _lines(folder / "log.jsonl") if line.get("event") == "trained"]
    rounds = {(r["model"], r["round"]): r for r in trained}
    return Found(
        folder,
        results,
        site=site,
        rounds=tuple(
            {"model": model, "round": number, "time": r.get("time"), "sites": {site: {"loss": r["loss"]}}}
            for (model, number), r in sorted(rounds.items())
        ),
        plans=_json(folder / "plan.json", {}),
        pictures={key: picture for t in tables for key, picture in _pictures(t).items()},
        colours={label: tuple(c) for t in tables for label, c in t.get("colours", {}).items()},
        notes=tuple(dict.fromkeys(f"{r['case']}: {r['note']}" for r in cases if r.get("note"))),
    )


def _told(table: Mapping[str, Any]) -> dict[str, Any]:
    """What a site's own table says of all its rows: the model's files are called `key`, after its seed and fold too."""
    name, *parts = table["model"].split(".")
    seed = next(
        (int(p[1:]) for p in parts if re.fullmatch(r"s\d+", p)), -1
    )  # the study's first: its number is not told here
    subset = "unseen" if table["subset"] == "all" else table["subset"]
    return {"model": name, "key": table["model"], "seed": seed, "subset": subset, "site": table["site"]}


def _table(path: Path) -> dict[str, Any] | None:
    """A site's table of scores, with its folder."""
    table = _json(path, None)
    return table | {"folder": path.parents[1]} if isinstance(table, dict) and "cases" in table else None


def _pictures(table: Mapping[str, Any]) -> dict[Key, Picture]:
    found = {}
    for row in table["cases"]:
        path = table["folder"] / row["picture"] if row.get("picture") else None
        spacing, medians = (None if row.get(k) is None else tuple(row[k]) for k in ("spacing", "foreground_median"))
        found[table["site"], table["model"], table["subset"], row["case"]] = Picture(path, spacing, medians)
    return found


def _json(path: Path, otherwise: Any) -> Any:
    """What is in the file; a damaged one counts as none, so that the rest of the report can be made."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return otherwise


def _lines(path: Path) -> tuple[Row, ...]:
    if not path.is_file():
        return ()
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # one that was cut off
        if isinstance(value, dict):
            found.append(value)
    return tuple(found)
