"""Sites that hold channels of the same patients: whose cases all have, and what each is asked to prepare (`vertical`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from concilium.alignment import Found, intersect
from concilium.answers.new_patients import NEW
from concilium.data.dataset import open_dataset, restricted
from concilium.data.joined import write_joined
from concilium.data.parties import joined
from concilium.engines import Engine, ask
from concilium.errors import DataError, EngineError
from concilium.messages import (
    Align,
    Aligned,
    Blind,
    Blinded,
    Examined,
    Holding,
    Offer,
    Offered,
    Prepare,
    Prepared,
    Request,
    as_failure,
    describe,
)
from concilium.networks._fusion import OF_FRONTS
from concilium.planning import Plans
from concilium.record import Record
from concilium.schedule import Setting
from concilium.study import Study, fronts_stay, holdings, is_vertical, names_of, parties_of, sites_of

T = TypeVar("T")
POOLED = "joined"
"""Folder of the run in which a simulation joins the channels of all sites, for the baseline in one place."""


def pool_of(study: Study, folder: Path) -> dict[str, Path]:
    """What a simulation is told of the data of all together, where these are not simply the cases of all."""
    joins = is_vertical(study) and study.engine.name == "simulation"
    return {"pooled": folder / POOLED} if joins else {}


def as_one(study: Study, told: Mapping[str, Examined]) -> dict[str, Examined]:
    """What the sites told, as if each had the channels of all: they have one set of cases, and one set of labels.

    Raises:
        DataError: a site has other channels than it is said to hold.
        EngineError: a site did not answer.
    """
    labels = study.protocol.options["labels"]
    if lost := [name for name in study.sites if name not in told]:
        raise EngineError(
            f"{', '.join(lost)} did not tell of its cases. All sites must, since each holds channels that nobody else has. Mend "
            "it and start again."
        )
    channels = tuple(channel for name in study.sites for channel in told[name].channels)
    whole = joined({name: told[name].fingerprint for name in study.sites}, labels)
    one = replace(told[labels], channels=channels, fingerprint=whole)
    return {name: one if name in study.sites else reply for name, reply in told.items()}


UNPRACTISED = (
    "{name}: incomplete = true with drop = 0: the network never learns to do without a site, and what it makes of patients whom "
    "one lacks is left to chance. Train with [protocol] drop = 0.2 or so, or take incomplete out."
)


@dataclass(frozen=True)
class Agreed:
    """A number for the patient of each case that all sites have, and what a report must say of it."""

    patients: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    fewer: bool = False
    """Whether a site has cases that not all have."""


NOTHING = Agreed()


def align_parties(study: Study, engine: Engine, record: Record) -> Agreed:
    """Have the sites find which cases all of them have.

    Raises:
        EngineError: a site failed.
        DataError: too few cases are everywhere.
    """
    held, labels = holdings(study), str(study.protocol.options["labels"])
    counts, found, replies = _aligned(engine, held, "known", begins=not record.begun)
    patients = replies[labels].patients
    if len(set(patients)) < 2:
        raise DataError(
            f"{len(patients)} cases of {len(set(patients))} patients are at all sites ({_told(counts)}). At least two patients "
            "are needed, of whom one validates. Cases must be called the same at all sites: rename the files."
        )
    if "centralized" in study.protocol.compare and study.engine.name == "simulation":
        _join(study, record)
    n, apart, lost = len(patients), len(found[labels].apart), len(found[labels].lost)
    too_many = apart + lost > study.study.max_excluded * (n + apart + lost)
    warnings = [UNPRACTISED.format(name=name) for name, one in _settings(study) if _is_unpractised(one)]
    problems: list[str] = []
    if any(count != n for count in counts.values()):
        warnings.append(f"{n} cases are at all sites, and trained on ({_told(counts)} are there).")
    if apart:
        text = f"{apart} cases that all sites have lie elsewhere in space at one of them, and are set aside (geometry_differs)."
        (problems if too_many else warnings).append(text)
    if lost:
        text = f"{lost} cases that all sites have cannot be used at one of them, which notes why, and are set aside by all."
        (problems if too_many else warnings).append(text)
    return Agreed(patients, tuple(warnings), tuple(problems), any(count != n for count in counts.values()))


def _settings(study: Study) -> list[tuple[str, Study]]:
    return [(study.protocol.name, study), *study.variants.items()]


def _is_unpractised(study: Study) -> bool:
    """Whether it is to do without a site, and never learns that."""
    options = study.protocol.options
    return is_vertical(study) and options["incomplete"] and not options["drop"]


def must_lie_alike(ready: Mapping[str, Prepared]) -> None:
    """Check that all parties' preprocessed cases have the same shapes: they draw the same patches of them.

    Raises:
        DataError: they have not.
    """
    told = {name: reply.shapes for name, reply in ready.items() if reply.shapes}
    if len(set(told.values())) > 1:
        raise DataError(
            f"Preprocessed images of the same cases have other shapes at some of {', '.join(told)}, although their files agree "
            "to a ten-thousandth: spacings differ by that little, and the plan's is such that it is rounded otherwise. Write the "
            "same spacing at all sites."
        )


@dataclass(frozen=True)
class Newcomers:
    """New cases that are segmented together: of each who has it, and its place there; and how many lie elsewhere in space."""

    cases: tuple[Mapping[str, int], ...]
    apart: int


def align_new(study: Study, engine: Engine) -> Newcomers:
    """Have the sites find which new cases all of them have; with `incomplete` those that whoever has the labels has, and a party.

    Raises:
        EngineError: a site failed.
    """
    held = {name: own for name, own in holdings(study).items() if name in sites_of(study)}
    labels, parties = str(study.protocol.options["labels"]), set(parties_of(study))

    def enough(who: Collection[str]) -> bool:
        return labels in who and not parties.isdisjoint(who)

    _, found, _ = _aligned(engine, held, NEW, enough=enough if study.protocol.options["incomplete"] else None)
    places: list[dict[str, int]] = [{} for _ in found[labels].rows]  # which has them all
    for name, own in found.items():
        for place, case in enumerate(own.cases):
            places[case][name] = place
    return Newcomers(tuple(places), len(found[labels].apart))


def _aligned(
    engine: Engine,
    held: Mapping[str, Holding],
    subset: str,
    *,
    begins: bool = True,
    enough: Callable[[Collection[str]], bool] | None = None,
) -> tuple[dict[str, int], dict[str, Found], dict[str, Aligned]]:
    """How many cases each site offered, which of them all have, and what the sites answered when they were told."""

    def blind(site: str, points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _all(engine, {site: Blind(points)}, Blinded)[site].points

    offered = _all(engine, {name: Offer(own, subset, begins) for name, own in held.items()}, Offered)
    unusable = {name: o.unusable for name, o in offered.items()}
    found = intersect({name: (o.cases, o.geometry) for name, o in offered.items()}, blind, unusable, enough)
    replies = _all(engine, {n: Align(held[n], f.rows, f.apart, subset, f.lost) for n, f in found.items()}, Aligned)
    return {name: len(o.cases) for name, o in offered.items()}, found, replies


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def held_requests(setting: Setting, plans: Plans, asked: Mapping[str, Prepare]) -> dict[str, Prepare]:
    """What each site is asked to prepare: the channels that it holds; sites that take no part nothing."""
    study = setting.study
    held, taking = holdings(study), sites_of(study)
    found = {}
    for name, request in asked.items():
        if study.protocol.options["patches"] == "uniform":  # those that follow the labels would tell where these are
            request = replace(request, training=replace(request.training, foreground=0.0))
        if name in held and name in taking:
            keep = (OF_FRONTS,) if fronts_stay(study) else ()
            request = replace(request, plans=plans.of(name), holding=held[name], patients=plans.patients, keep=keep)
        if name not in held or name in taking:
            found[name] = request
    return found


def _all(engine: Engine, requests: Mapping[str, Request], expected: type[T]) -> dict[str, T]:
    """The replies of all.

    Raises:
        EngineError: one failed.
    """
    found: dict[str, T] = {}
    for name, reply in list(ask(engine, requests)):  # all, or the next question gets the last replies
        if not isinstance(reply, expected):
            raise EngineError(
                f"{name} failed while cases were aligned: {describe(as_failure(reply))}. All sites must answer. Mend it and "
                "start again."
            )
        found[name] = reply
    return {name: found[name] for name in requests}


def _join(study: Study, record: Record) -> None:
    """Join the channels of all sites in a folder of the run, for a baseline that one hospital with all of them would have."""
    held, named = holdings(study), names_of(study)
    labels = study.protocol.options["labels"]
    names = json.loads((record.folder / "sites" / labels / "aligned.json").read_text(encoding="utf-8"))
    sets = {}
    for name, site in study.sites.items():
        dataset = open_dataset(site.data or Path(), named.get(name), labelled=held[name].labelled)
        if held[name].channels or held[name].labelled:
            sets[name] = (restricted(dataset, held[name].channels), bool(held[name].channels))
    write_joined(record.folder / POOLED, sets, labels=labels, cases=names)
