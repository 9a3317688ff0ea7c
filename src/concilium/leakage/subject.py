"""What is audited: a model of a run, its sites' data, and the attacker's own cases. For whoever owns the simulation only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import cast

import numpy as np
import torch

from concilium.answers import Entry, Job, Settings
from concilium.answers._aligned import note_aligned
from concilium.answers.align import patients_of
from concilium.answers.statistics import find_cases, prepare
from concilium.attacks import AUDITED
from concilium.beginning import frozen_as
from concilium.data.matching import Names
from concilium.data.parties import of_channels
from concilium.data.patches import Batch, Batches
from concilium.data.preprocess import Array, Prepared
from concilium.data.preprocess import prepare as prepare_case
from concilium.errors import DataError, StudyError
from concilium.finished import open_finished
from concilium.leakage.weights import fronts_at, weights_after
from concilium.messages import Prepare, Tensors
from concilium.planning import Plans
from concilium.preparation import on_folders
from concilium.schedule import Setting, is_partly_shared
from concilium.study import Study, divide, fronts_stay, holdings, is_vertical, of_sites, places, sites_of
from concilium.together import held_requests

ATTACKER = "attacker"
"""What the attacker's cases are prepared as; no site of a simulation has a folder of this name here."""


@dataclass(frozen=True)
class Subject:
    """A model and where it comes from. `number`: after how many rounds its weights were these."""

    run: Path
    name: str
    study: Study
    plans: Plans
    weights: Tensors
    number: int
    sites: Mapping[str, Path]
    """Site -> data: the victims."""
    own: Path
    """The attacker's data."""
    own_names: Names | None
    work: Path
    files: tuple[Path, ...] = ()
    """Where sites have tensors from that do not train."""
    hidden: bool = False
    """Whether fronts stay at their sites: then who gets their maps does not know their weights."""

    @property
    def cache(self) -> Path:
        """Where preprocessed cases lie."""
        return self.study.engine.cache or self.run / "cache"

    @property
    def requests(self) -> Mapping[str, Prepare]:
        """What each site is asked to prepare by, as in the run, and the attacker with all channels."""
        request = self.plans.request(self.study)
        asked = dict.fromkeys((*self.sites, ATTACKER), request)
        if not is_vertical(self.study):
            return asked
        setting = Setting(self.study.protocol.name, self.study, "", is_base=True, is_member=False)
        return held_requests(setting, self.plans, asked)

    @property
    def labels_at(self) -> str:
        """Where sites hold channels of the same patients: the site with the labels."""
        return str(self.study.protocol.options["labels"])

    @cached_property
    def places(self) -> Mapping[str, tuple[int, ...]]:
        """Which channels of the whole image each site has."""
        every = tuple(range(len(self.plans.channels)))
        held = places(self.study) if is_vertical(self.study) else dict.fromkeys(self.sites, every)
        return {name: held[name] for name in self.sites}

    def align(self) -> None:
        """Where sites hold channels of the same patients: let each know which cases all have, as the run found out."""
        if is_vertical(self.study):
            names = _aligned(self.run, self.labels_at)
            for name, data in self.sites.items():
                settings = self.settings(name, data)
                settings.folder.mkdir(parents=True, exist_ok=True)
                note_aligned(settings, names)

    def settings(self, name: str, data: Path) -> Settings:
        """Of a site that answers for these data, on this machine."""
        e, told = self.study.engine, of_sites(self.study)
        names = dict(told.get("names", {})) | ({ATTACKER: self.own_names} if self.own_names else {})
        return Settings(
            name, "site", {name: data}, None, self.work / "sites" / name, self.cache, e.threads, e.device, names=names,
            pictures=False, weights=self.files,
        )  # fmt: skip

    @cached_property
    def jobs(self) -> Mapping[str, Job]:
        """Each victim's job: its cases and batches, as the site has them."""
        self.align()
        return {name: self._job(name, data) for name, data in self.sites.items()}

    @cached_property
    def attacker(self) -> Job:
        """The attacker's cases, of which all are used.

        Raises:
            DataError: one of them is a victim's.
        """
        job = self._job(ATTACKER, self.own)
        entries = (*job.entries["training"], *job.entries["validation"])
        self._refuse_victims(job, entries)
        return replace(job, entries={"training": entries, "validation": ()}, batches=self.batches(job, entries))

    def batches(self, job: Job, entries: Iterable[Entry], *, plainly: bool = False) -> Batches:
        """Batches of these cases as the study draws them; `plainly`: one patch, not augmented, where there is foreground.

        Parties draw anywhere: only one of them knows where there is foreground.
        """
        t, share = job.training, 1.0 if plainly else job.training.foreground
        return Batches(
            {e.key: self.prepared(job, e) for e in entries},
            plan=job.plan,
            labels=job.labels,
            batch_size=1 if plainly else job.plan.batch_size,
            foreground=0.0 if is_vertical(self.study) else share,
            mirror=t.mirror and not plainly,
            augmentation="none" if plainly else t.augmentation,
            deep_supervision=t.deep_supervision,
        )

    def plain_patch(self, site: str, entry: Entry) -> Batch:
        """A patch of a case of a site, or with `` of the attacker, not augmented; of parties with the channels of all."""
        job = self.jobs[site] if site else self.attacker
        if not site or not is_vertical(self.study):
            return self.batches(job, [entry], plainly=True).draw("plain", entry.number)
        kind, i = next((kind, own.index(entry)) for kind, own in job.entries.items() if entry in own)
        drawn = {
            name: self.batches(of, [of.entries[kind][i]], plainly=True).draw("plain", entry.number)
            for name, of in self.jobs.items()
        }
        image = torch.zeros(1, len(self.plans.channels), *drawn[site].image.shape[2:])
        for name, mine in self.places.items():
            if mine:
                image[:, list(mine)] = drawn[name].image
        return drawn[site]._replace(image=image)

    def prepared(self, job: Job, entry: Entry) -> Prepared:
        """The preprocessed case."""
        cache = self.cache / entry.member
        return prepare_case(entry.case, entry.dataset, job.plan, cache, labelled=job.labelled)

    def _job(self, name: str, data: Path) -> Job:
        _, job, _ = prepare(self.settings(name, data), self.requests[name], lambda: False)
        return job

    def _refuse_victims(self, own_job: Job, own: Iterable[Entry]) -> None:
        theirs = {
            self._digest(self.prepared(job, e).image): f"{site}/{e.case.name}"
            for site, job in self.jobs.items()
            for e in (*job.entries["training"], *job.entries["validation"])
            if self.places[site]
        }
        looked_at = dict.fromkeys(mine for mine in self.places.values() if mine)
        both = [
            (e.case.name, theirs[d])
            for e in own
            for image in [self.prepared(own_job, e).image]
            for mine in looked_at
            if (d := self._digest(image[list(mine)])) in theirs
            and np.ptp(image[list(mine)])  # what is empty is nobody's
        ]
        if both:
            raise DataError(
                f"{len(both)} cases of the attacker are victims' ({both[0][0]} is {both[0][1]}). An attack trained on the "
                "images that it is to find shows nothing. Give other cases with --auxiliary.",
            )

    def _digest(self, image: Array) -> bytes:
        """Of the image as it is prepared: a copy under another name or in another file is the same."""
        return blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest()


