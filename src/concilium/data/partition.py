"""One data set divided into the sites of a simulation, by whole patients, and the sites' shifts: as nnU-Net raw folders.

Who gets whom is a function of the seed and of the data set's content, not of the order of its files. What is not changed is
linked; nothing downstream can tell such a folder from one that a hospital made.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from concilium.data._dealing import deal_by_dirichlet, deal_by_labels, deal_by_share, held_out
from concilium.data._description import read_description
from concilium.data._label_counts import Counts, ids_of, label_counts
from concilium.data._raw_folder import write_raw_folder
from concilium.data._values import deal_by_value, some, values_of_file, values_of_names, values_of_table
from concilium.data.dataset import Dataset, open_dataset
from concilium.data.shifts import Shift, check_dimensions
from concilium.errors import DataError, StudyError


@dataclass(frozen=True)
class Partition:
    """The table `[partition]`: how one data set becomes sites."""

    data: Path
    """nnU-Net raw folder that holds every case."""
    by: Literal["key", "csv", "size", "dirichlet", "labels"]
    """What decides who gets whom."""
    test: float | tuple[str, ...] | None = None
    """Share of the patients that is held out first; by key and csv also the values of those held out."""
    key: str | None = None
    """By key: the table in dataset.json, from case or patient to a value ..."""
    pattern: str | None = None
    """... or a regular expression, whose one group in the case's name is the value."""
    file: Path | None = None
    """By csv: a file with the columns `case` and `site`."""
    alpha: float | None = None
    """By dirichlet: small is uneven, large is even."""
    min_patients: int | None = None
    """By dirichlet: the least that each site must get; omitted: 1."""
    rest: str | None = None
    """By key, csv and labels: the site that gets whoever belongs to none; omitted: there may be none such."""
    seed: int | None = None
    """Omitted: the study's."""


@dataclass(frozen=True)
class Member:
    """What the study says of a site, or of the held-out set."""

    data: Path | None = None
    values: tuple[str, ...] | None = None
    share: float | None = None
    annotated: tuple[str, ...] | None = None
    shift: Shift | None = None


@dataclass(frozen=True)
class Part:
    """What a site gets. `cases`: case -> patient. `annotated`: the labels that its label maps keep; `None`: all."""

    source: Dataset
    cases: Mapping[str, str]
    annotated: tuple[str, ...] | None
    shift: Shift | None


@dataclass(frozen=True)
class Layout:
    """Parts by site (and `test`) for those whose folder has to be made."""

    parts: Mapping[str, Part]
    divided: tuple[str, ...]
    """Those that share one data set."""
    notes: tuple[str, ...]
    counts: str | None = None
    """The text of the file that remembers label counts."""

    @property
    def summary(self) -> str:
        """How many cases and patients each part has."""
        return ", ".join(
            f"{name} {len(p.cases)} cases of {len(set(p.cases.values()))} patients" for name, p in self.parts.items()
        )


@dataclass
class _Pool:
    """The data set to be divided. `notes` are added on the way."""

    dataset: Dataset
    patients: Mapping[str, str]
    """Case -> patient, cases that lack a file included: who sets those aside is their site."""
    known: Path | None
    notes: list[str] = field(default_factory=list)
    counts: str | None = None

    def of(self, patients: set[str]) -> dict[str, str]:
        return {c: p for c, p in self.patients.items() if p in patients}

    def voxels(self, patients: set[str]) -> Counts:
        folder, ending = self.dataset.folder / "labelsTr", self.dataset.file_ending
        files = {case: folder / f"{case}{ending}" for case in self.patients}
        counts, self.counts = label_counts(files, self.dataset.labels, self.known)
        return {case: counts[case] for case in self.of(patients)}


def lay_out(partition: Partition | None, members: Mapping[str, Member], folder: Path, *, seed: int) -> Layout:
    """Who gets what; nothing is written. `members`: the sites, and `test` where it has data or a shift.

    Args:
        folder: the run folder, where an earlier session may have counted labels.

    Raises:
        StudyError: table, key, expression, label or spacing do not fit the data, or a site would get nobody.
        DataError: the data set or the CSV cannot be used, a case belongs nowhere, or a patient to two sites.
    """
    parts: dict[str, Part] = {}
    for name, member in members.items():
        if member.data is not None and member.shift is not None:
            dataset = open_dataset(member.data)
            parts[name] = Part(dataset, _patients(dataset), None, member.shift)
    pool, divided = None, {}
    if partition is not None:
        dataset = open_dataset(partition.data)
        pool = _Pool(dataset, _patients(dataset), folder / "partition" / "labels.json")
        given = {name: m for name, m in members.items() if m.data is None}
        divided = _divide(partition, given, pool, seed=seed if partition.seed is None else partition.seed)
        parts |= divided
    for name, part in parts.items():
        if part.shift is not None and part.source.cases:
            table = "test" if name == "test" else f"sites.{name}"
            check_dimensions(part.shift, part.source.cases[0].images[0], f"[{table}.shift]")
    return Layout(parts, tuple(divided), tuple(pool.notes) if pool else (), pool.counts if pool else None)


def materialise(layout: Layout, folder: Path, *, seed: int) -> dict[str, Path]:
    """Write a folder for each part below `folder`/partition, and who is where into `folder`/partition.csv; the folders.

    What is there already is used, so a run that goes on has the same data.

    Raises:
        DataError: the run began with another division, or a case can be read but not written.
    """
    made = folder / "partition"
    if layout.divided:
        _check_unchanged(layout, folder / "partition.csv")
    if layout.parts and not made.exists():
        unfinished = folder / "partition.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, part in layout.parts.items():
            write_raw_folder(
                unfinished / name,
                part.source,
                part.cases,
                annotated=part.annotated,
                shift=part.shift,
                key=(seed, name),
            )
        if layout.counts is not None:
            (unfinished / "labels.json").write_text(layout.counts, encoding="utf-8")
        unfinished.rename(made)
    return {name: made / name for name in layout.parts}


