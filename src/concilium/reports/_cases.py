"""Scores as a report looks at them: cases with one figure each, the worst of them, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from concilium.disclosure import MIN_CASES
from concilium.reports._elements import amount
from concilium.reports._figures import NEUTRAL
from concilium.reports._found import Found, Picture, Row
from concilium.reports._guarded import guarded
from concilium.reports._units import unit_of, volume_of
from concilium.statistics import ALL_SITES, WITHOUT

SMALL_SHARE = 5
"""Percentile of a site's reference volumes below which a structure is small ..."""
SMALL_FROM = 20
"""... where the site has so many: among fewer, some case is always the smallest."""
SPACING_SLACK = 0.01
"""Share by which a spacing may leave the federation's range: sites tell theirs rounded."""

Place = tuple[str, str]
"""Site, subset."""


@dataclass(frozen=True)
class View:
    """What a report may show: everything, or (`private`) nothing that describes fewer than `min_cases` patients."""

    found: Found
    private: bool
    min_cases: int = MIN_CASES

    @cached_property
    def results(self) -> Mapping[str, Any]:
        """The run's results; in a private report what must not be shown has no figure (`_guarded.py`)."""
        return guarded(self.found.results, self.min_cases) if self.private else self.found.results

    def enough(self, n: int) -> bool:
        """Whether a figure over `n` patients may be shown."""
        return not self.private or n >= self.min_cases

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names, the study's own first, without those trained without a site (`of` gives what these reach "
        "there)."""
        names = dict.fromkeys(m["name"] for m in self.found.results["models"])
        return tuple(name for name in names if WITHOUT not in name) or tuple(names)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where cases were scored: the test set, then the sites, then sites that a model never saw."""
        scored = [
            *self.found.results["cases"],
            *self.found.results["summary"],
        ]  # a site may keep its cases' scores back
        places = dict.fromkeys((row["site"], row["subset"]) for row in scored if row["site"] != ALL_SITES)
        return tuple(sorted(places, key=lambda p: (p[1] != "test", p[1] == "unseen")))

    @property
    def pools(self) -> tuple[Place, ...]:
        """Where the sites' cases count together."""
        found = dict.fromkeys((s["site"], s["subset"]) for s in self.found.results["summary"])
        return tuple(p for p in found if p == (ALL_SITES, "validation"))

    @property
    def kept_back(self) -> tuple[Place, ...]:
        """Where scores are known on average only: the site keeps those of its cases back."""
        told = {(c["site"], c["subset"]) for c in self.found.results["cases"]}
        return tuple(place for place in self.places if place not in told)

    @property
    def colours(self) -> Mapping[str, int]:
        """A number for each site, the same in every figure."""
        trained = [s for line in self.found.rounds for s in line["sites"]]
        scored = [c["site"] for c in self.found.results["cases"]]
        names = list(dict.fromkeys(trained + scored))
        sites = [name for name in names if name not in ("pooled", "test")]
        numbers = {name: i for i, name in enumerate(sites)}
        return numbers | {"pooled": len(sites)} | {"test": NEUTRAL}

    @property
    def unit(self) -> str:
        """`mm`, `px`, or `mm or px` where sites differ."""
        return unit_of(self.found.results["cases"], self.found.file_ending)

    def unit_at(self, place: Place) -> str:
        """The unit of distances there; empty where it is that of all, or not known."""
        own = [c for c in self.found.results["cases"] if (c["site"], c["subset"]) == place]
        return unit_of(own) if own and " or " in self.unit else ""

    @property
    def volume_unit(self) -> str:
        """`ml`, `px` where the spacing is unknown, or `ml or px`."""
        return volume_of(self.unit)

    def of(self, model: str) -> list[Row]:
        """The scores of a model, at every site that has one of its name, and on a site that it never saw."""
        return [c for c in self.found.results["cases"] if base(c["model"]) == at(model, (c["site"], c["subset"]))]


@dataclass(frozen=True)
class CaseScore:
    """One case under one model: Dice over the labels (and the seeds), `None` where it is undefined for all."""

    model: str
    place: Place
    case: str
    dice: float | None
    rows: tuple[Row, ...]