def subject_of(
    run: Path, model: str | None, *, auxiliary: str | None, work: Path, number: int | None = None
) -> Subject:
    """A model of a run, finished or as it was after a round of which the weights were kept.

    Args:
        auxiliary: whose cases the attacker has: a folder, or a site of the study, which then is no victim; omitted: the test set.

    Raises:
        StudyError: there is no such model, no cases for the attacker, or tensors stay at sites, which is not audited yet.
    """
    finished = open_finished(run, model, apart=True)
    study, hidden = finished.study, fronts_stay(finished.study)
    if study.protocol.name not in AUDITED:
        raise StudyError(
            f"[protocol] name = {study.protocol.name!r} of {finished.name} cannot be audited yet. Allowed: {', '.join(AUDITED)}. "
            "Audit one of these with --model."
        )
    if is_partly_shared(study) or ":" in finished.name or len(finished.files) > 1:
        raise StudyError(
            f"Model {finished.name} of {run} cannot be audited: parts of it stay at sites, or it is several folds together. "
            "Expected one network that all sites share, or one fold of it (NAME.f0). Choose it with --model."
        )
    layout = divide(study, run)
    study = on_folders(study, layout, run) if layout.parts else study
    v = study.validation
    fold = v.fold if isinstance(v.fold, int) else int(finished.name.rpartition(".f")[2])
    one = replace(study.validation, fold=fold)
    study = replace(study, validation=one, training=replace(study.training, loader_workers=0), variants={})
    sites = {name: cast(Path, study.sites[name].data) for name in sites_of(study)}
    own, names = _own(study, sites, auxiliary)
    weights = finished.weights()[0]
    if hidden:  # to compute anew what was sent, which is the same: maps do not depend on who has the fronts
        weights = {**weights, **fronts_at(run, study, f"models/{finished.files[0].name}")}
        options = {**study.protocol.options, "fronts": "sent"}
        study = replace(study, protocol=replace(study.protocol, options=options))
    done = study.protocol.rounds
    text, plan = finished.plans, finished.plan
    plans = Plans(text, finished.channels, finished.labels, plan.patch_size, plan.batch_size)
    if is_vertical(study):
        held = {name: of_channels(text, mine or (0,)) for name, mine in places(study).items()}
        plans = replace(plans, held=held, patients=_patients(study, run, sites))
    plans = frozen_as(study, plans, weights, finished.files[0])
    if number is not None and number != done:
        weights, done = weights_after(run, finished.name, number, study, plans), number
    return Subject(run, finished.name, study, plans, weights, done, sites, own, names, work, finished.files, hidden)