def _patients(dataset: Dataset) -> dict[str, str]:
    """Case -> patient, sorted by case; those that lack a file included."""
    named = read_description(dataset.folder).patients
    names = [*(c.name for c in dataset.cases), *(name for name, _ in dataset.missing)]
    return {case: named.get(case, case) for case in sorted(names)}


# -------------------------------------------------------------------------------------------------------- who gets whom


def _divide(p: Partition, members: Mapping[str, Member], pool: _Pool, *, seed: int) -> dict[str, Part]:
    sites = {name: m for name, m in members.items() if name != "test"}
    everyone = sorted(set(pool.patients.values()))
    out = held_out(everyone, p.test, seed=seed) if isinstance(p.test, float) else set()
    left = [patient for patient in everyone if patient not in out]
    dealt = dict.fromkeys(out, "test")
    match p.by:
        case "key" | "csv":
            dealt |= _by_value(p, sites, pool, left)
        case "size":
            dealt |= deal_by_share(left, {name: m.share or 1.0 for name, m in sites.items()}, seed=seed)
        case "dirichlet":
            shares = _frequencies(pool, left)
            dealt |= deal_by_dirichlet(
                shares, list(sites), alpha=p.alpha or 1.0, min_patients=p.min_patients or 1, seed=seed
            )
        case "labels":
            dealt |= _by_labels(p, sites, pool, left, seed=seed)
    names = [*sites, *(["test"] if p.test is not None else [])]
    n = Counter(dealt.values())
    for name in names:
        if not n[name]:
            told = ", ".join(f"{name} {n[name]}" for name in names)
            raise StudyError(
                f"[partition] leaves no patient for {name} ({told}). Every site must get at least one. Change what it gets, or "
                "have fewer sites."
            )
    nobody = Member()
    return {
        name: Part(
            pool.dataset,
            pool.of({patient for patient, site in dealt.items() if site == name}),
            members.get(name, nobody).annotated,
            members.get(name, nobody).shift,
        )
        for name in names
    }


def _by_value(p: Partition, sites: Mapping[str, Member], pool: _Pool, left: Sequence[str]) -> dict[str, str]:
    patients = pool.of(set(left))
    if p.file is not None:
        given = values_of_file(p.file)
        unknown = sorted(given.keys() - pool.patients.keys())
        if unknown:
            pool.notes.append(f"{len(unknown)} rows of {p.file.name} name no case of the data set ({some(unknown)}).")
    elif p.pattern is not None:
        given = values_of_names(pool.patients, p.pattern)
    else:
        given = values_of_table(pool.dataset.folder, p.key or "", pool.patients)
    owner = {value: name for name, m in sites.items() for value in (m.values or (name,))}
    owner |= dict.fromkeys(p.test, "test") if isinstance(p.test, tuple) else {}
    return deal_by_value(patients, given, owner, rest=p.rest, by=p.by)


def _frequencies(pool: _Pool, patients: Sequence[str]) -> dict[str, list[float] | None]:
    """Patient -> share of the voxels of each label."""
    sums: dict[str, Counter[str]] = {patient: Counter() for patient in patients}
    for case, counts in pool.voxels(set(patients)).items():
        sums[pool.patients[case]].update(counts or {})
    totals = {patient: max(1, sum(counts.values())) for patient, counts in sums.items()}
    return {p: [n[name] / totals[p] for name in pool.dataset.labels] if n else None for p, n in sums.items()}


def _by_labels(
    p: Partition, sites: Mapping[str, Member], pool: _Pool, left: Sequence[str], *, seed: int
) -> dict[str, str]:
    names = [name for name, value in pool.dataset.labels.items() if ids_of(value) != [0]]
    for site, member in sites.items():
        unknown = [name for name in member.annotated or () if name not in names]
        if unknown:
            raise StudyError(
                f"[sites.{site}] annotated = {list(member.annotated or ())} names {some(unknown)}. dataset.json has: "
                f"{', '.join(names)}. Correct it."
            )
    shares = _frequencies(pool, left)
    present = {
        patient: None if row is None else {name for name, x in zip(pool.dataset.labels, row, strict=True) if x > 0}
        for patient, row in shares.items()
    }
    dealt, nowhere = deal_by_labels(present, {s: m.annotated or () for s, m in sites.items()}, seed=seed)
    if nowhere and p.rest is None:
        raise DataError(
            f"[partition] by = 'labels': in {len(nowhere)} of {len(left)} patients no label occurs that a site annotates "
            f'({some(nowhere)}). Every patient must belong to a site. Name the one that gets them: rest = "SITE".'
        )
    reduced = [site for site, m in sites.items() if set(names) - set(m.annotated or ()) - {"ignore"}]
    if reduced:
        pool.notes.append(
            f"Labels that a site does not annotate are background in its label maps: {', '.join(reduced)}."
        )
    return dealt | dict.fromkeys(nowhere, p.rest or "")


# ------------------------------------------------------------------------------------------------------------- folders


def _check_unchanged(layout: Layout, path: Path) -> None:
    """Write who is where; what a run began with must come out as it was."""
    rows = sorted(
        (case, patient, name) for name in layout.divided for case, patient in layout.parts[name].cases.items()
    )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("case", "patient", "site"), *rows])
    if path.exists() and path.read_text(encoding="utf-8") != text.getvalue():
        raise DataError(
            f"{path} would change: the data set that is divided is not what it was. A run goes on with the data it began with. "
            "Put them back, or give another --out."
        )
    path.write_text(text.getvalue(), encoding="utf-8")
