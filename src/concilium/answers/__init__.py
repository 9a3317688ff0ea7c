"""What a site does for one family of requests; `site.py` dispatches to them.

A site's cases come in members: a real site has one, itself. The pool of a simulation has every site as a member, with the same
folds as there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from concilium.data.dataset import Case, Dataset
from concilium.data.draws import Secret, drawn_from
from concilium.data.labels import Labels
from concilium.data.matching import Names
from concilium.data.patches import Batches
from concilium.data.plan import Plan
from concilium.freezing import digest_of
from concilium.messages import Guard, PlugIn, Tensors, Training
from concilium.networks import Stages
from concilium.networks._fusion import without_fronts
from concilium.sealing import Identity

NO_GUARD = Guard()
AUTO: Literal["auto"] = "auto"
"""Says that the memory at hand tells how many patches are computed at a time."""
AtOnce: TypeAlias = int | Literal["auto"]


class Cancelled(Exception):
    """The request was cancelled, or its deadline has passed."""


@dataclass(frozen=True)
class Policy:
    """What a site allows; whoever runs it decides. The defaults are those of a simulation, which is one owner's."""

    plug_ins: tuple[str, ...] | None = None
    """Code from outside Concilium, as `module:function`, that a server may name; `None`: any that is installed."""
    split: bool = True
    """Whether activations, functions of each voxel, may leave (split training)."""
    labels: bool = True
    """Whether in split training heads may act on maps that the server made, whose gradients tell it the labels; and whether the
    places of patches may be told that follow the labels (`vertical`)."""
    open_weights: bool = True
    """Whether weights may leave as they are; otherwise only sealed for another site (`cyclic`), or masked (`secure_sum`)."""
    least_summed: int = 2
    """Masked updates leave only where so many sites' or more are added up before anything can be unmasked."""
    reveal: bool = True
    """Whether a server may have a finished model that is passed on sealed, where a study with `reveal` asks for it."""
    case_scores: bool = True
    """Whether the scores of single cases may leave, under numbers; otherwise averages over `MIN_CASES` patients or more."""
    shown: bool = True
    """Whether other sites may be sent this site's update as it is, to judge it (`[collect] judged`)."""
    new_patients: bool = True
    """Whether maps of new patients (`imagesTs`) may leave, to be segmented together with the other parties (`vertical`)."""
    kept: bool = True
    """Whether tensors that a study keeps at its sites may leave once, at a model's end, to make one for sites elsewhere."""


@dataclass(frozen=True)
class Settings:
    """What a site is told by whoever runs it, never by the server."""

    name: str
    role: str
    data: Mapping[str, Path]
    """Member -> nnU-Net raw folder."""
    test: Path | None
    """The held-out set, where the site has a copy."""
    folder: Path
    """Private to the site: its log, case list, snapshots and finished models."""
    cache: Path
    """Preprocessed cases, one folder per member."""
    threads: int
    device: str
    policy: Policy = Policy()
    names: Mapping[str, Names] = field(default_factory=dict)
    """Member (or `test`) -> what it calls otherwise than the study."""
    pictures: bool = True
    """Whether a picture of each scored case is kept in `folder`."""
    identity: Identity | None = None
    """By which other sites know this one; none in a simulation."""
    sealing_key: Path | None = None
    """Where it lies; omitted: in `folder`."""
    micro_batch: AtOnce | None = None
    """How many patches fit into this site's memory at once while it trains; `None`: a batch of any study; `auto`: see for it."""
    weights: tuple[Path, ...] = ()
    """Files of weights that a study may start from, as far as it freezes tensors of them: those never travel."""
    secret: Path | None = None
    """File of what noise, and fronts that stay, are drawn from that the server must not know, made where there is none; `None`:
    from the study's seed alone, as in a simulation."""


@dataclass(frozen=True)
class Entry:
    """One case of a member, with the numbers by which it is known outside the site."""

    member: str
    dataset: Dataset
    case: Case
    number: int
    patient: int

    @property
    def key(self) -> str:
        """Unique among the site's cases."""
        return f"{self.member}/{self.case.name}"