def at(model: str, place: Place) -> str:
    """The name of what stands for a model at a place: where it says `unseen`, the one that was trained without that site."""
    site, subset = place
    return f"{model}{WITHOUT}{site}" if subset == "unseen" and WITHOUT not in model else model


def base(model: str) -> str:
    """The model's name without that of a site."""
    return model.partition(":")[0]


def place_name(place: Place) -> str:
    """What a person calls it."""
    site, subset = place
    if site == ALL_SITES:
        return "all sites"
    return "test set" if site == "test" else f"{site}, {subset} cases" if subset != "validation" else site


def names_of(places: Iterable[Place]) -> str:
    """The names of places in a row, each once."""
    return ", ".join(dict.fromkeys(place_name((site, "validation")) for site, _ in places))


def by_case(rows: Iterable[Row]) -> list[CaseScore]:
    """Scores by case, in their order."""
    groups: dict[tuple[str, Place, str], list[Row]] = defaultdict(list)
    for r in rows:
        groups[base(r["model"]), (r["site"], r["subset"]), r["case"]].append(r)
    return [CaseScore(*key, mean_of(r["dice"] for r in group), tuple(group)) for key, group in groups.items()]


def mean_of(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def ranked(cases: Sequence[CaseScore]) -> list[CaseScore]:
    """Those whose Dice is defined, the worst first."""
    return sorted((c for c in cases if c.dice is not None), key=lambda c: (c.dice, c.place, c.case))


def patients(rows: Iterable[Row]) -> int:
    """How many patients the scores are of."""
    return len({(r["site"], r["patient"]) for r in rows})


def small_volumes(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """(Site, label) -> volume below which a structure counts as small there; sites with too few cases have none."""
    volumes: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for r in rows:
        if r["reference_volume"] > 0:
            volumes[r["site"], r["label"]][r["case"]] = r["reference_volume"]
    return {
        key: float(np.percentile(list(found.values()), SMALL_SHARE))
        for key, found in volumes.items()
        if len(found) >= SMALL_FROM
    }


def reasons(case: CaseScore, view: View, small: Mapping[tuple[str, str], float]) -> list[str]:
    """What is known of why a case may be hard."""
    told: dict[str, None] = {}
    for r in case.rows:
        if r["status"] == "empty_prediction":
            told[f"{r['label']}: nothing was predicted"] = None
        if r["status"] == "empty_reference":
            told[f"{r['label']}: predicted, but not in the reference"] = None
        limit = small.get((r["site"], r["label"]), 0.0)
        if 0 < r["reference_volume"] < limit:
            volume = f"{amount(r['reference_volume'])} {volume_of(r['unit'])}"
            told[f"{r['label']}: small ({volume}; one in twenty at this site is below {amount(limit)})"] = None
    picture = view.found.picture(case.rows[0])
    return [*told, *(_unlike_training(picture, view.found) if picture else [])]


def _unlike_training(picture: Picture, found: Found) -> list[str]:
    """In what a case lies outside the federation's fingerprint."""
    told = []
    spacings = [g["spacing"] for g in found.fingerprint.get("geometry", [])]
    if picture.spacing and spacings:
        limits = [
            (min(axis) * (1 - SPACING_SLACK), max(axis) * (1 + SPACING_SLACK)) for axis in zip(*spacings, strict=True)
        ]
        if any(not low <= mm <= high for mm, (low, high) in zip(picture.spacing, limits, strict=False)):
            mm = " × ".join(amount(s) for s in picture.spacing)
            told.append(f"spacing {mm} mm is outside the federation's")
    known: Mapping[str, Any] = found.plans.get("foreground_intensity_properties_per_channel", {})
    for i, median in enumerate(picture.medians or ()):
        channel = known.get(str(i))
        if channel and not channel["percentile_00_5"] <= median <= channel["percentile_99_5"]:
            told.append(f"intensity (channel {i}: median {amount(median)}) is outside 99 % of the federation's")
    return told
