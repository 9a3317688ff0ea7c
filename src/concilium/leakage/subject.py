"""What is audited: a model of a run, its sites' data, and the attacker's own cases. For whoever owns the simulation only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import cast

import numpy as np

from concilium.answers import Entry, Job, Settings
from concilium.answers.statistics import prepare
from concilium.data.matching import Names
from concilium.data.patches import Batches
from concilium.data.preprocess import Prepared
from concilium.data.preprocess import prepare as prepare_case
from concilium.errors import DataError, StudyError
from concilium.finished import open_finished
from concilium.messages import Prepare, Tensors
from concilium.planning import Plans, initial_weights
from concilium.preparation import on_folders
from concilium.schedule import is_partly_shared
from concilium.study import Study, divide, of_sites
from concilium.wire import read_tensors

AUDITED = ("federated", "splitfed")
"""Protocols that an audit knows the messages of."""
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

    @property
    def cache(self) -> Path:
        """Where preprocessed cases lie."""
        return self.study.engine.cache or self.run / "cache"

    @property
    def request(self) -> Prepare:
        """What sites are asked to prepare by, as in the run."""
        return self.plans.request(self.study)

    def settings(self, name: str, data: Path) -> Settings:
        """Of a site that answers for these data, on this machine."""
        e, told = self.study.engine, of_sites(self.study)
        names = dict(told.get("names", {})) | ({ATTACKER: self.own_names} if self.own_names else {})
        return Settings(
            name, "site", {name: data}, None, self.work / "sites" / name, self.cache, e.threads, e.device, names=names,
            pictures=False,
        )  # fmt: skip

    @cached_property
    def jobs(self) -> Mapping[str, Job]:
        """Each victim's job: its cases and batches, as the site has them."""
        return {name: self._job(name, data) for name, data in self.sites.items()}

    @cached_property
    def attacker(self) -> Job:
        """The attacker's cases, of which all are used.

        Raises:
            DataError: one of them is a victim's.
        """
        job = self._job(ATTACKER, self.own)
        entries = (*job.entries["training"], *job.entries["validation"])
        self._refuse_victims(entries)
        return replace(job, entries={"training": entries, "validation": ()}, batches=self.batches(job, entries))

    def batches(self, job: Job, entries: Iterable[Entry], *, plainly: bool = False) -> Batches:
        """Batches of these cases as the study draws them; `plainly`: one patch, not augmented, where there is foreground."""
        t = job.training
        return Batches(
            {e.key: self.prepared(e) for e in entries},
            plan=job.plan,
            labels=job.labels,
            batch_size=1 if plainly else job.plan.batch_size,
            foreground=1.0 if plainly else t.foreground,
            mirror=t.mirror and not plainly,
            augmentation="none" if plainly else t.augmentation,
            deep_supervision=t.deep_supervision,
        )

    def prepared(self, entry: Entry) -> Prepared:
        """The preprocessed case."""
        plan = next(iter(self.jobs.values())).plan
        return prepare_case(entry.case, entry.dataset, plan, self.cache / entry.member)

    def _job(self, name: str, data: Path) -> Job:
        _, job, _ = prepare(self.settings(name, data), self.request, lambda: False)
        return job

    def _refuse_victims(self, own: Iterable[Entry]) -> None:
        theirs = {
            self._digest(e): f"{site}/{e.case.name}"
            for site, job in self.jobs.items()
            for e in (*job.entries["training"], *job.entries["validation"])
        }
        both = [(e.case.name, theirs[d]) for e in own if (d := self._digest(e)) in theirs]
        if both:
            raise DataError(
                f"{len(both)} cases of the attacker are victims' ({both[0][0]} is {both[0][1]}). An attack trained on the "
                "images that it is to find shows nothing. Give other cases with --auxiliary.",
                code="duplicate",
            )

    def _digest(self, entry: Entry) -> bytes:
        """Of the image as it is prepared: a copy under another name or in another file is the same."""
        return blake2b(np.ascontiguousarray(self.prepared(entry).image).tobytes(), digest_size=16).digest()


def subject_of(
    run: Path, model: str | None, *, auxiliary: str | None, work: Path, number: int | None = None
) -> Subject:
    """A model of a run, finished or as it was after a round of which the weights were kept.

    Args:
        auxiliary: whose cases the attacker has: a folder, or a site of the study, which then is no victim; omitted: the test set.

    Raises:
        StudyError: there is no such model, no cases for the attacker, or tensors stay at sites, which is not audited yet.
    """
    finished = open_finished(run, model)
    study = finished.study
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
    sites = {name: cast(Path, site.data) for name, site in study.sites.items()}
    own, names = _own(study, sites, auxiliary)
    weights = finished.weights()[0]
    done = study.protocol.rounds
    text, plan = finished.plans, finished.plan
    plans = Plans(text, finished.channels, finished.labels, plan.patch_size, plan.batch_size)
    if number is not None and number != done:
        weights, done = _after(run, finished.name, number, study, plans), number
    return Subject(run, finished.name, study, plans, weights, done, sites, own, names, work)


def kept_at(run: Path, model: str, number: int) -> Path:
    """Where the weights after a round lie that were kept for an audit."""
    return run / "leakage" / "rounds" / f"{model}.{number:06d}.safetensors"


def _after(run: Path, model: str, number: int, study: Study, plans: Plans) -> Tensors:
    """The weights after a round; those before the first are drawn anew, unless the study starts from others."""
    path = kept_at(run, model, number)
    if path.is_file():
        return read_tensors(path)[0]
    if number == 0 and study.start.weights is None:
        return initial_weights(study, plans)
    raise StudyError(
        f"The weights of {model} after round {number} were not kept: there is no {path}. Expected them from `concilium leakage "
        f"STUDY --round {number}`, which runs the study and keeps them. Run that, or leave the round out."
    )


def _own(study: Study, sites: dict[str, Path], auxiliary: str | None) -> tuple[Path, Names | None]:
    """The attacker's data; a site that attacks is taken from the victims."""
    names: Mapping[str, Names] = of_sites(study).get("names", {})
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