@dataclass(frozen=True)
class Job:
    """A site ready to train: its cases preprocessed by the plan, and divided."""

    plan: Plan
    labels: Labels
    n_channels: int
    network: Callable[..., Stages]
    """Builds the network with new weights; `deep_supervision` may be given, in place of the study's."""
    training: Training
    seed: int
    entries: Mapping[str, tuple[Entry, ...]]
    """Cases by subset: `training` and `validation`."""
    batches: Batches | None
    """`None` where there is nothing to train on."""
    channels: tuple[str, ...] = ()
    """Their names, in the study's order."""
    kept: frozenset[str] = frozenset()
    """Tensors of the network that stay here."""
    unknown: tuple[str, ...] = ()
    """Labels that nobody looked for here."""
    micro_batch: int | None = None
    """How many patches the site's network sees at once; `None`: all of a batch."""
    labelled: bool = True
    """Whether its label maps are trained on: not at a party that holds other channels only."""
    guard: Guard = NO_GUARD
    """What `network` has of defences, and where."""
    undefended: Callable[..., Stages] | None = None
    """Builds the network without them, for models that train in one place; `None`: `network` has none."""
    filters: tuple[PlugIn, ...] = ()
    """What is done to an update before it leaves."""
    site: str = ""
    """Its name."""
    secret: str = ""
    """The site's own, from which it draws what the server must not know; empty in a simulation, where one owner has all."""
    frozen: Tensors = field(default_factory=dict)
    """The tensors that do not train, which `network` has as they are; a party's are those of all parties."""
    has_all: bool = True
    """Whether finished models here are whole networks; a party has its own part."""
    by_memory: bool = False
    """Whether `micro_batch` was chosen by the memory at hand: split training, which needs whole batches, then has them."""
    told: str = ""
    """A digest of all that it was asked to prepare: what is drawn to hide something is drawn anew under other settings."""

    @cached_property
    def keeps_front(self) -> bool:
        """Whether it is a party's, whose whole front stays here."""
        if self.has_all or not self.kept:
            return False
        names = built(self).state_dict()
        return names.keys() - without_fronts(names).keys() <= self.kept

    @property
    def of_fronts(self) -> tuple[Secret, ...]:
        """The secret that a front is drawn from which stays here: the server draws from the study's seed as well."""
        return (Secret(self.secret),) if self.secret and self.keeps_front else ()

    @property
    def sends_no_weights(self) -> bool:
        """Whether no weight leaves: of a party without the labels, whose whole front stays here."""
        return self.keeps_front and not self.labelled

    @property
    def in_one_place(self) -> Callable[..., Stages]:
        """Builds the network of models of which no map leaves."""
        return self.undefended or self.network


def complete(job: Job | None, weights: Tensors) -> Tensors:
    """A finished model with what of it does not train, so that it can be used elsewhere too; of a party its part as it is."""
    return {**job.frozen, **weights} if job is not None and job.has_all else weights


@dataclass(frozen=True)
class Cut:
    """Where a network is split, and whether heads may act on maps that the server made."""

    after: tuple[str, ...]
    reveal_labels: bool
    party: str = ""
    """Whose part it is, of a network of several parties: then `after` is the stage after which the tail begins."""


def secret_of(settings: Settings) -> str:
    """What this site draws from that nobody else knows; made the first time. Nothing where the site is to have none."""
    path = settings.secret
    if path is None:
        return ""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.touch(mode=0o600)
        unfinished.write_text(secrets.token_hex(32), encoding="utf-8")
        unfinished.replace(path)
    return path.read_text(encoding="utf-8")


def noise_key(job: Job, model: str, weights: Tensors) -> tuple[str, ...]:
    """What a server would need to take noise off again, and what no other model, settings or weights (those at the start) share:
    of two releases under the same noise, the difference would have none. Nothing where the site has no secret."""
    return (Secret(job.secret), model, job.told, digest_of(weights)) if job.secret else ()


def built(job: Job) -> Stages:
    """The network, to be looked at: its weights are drawn from a generator of their own."""
    with drawn_from("look"):
        return job.network()


Check = Callable[[], bool]
"""Whether the request at hand was cancelled."""
