"""What a study trains, in order: its variants, seeds, folds and left-out sites, and the models of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import cast

from concilium.local_updates import has_personal
from concilium.statistics import WITHOUT
from concilium.study import Study, fronts_stay, is_vertical, sites_of, undefended

PERSONAL = "-personal"
"""Ends the name of the networks that sites train of their own beside a model."""
ELSEWHERE = "-elsewhere"
"""Ends the name of the network made for sites that did not train, where each that did has tensors of its own."""
FINETUNED = "-finetuned"
"""Ends the name of what sites make of a finished model by training on for themselves."""
BEST = ".best"
"""Ends the name under which a site keeps the best weights so far of a model that stays."""
POOL = "all"
"""Stands in a curve where a site stands: all that train."""

MADE_BESIDE = (PERSONAL, ELSEWHERE, FINETUNED)


@dataclass(frozen=True)
class Setting:
    """What models are trained under at the same time: one variant, seed and fold."""

    name: str
    """Of the study's own protocol, or the variant's."""
    study: Study
    """With this seed and fold, and no other."""
    suffix: str
    """Ends the names of this setting's files, where there are several seeds or folds: `.s8.f0`."""
    is_base: bool
    is_member: bool
    """Whether there are others for other folds."""
    unseen: str | None = None
    """The site that takes no part in planning and training."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Who trains."""
        taking = sites_of(self.study)
        return tuple(name for name in taking if name != self.unseen)

    @property
    def title(self) -> str:
        """The name of its model in results.json."""
        return self.name + (f"{WITHOUT}{self.unseen}" if self.unseen else "")


@dataclass(frozen=True)
class Model:
    """One model to train: its protocol, and who takes how many steps a round."""

    name: str
    """In results.json."""
    key: str
    """Names its files: the name, then seed and fold."""
    setting: Setting
    protocol: str
    steps: Mapping[str, int]
    stays: bool = False
    """Whether it is a different one at each site, and as a whole known there only; one that `is_one` is the same at all."""
    partly: bool = False
    """Whether some of its tensors are shared nevertheless."""
    cases: Mapping[str, int] = field(default_factory=dict)
    """How many training cases each site has."""
    personal: Model | None = None
    """The networks that sites train of their own beside it."""
    beside: str = ""
    """Of such networks, and of one made for sites elsewhere: the key of the model that was trained."""
    group: tuple[str, ...] = ()
    """The keys of all that one training makes: sites may forget it when these are finished."""

    @property
    def study(self) -> Study:
        """What it is trained by: of the baselines no map leaves a site, so they have no defences."""
        study = self.setting.study
        return study if self.protocol == study.protocol.name else undefended(study)

    @property
    def is_finetuned(self) -> bool:
        """Whether sites make it of the finished model by training on for themselves."""
        return self.name.endswith(FINETUNED) and bool(self.beside)

    @property
    def apart(self) -> bool:
        """Whether nobody ever has it as a whole: each party keeps its front."""
        return self.protocol == self.setting.study.protocol.name and fronts_stay(self.setting.study)

    @property
    def is_one(self) -> bool:
        """Whether it is the same at every site although the server does not have it, or not before the end."""
        return is_one(self.protocol) and not self.beside

    @property
    def each_own(self) -> bool:
        """Whether each site has a different one, which no other site knows as a whole."""
        return self.stays and not self.is_one

    @property
    def fold(self) -> int:
        """The fold that it does not train on."""
        return cast(int, self.setting.study.validation.fold)

    @property
    def member(self) -> bool:
        """Whether it is one of several folds, which segment the test set together."""
        return self.setting.is_member

    @property
    def seed(self) -> int:
        """Of its initial weights and batches."""
        return self.setting.study.study.seed


def settings(study: Study) -> list[list[Setting]]:
    """Every setting; those that differ by fold only stand together, since they are the members of the same models."""
    several = isinstance(study.validation.fold, str)
    found = [
        Setting(name, _with(variant, seed, fold), _suffix(study, seed, fold), name == study.protocol.name, several)
        for name, variant in {study.protocol.name: study, **study.variants}.items()
        for seed in range(study.study.seed, study.study.seed + study.study.seeds)
        for fold in folds_of(study)
    ]
    if study.validation.leave_one_site_out:
        found += [replace(s, unseen=site, is_base=False) for s in found for site in study.sites]
    found.sort(key=lambda s: s.unseen or "")  # stable: the models that see every site come first
    return [list(members) for _, members in groupby(found, key=lambda s: (s.name, s.study.study.seed, s.unseen))]