def _aligned(run: Path, site: str) -> list[str]:
    """The cases that all parties of a run have."""
    names: list[str] = json.loads((run / "sites" / site / "aligned.json").read_text(encoding="utf-8"))
    return names


def _patients(study: Study, run: Path, sites: Mapping[str, Path]) -> tuple[int, ...]:
    """A number for the patient of each case that all have, by whoever has the labels."""
    site = str(study.protocol.options["labels"])
    found, _ = find_cases({site: sites[site]}, of_sites(study).get("names", {}), holding=holdings(study)[site])
    return patients_of(found, _aligned(run, site))


def _own(study: Study, sites: dict[str, Path], auxiliary: str | None) -> tuple[Path, Names | None]:
    """The attacker's data; a site that attacks is taken from the victims."""
    names: Mapping[str, Names] = of_sites(study).get("names", {})
    if is_vertical(study) and auxiliary in study.sites:
        raise StudyError(
            f"--auxiliary {auxiliary} holds channels of the patients that are attacked. Expected cases of others, with the "
            "channels of all sites. Give a folder, or leave it out, for the test set."
        )
    if auxiliary in sites:
        data = sites.pop(str(auxiliary))
        if not sites:
            raise StudyError(
                f"--auxiliary {auxiliary} is the only site. Expected another as well. Give a folder instead."
            )
        return data, names.get(str(auxiliary))
    if auxiliary is not None:
        if not (Path(auxiliary) / "dataset.json").is_file():
            raise StudyError(
                f"--auxiliary {auxiliary} is neither a site ({', '.join(sites)}) nor an nnU-Net raw folder. Correct it."
            )
        return Path(auxiliary), None
    if study.test is None or study.test.data is None:
        raise StudyError(
            f"Study {study.study.name} has no test set, whose cases an attacker could have. An attack needs cases of its own. "
            "Give a folder or a site with --auxiliary."
        )
    return study.test.data, names.get("test")
