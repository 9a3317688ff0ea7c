"""What a run's record says of one finished model: of these weights, not of its other seeds, folds or sites."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from concilium._withheld import with_averages
from concilium.catalog import TRAINER
from concilium.data.dataset import folds
from concilium.disclosure import MIN_CASES, count
from concilium.finished import Finished
from concilium.reports._guarded import guarded
from concilium.results import SCALES
from concilium.schedule import ELSEWHERE, FINETUNED, PERSONAL, title_of
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
    def name(self) -> str:
        """In results.json."""
        return f"{self.title}:{self.owner}" if self.owner else self.title

    @property
    def is_shared(self) -> bool:
        """Whether its patients are those of several owners: small numbers of them are then not told."""
        return self.finished.study.engine.name != "simulation"

    @property
    def cases(self) -> list[Mapping[str, Any]]:
        """Its scores."""
        return [c for c in self.results["cases"] if c["model"] == self.name and self._is_of(c)]

    def _is_of(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is of this seed and fold."""
        of_fold = self.fold is None or row.get("fold", self.fold) == self.fold
        return of_fold and bool(row.get("seed", self.seed) == self.seed)

    @property
    def summary(self) -> list[Mapping[str, Any]]:
        """Means and intervals of its scores; between hospitals none of few patients."""
        rows = self._summary()
        return guarded({"summary": rows})["summary"] if self.is_shared else rows

    def _summary(self) -> list[Mapping[str, Any]]:
        scored = [c for c in self.results["cases"] if c["model"] == self.name]
        trained = [m for m in self.results["models"] if m["name"] == self.title]
        if all(map(self._is_of, [*scored, *trained])):
            return [s for s in self.results["summary"] if s["model"] == self.name]
        made = summarize(self.cases, SCALES, seed=self.finished.study.study.seed)
        return list(with_averages(made, self._averages(), SCALES))

    def _averages(self) -> list[Mapping[str, Any]]:
        """What sites that keep scores of cases back told of this seed and fold; results.json has all seeds and folds together."""
        stems = [file.stem for file in self.finished.files]
        together = [] if self.fold is not None else [re.sub(r"\.f\d+$", ".all", stems[0])]
        files = (self.finished.run / "checkpoints" / key / "finished.json" for key in [*stems, *together])
        told = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        return [row for finished in told for row in finished.get("averages", ()) if row["model"] == self.name]

    @property
    def took(self) -> Mapping[str, Any] | None:
        """What training it, or one of its members, took."""
        return next((m for m in self.results["models"] if m["name"] == self.title and self._is_of(m)), None)

    @property
    def sites(self) -> tuple[str, ...]:
        """Those whose cases it was trained on."""
        alone = self.owner if self.is_of_one_site else ""
        return tuple(s for s in self.finished.study.sites if s != self.unseen and alone in ("", s))

    @property
    def is_of_one_site(self) -> bool:
        """Whether its weights saw the cases of its owner only, and those of others at most from afar."""
        alone = self.finished.study.protocol.name == "local" or self.title == "local"
        return bool(self.owner) and (alone or self.title.endswith(PERSONAL))


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
    least = MIN_CASES if record.is_shared else 0
    rows = []
    for site in dict.fromkeys([*trained, *record.sites]):
        numbers = (trained.get(site), _patients_trained_on(record, site), *_scored(record, site))
        rows.append((site, *("–" if n is None else count(n, least) for n in numbers)))
    v = study.validation
    held_out = (
        f"Scored are the cases of fold {record.fold} of {v.folds}, divided by patient, on which the model was not trained"
        if record.fold is not None
        else f"Each of the {len(record.finished.files)} members leaves out one of {v.folds} folds, divided by patient, and was "
        "scored on it; together they know all cases"
    )
    tested = any((s["model"], s["subset"]) == (record.name, "test") for s in results["summary"])
    n_sites = f"{len(record.sites)} site{'s' * (len(record.sites) != 1)}, named as in the study. "
    lines = [
        f"{n_sites}{held_out}. " + ("A held-out test set was scored too." if tested else "No test set was scored.")
    ]
    if record.unseen:
        lines.append(f"{record.unseen} took no part: all its cases were scored by a model that never saw one.")
    if "pooled" in trained:
        lines.append("`pooled`: the cases of all sites in one place, which only a simulation can do.")
    return rows, [*lines, f"Cases set aside because they could not be used: {_set_aside(results, least)}."]