def folds_of(study: Study) -> tuple[int, ...]:
    """The folds that the study trains on."""
    v = study.validation
    return tuple(range(v.folds)) if isinstance(v.fold, str) else (v.fold,)


def models(setting: Setting, cases: Mapping[str, int], batch_size: Callable[[str], int]) -> Iterator[Model]:
    """The setting's own model, what is made beside it, then the baselines: `centralized` with one site's steps,
    `centralized_long` with those of all.

    Args:
        cases: how many training cases each site has; sites that are not in it take no part.
        batch_size: of each site's plan.
    """
    p = setting.study.protocol

    def n_steps(name: str) -> int:
        return p.steps or max(1, -(-int(cases[name] * cast(float, p.epochs)) // batch_size(name)))

    steps = {name: n_steps(name) for name in setting.sites if name in cases}
    made: dict[str, Model] = {}
    for name, (protocol, stays) in names(setting).items():
        taken = steps
        if protocol == "centralized":
            taken = {"pooled": max(steps.values()) if name == "centralized" else sum(steps.values())}
        made[name] = Model(name, name + setting.suffix, setting, protocol, taken, stays, cases=cases)
    shared = made[setting.title]
    beside = [m for m in (made.get(setting.title + end) for end in MADE_BESIDE) if m is not None]
    group = (shared.key, *(m.key for m in beside))
    made |= {m.name: replace(m, beside=shared.key, group=group) for m in beside}
    own = made.get(setting.title + PERSONAL)
    made[shared.name] = replace(shared, personal=own, group=group, partly=is_partly_shared(setting.study))
    yield from (m if m.group else replace(m, group=(m.key,)) for m in made.values())


def title_of(name: str) -> str:
    """The setting's own model that is named, or beside which the named one was made: of `federated-personal.s8:north`,
    `federated`."""
    title = name.partition(":")[0].partition(".")[0]
    for end in MADE_BESIDE:
        title = title.removesuffix(end)
    return title


def is_partly_shared(study: Study) -> bool:
    """Whether the study's own models have tensors that are not shared, and so are others at every site."""
    return bool(study.sharing.keep) or study.plan.fingerprint == "site"


def names(setting: Setting) -> dict[str, tuple[str, bool]]:
    """Name -> protocol, and whether it stays at its site: the models of a setting."""
    p = setting.study.protocol
    study = setting.study
    hidden = is_one(p.name) and not p.options["reveal"]
    found = {setting.title: (p.name, p.name == "local" or hidden or is_partly_shared(study))}
    # without a site the models are trained for that site's sake, which has no network of its own
    if setting.unseen is None and has_personal(study.local_update.name):
        found[setting.title + PERSONAL] = (p.name, True)
    if is_partly_shared(study) and study.sharing.unseen != "none":
        found[setting.title + ELSEWHERE] = (p.name, False)
    if setting.unseen is None and study.personalize.steps:
        found[setting.title + FINETUNED] = (p.name, True)
    if setting.is_base:
        if "local" in p.compare:
            found.setdefault("local", ("local", True))
        if "centralized" in p.compare:
            found["centralized"] = ("centralized", False)
            if not is_vertical(study):  # where all sites have the same patients, a site's steps are those of all
                found["centralized_long"] = ("centralized", False)
    return found


def is_one(protocol: str) -> bool:
    """Whether sites pass one model on among themselves."""
    return protocol == "cyclic"


def _with(study: Study, seed: int, fold: int) -> Study:
    return replace(
        study,
        study=replace(study.study, seed=seed, seeds=1),
        validation=replace(study.validation, fold=fold),
        variants={},
    )


def _suffix(study: Study, seed: int, fold: int) -> str:
    """Nothing for the study's first seed and its only fold, so that most files are called after their models."""
    several = isinstance(study.validation.fold, str)
    return (f".s{seed}" if seed != study.study.seed else "") + (f".f{fold}" if several else "")


def ensemble_key(model: Model) -> str:
    """Names the files of the ensemble that this model is a member of."""
    return model.key.removesuffix(f".f{model.fold}") + ".all"
