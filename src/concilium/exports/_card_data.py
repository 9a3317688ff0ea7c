"""What a run's record says of one finished model: of these weights, not of its other seeds, folds or sites."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from concilium.catalog import TRAINER
from concilium.finished import Finished
from concilium.results import SCALES
from concilium.schedule import PERSONAL
from concilium.statistics import WITHOUT, summarize

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What was found of a model. `fold`: the one it did not train on; `None`: it has a member for each."""

    finished: Finished
    results: Results
    title: str
    """In results.json, without the site."""
    owner: str
    """The site that it never left, if so."""
    unseen: str
    """The site that took no part, if so."""
    seed: int
    fold: int | None

    @property
    def cases(self) -> list[Mapping[str, Any]]:
        """Its scores."""
        name = f"{self.title}:{self.owner}" if self.owner else self.title
        return [
            c
            for c in self.results["cases"]
            if c["model"] == name
            and c.get("seed", self.seed) == self.seed
            and (self.fold is None or c.get("fold", self.fold) == self.fold)
        ]

    @property
    def summary(self) -> list[Mapping[str, Any]]:
        """Means and intervals of its scores."""
        cases = self.cases
        models = {c["model"] for c in cases}
        if sum(c["model"] in models for c in self.results["cases"]) == len(cases):
            return [s for s in self.results["summary"] if s["model"] in models]
        return list(summarize(cases, SCALES, seed=self.finished.study.study.seed))

    @property
    def took(self) -> Mapping[str, Any] | None:
        """What training it, or one of its members, took."""
        return next(
            (
                m
                for m in self.results["models"]
                if m["name"] == self.title
                and m.get("seed", self.seed) == self.seed
                and (self.fold is None or m.get("fold", self.fold) == self.fold)
            ),
            None,
        )

    @property
    def sites(self) -> tuple[str, ...]:
        """Those whose cases it was trained on."""
        return tuple(s for s in self.finished.study.sites if s != self.unseen and self.owner in ("", s))


def record_of(finished: Finished, results: Results) -> Record:
    """What the run says of a model, by the parts of its name (`open_finished`)."""
    stem, _, owner = finished.name.partition(":")
    title, *parts = stem.split(".")
    numbers = {p[0]: int(p[1:]) for p in parts if re.fullmatch(r"[sf]\d+", p)}
    s, v = finished.study.study, finished.study.validation
    fold = None if isinstance(v.fold, str) else v.fold
    return Record(
        finished, results, title, owner, title.partition(WITHOUT)[2], numbers.get("s", s.seed), numbers.get("f", fold)
    )


def data_table(record: Record) -> tuple[list[tuple[str, ...]], list[str]]:
    """A row for each site (cases and patients trained on, and scored), and what is to be said below."""
    study, results = record.finished.study, record.results
    trained = _cases_trained_on(record)
    rows = []
    for site in dict.fromkeys([*trained, *record.sites]):
        numbers = (trained.get(site), _patients_trained_on(record, site))
        own = [c for c in record.cases if (c["site"], c["subset"]) == (site, "validation")]
        scored = (str(len({c[key] for c in own})) for key in ("case", "patient"))
        rows.append((site, *("–" if n is None else str(n) for n in numbers), *scored))
    v = study.validation
    held_out = (
        f"Scored are the cases of fold {record.fold} of {v.folds}, divided by patient, on which the model was not trained"
        if record.fold is not None
        else f"Each of the {len(record.finished.files)} members leaves out one of {v.folds} folds, divided by patient, and was "
        "scored on it; together they know all cases"
    )
    tested = any(c["subset"] == "test" for c in record.cases)
    n_sites = f"{len(record.sites)} site{'s' * (len(record.sites) != 1)}, named as in the study. "
    lines = [
        f"{n_sites}{held_out}. " + ("A held-out test set was scored too." if tested else "No test set was scored.")
    ]
    if record.unseen:
        lines.append(f"{record.unseen} took no part: all its cases were scored by a model that never saw one.")
    if "pooled" in trained:
        lines.append("`pooled`: the cases of all sites in one place, which only a simulation can do.")
    n_excluded: dict[str, int] = {}
    for line in results["excluded"]:
        n_excluded[line["site"]] = n_excluded.get(line["site"], 0) + 1
    excluded = ", ".join(f"{site}: {n}" for site, n in sorted(n_excluded.items()))
    total = f"{sum(n_excluded.values())}{f' ({excluded})' if excluded else ''}"
    return rows, [*lines, f"Cases set aside because they could not be used: {total}."]


def _cases_trained_on(record: Record) -> dict[str, int]:
    """Site -> cases; of several members those that any has seen: each case is left out by one of them."""
    members = {file.stem.replace(PERSONAL, "", 1) for file in record.finished.files}  # trained in the same rounds
    last: dict[tuple[str, str], int] = {}
    for line in _lines(record.finished, "rounds.jsonl"):
        if line.get("model") in members:
            last |= {(site, line["model"]): told["n_cases"] for site, told in line["sites"].items()}
    found: dict[str, int] = {}
    for (site, _), n in last.items():
        if record.owner in ("", site):
            found[site] = found.get(site, 0) + n
    return {site: n // max(1, len(members) - 1) for site, n in found.items()}


def _patients_trained_on(record: Record, site: str) -> int | None:
    """From a simulated site's own list of cases, which lies in the run folder; `None` where the site is elsewhere."""
    path = record.finished.run / "sites" / site / "cases.json"
    if not path.is_file() or site not in record.finished.study.sites:
        return None
    noted = json.loads(path.read_text(encoding="utf-8")).get(site, [])
    left_out = {line["case"] for line in record.results["excluded"] if line["site"] == site}
    if record.fold is not None:
        left_out |= {c["case"] for c in record.cases if (c["site"], c["subset"]) == (site, "validation")}
    return len({entry["patient"] for entry in noted if entry["case"] not in left_out})


def _lines(finished: Finished, name: str) -> Iterable[dict[str, Any]]:
    path = finished.run / name
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:  # cut off by a kill
            continue


def training_lines(record: Record) -> Sequence[str]:
    """How it was trained, in sentences."""
    study, took, n = record.finished.study, record.took, len(record.finished.files)
    protocol = took.get("protocol", study.protocol.name) if took else study.protocol.name
    rules = f"collected by `{study.collect.name}`, aggregated by `{study.aggregation.name}`"
    how = {
        "local": f"trained at {record.owner} alone: nothing was aggregated",
        "centralized": "trained on the cases of all sites in one place: nothing was aggregated",
    }.get(protocol, f"trained by protocol `{protocol}`, {rules}")
    if record.title.endswith(PERSONAL):
        shared = record.title.removesuffix(PERSONAL)
        how = f"which {record.owner} trained of its own beside `{shared}`, the model of all sites ({how}); it never left the site"
    trainer = study.local_update.options.get(TRAINER)
    what = f"trainer `{trainer}`" if trainer else f"loss `{study.loss.name}`"
    lines = [f"Model `{record.finished.name}`, {how}; local update `{study.local_update.name}`, {what}."]
    if took is not None:
        own = took["sites"].get(record.owner) if record.owner else None
        patches = took["patches"] if own is None else own["n_steps"] * took["batch_size"]
        updates = took["updates"] if own is None else own["n_steps"]
        each = f"Each of {n} members: " if n > 1 else ""
        lines.append(
            f"{each}{took['rounds']} rounds, {updates} optimiser steps in sequence, {patches} patches in all (batches of "
            f"{took['batch_size']}); {took['parameters']} parameters."
        )
    return lines