def _set_aside(results: Results, least: int) -> str:
    """How many cases, in all and by site; not in all where the number of one site must not be told."""
    n: Counter[str] = Counter()
    for line in results["excluded"]:
        n[line["site"]] += line.get("count", 1)
    by_site = ", ".join(f"{site}: {count(n[site], least)}" for site in sorted(n))
    if any(0 < k < least for k in n.values()):
        return by_site
    return f"{n.total()} ({by_site})" if n else "0"


def _scored(record: Record, site: str) -> tuple[int, int]:
    """Cases and patients of a site that were scored; where it keeps their scores back, as many as it told of."""
    own = [c for c in record.cases if (c["site"], c["subset"]) == (site, "validation")]
    if own:
        return len({c["case"] for c in own}), len({c["patient"] for c in own})
    place = (record.name, site, "validation")
    told = [s for s in record.results["summary"] if (s["model"], s["site"], s["subset"]) == place]
    return max((s["n_cases"] for s in told), default=0), max((s["n"] for s in told), default=0)


def _cases_trained_on(record: Record) -> dict[str, int]:
    """Site -> cases; of several members those that any has seen: each case is left out by one of them."""
    # what is made beside a model was trained in its rounds
    members = {title_of(f.stem) + "".join(f.stem.partition(".")[1:]) for f in record.finished.files}
    last: dict[tuple[str, str], int] = {}
    for line in _lines(record.finished, "rounds.jsonl"):
        if line.get("model") in members:
            last |= {(site, line["model"]): told["n_cases"] for site, told in line["sites"].items()}
    found: dict[str, int] = {}
    for (site, _), n in last.items():
        if site in (*record.sites, "pooled"):
            found[site] = found.get(site, 0) + n
    return {site: n // max(1, len(members) - 1) for site, n in found.items()}


def _patients_trained_on(record: Record, site: str) -> int | None:
    """From a simulated site's own list of cases, which lies in the run folder, or from what a site elsewhere told."""
    path = record.finished.run / "sites" / site / "cases.json"
    if site not in record.finished.study.sites:
        return None
    if not path.is_file():
        return _patients_told(record, site)
    noted = json.loads(path.read_text(encoding="utf-8")).get(site, [])
    left_out = {line["case"] for line in record.results["excluded"] if line["site"] == site}
    if record.fold is not None:
        place = (
            site,
            "validation",
            record.fold,
        )  # the same cases for every model, also one that was scored elsewhere only
        left_out |= {c["case"] for c in record.results["cases"] if (c["site"], c["subset"], c["fold"]) == place}
    return len({entry["patient"] for entry in noted if entry["case"] not in left_out})


def _patients_told(record: Record, site: str) -> int | None:
    """All patients that a site told it has, less those of the fold that was held out; `None` where it told of none."""
    run, study = record.finished.run, record.finished.study
    suffix = record.finished.files[0].stem.removeprefix(record.title)
    files = (run / "checkpoints" / f"{title}{suffix}.json" for title in (record.title, study.protocol.name))
    ready: dict[str, Any] = next((json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()), {})
    n = ready.get("patients", {}).get(site)
    if n is None or record.fold is None:
        return None if n is None else int(n)
    return int(n) - len(folds([str(i) for i in range(n)], study.validation.folds, record.fold))


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
        "cyclic": "passed on from site to site, each of which trained it in turn: nothing was aggregated",
    }.get(protocol, f"trained by protocol `{protocol}`, {rules}")
    if record.title.endswith(PERSONAL):
        shared = record.title.removesuffix(PERSONAL)
        how = f"which {record.owner} trained of its own beside `{shared}`, the model of all sites ({how}); it never left the site"
    how += _own_part(record)
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
            f"{took['batch_size']}); {took['parameters']} parameters"
            + (f", of which {took['trained']} train: the others are as the model began." if "trained" in took else ".")
        )
    return lines


def _own_part(record: Record) -> str:
    """What of a model is not the same at all sites, and where that comes from."""
    study, owner = record.finished.study, record.owner
    kept = ", ".join(f"`{name}`" for name in study.sharing.keep)
    said = ""
    if owner and not record.is_of_one_site and study.plan.fingerprint == "site":
        said += f"; its network is by {owner}'s own plan, and what it has in common with others is averaged"
    if kept and owner and not record.is_of_one_site:
        said += f"; {kept} never left {owner}, the rest is averaged"
    if record.title.endswith(ELSEWHERE):
        said += f"; of {kept}, which each site has of its own, it holds the mean, for sites that did not train"
    if record.title.endswith(FINETUNED):
        some = ", ".join(f"`{name}`" for name in study.personalize.tensors) or "all tensors"
        said += f"; then {owner} trained {some} on for {study.personalize.steps} steps on its own cases"
    return said
