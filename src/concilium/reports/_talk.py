"""Which messages a study makes its sites send, and how often: a table of every protocol, and what the study adds to it.

`tests/reports/test_dossier.py` runs every protocol and is red where a site is asked, or answers, what is not listed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from concilium import messages as m
from concilium.protocols._cohort import fewest
from concilium.schedule import ELSEWHERE, FINETUNED, PERSONAL, Setting, is_one, names, settings
from concilium.study import Study, fronts_stay, is_vertical

ONCE, SETTING, TRAINING = "once", "setting", "training"
ROUND, OTHERS, STEP, SCORING = "round", "others", "step", "scoring"
"""How often: in the study; for each way to train, seed and fold; in each training; in its rounds, for each other site in them, in
its steps, in its scorings."""

SERVER = "the server"
SEALED = "the server, which cannot open what is sealed; one other site, which can"


@dataclass(frozen=True)
class Exchange:
    """A request, and what a site answers to it unless it fails."""

    request: type
    reply: type
    often: str
    to: str = SERVER
    """Who can read the answer."""
    sure: bool = True
    """Whether it occurs in every run; otherwise in some cases only."""


_STUDY = (Exchange(m.Examine, m.Examined, ONCE), Exchange(m.Prepare, m.Prepared, SETTING))
_MODEL = (
    Exchange(m.Restore, m.Done, TRAINING),
    Exchange(m.Snapshot, m.Done, ROUND),
    Exchange(m.Keep, m.Done, SCORING, sure=False),
    Exchange(m.Evaluate, m.Evaluated, SCORING, sure=False),
    Exchange(m.Forget, m.Done, TRAINING),
)
_SPLIT = (
    Exchange(m.Front, m.Maps, STEP),
    Exchange(m.Tail, m.Gradients, STEP),
    Exchange(m.Finish, m.Trained, ROUND),
)
_POINTS = "the server; the other sites, blinded: a name cannot be read, only guessed"

TALK: Mapping[str, tuple[Exchange, ...]] = {
    "local": (Exchange(m.Train, m.Trained, ROUND),),
    "centralized": (Exchange(m.Train, m.Trained, ROUND),),
    "federated": (Exchange(m.Train, m.Trained, ROUND),),
    "splitfed": _SPLIT,
    "vertical": (
        Exchange(m.Offer, m.Offered, ONCE, _POINTS),
        Exchange(m.Blind, m.Blinded, ONCE, _POINTS),
        Exchange(m.Align, m.Aligned, ONCE),
        *_SPLIT,
        Exchange(m.Front, m.Done, STEP, sure=False),
        Exchange(m.Look, m.Looked, SCORING, sure=False),
        Exchange(m.Conclude, m.Evaluated, SCORING, sure=False),
        Exchange(m.Conclude, m.Done, SCORING, sure=False),
    ),
    "cyclic": (
        Exchange(m.Introduce, m.Introduced, ROUND),
        Exchange(m.Pass, m.Passed, ROUND, SEALED),
        Exchange(m.Introduce, m.Introduced, SCORING, sure=False),
        Exchange(m.Hand, m.Handed, SCORING, SEALED, sure=False),
        Exchange(m.Take, m.Done, SCORING, sure=False),
    ),
}
"""Protocol -> what it asks beside what every study does."""

COLLECTED: Mapping[str, tuple[Exchange, ...]] = {
    "plain": (),
    "judged": (Exchange(m.Judge, m.Judged, OTHERS, sure=False),),
    "secure_sum": (
        Exchange(m.Hold, m.Held, ROUND),
        Exchange(m.Deal, m.Dealt, ROUND, "the other sites, each what is sealed for it; the server carries it"),
        Exchange(m.Mask, m.Masked, ROUND, "the server, which can read the sum of all only"),
        Exchange(m.Agree, m.Agreed, ROUND, "the server and the other sites"),
        Exchange(m.Unmask, m.Unmasked, ROUND),
    ),
}
"""How updates are collected -> what is asked beside; `secure_sum` asks it in place of `Train`."""

_FOLLOWED = (Exchange(m.Where, m.Placed, ROUND, "the server and all parties"),)
"""Where patches follow the labels (`vertical`)."""
OF_LABELS = (m.Gradients, m.Placed)
"""What of several parties (`vertical`) one alone answers, which has the labels."""
_OWN_PLANS = (Exchange(m.Describe, m.Described, SETTING), Exchange(m.Share, m.Done, SETTING))
_MADE_BESIDE: Mapping[str, tuple[Exchange, ...]] = {
    PERSONAL: (),
    FINETUNED: (Exchange(m.Personalize, m.Trained, TRAINING),),
    ELSEWHERE: (Exchange(m.Fetch, m.Fetched, TRAINING), Exchange(m.Reestimate, m.Done, TRAINING, sure=False)),
}
_ANYTHING = tuple(Exchange(m.Train, reply, STEP, sure=False) for reply in m.REPLIES)
"""Of a protocol from outside, of which nothing is known: any reply that there is."""


@dataclass(frozen=True)
class Trained:
    """One model of a study, by its name in results.json."""

    name: str
    study: Study
    """What it is trained by: the study, or a variant of it."""
    protocol: str
    stays: bool
    """Whether the server does not have it as a whole."""
    beside: str = ""
    """How its name ends, where it is made beside another model."""
    times: int = 1
    """With how many seeds and folds."""
    one: bool = False
    """Whether it is the same at all sites although the server does not have it."""

    @property
    def collects(self) -> str:
        """How its updates are collected."""
        return self.study.collect.name if self.protocol == self.study.protocol.name else "plain"

    @property
    def apart(self) -> bool:
        """Whether nobody ever has it as a whole: each party keeps its front."""
        return self.protocol == self.study.protocol.name and fronts_stay(self.study)

    @property
    def sums_secretly(self) -> bool:
        """Whether the server gets the sum of masked updates in place of each update."""
        return self.protocol == "federated" and self.collects == "secure_sum"

    @property
    def splits(self) -> bool:
        """Whether values of single voxels leave while it is trained."""
        return self.protocol in ("splitfed", "vertical") and not self.beside


def trained_in(study: Study) -> tuple[Trained, ...]:
    """Every model that a study trains, each once, with how often."""
    found: dict[str, Trained] = {}
    for setting in (setting for members in settings(study) for setting in members):
        for name, (protocol, stays) in names(setting).items():
            times = found[name].times + 1 if name in found else 1
            beside = next((end for end in _MADE_BESIDE if name.endswith(end) and name != setting.title), "")
            one = is_one(protocol) and not beside
            found[name] = Trained(name, setting.study, protocol, stays, beside, times, one)
    return tuple(found.values())


def first_settings(study: Study) -> dict[str, Setting]:
    """The first seed and fold of each variant, by the name of its own model."""
    found: dict[str, Setting] = {}
    for members in settings(study):
        for setting in members:
            found.setdefault(setting.title, setting)
    return found


def exchanges(model: Trained) -> tuple[Exchange, ...]:
    """What is asked of a site for the sake of one model, and answered; what is asked once in a study included."""
    study = model.study
    if model.beside:
        own = _MADE_BESIDE[model.beside]
    elif model.sums_secretly:
        own = COLLECTED["secure_sum"]
    else:
        own = TALK.get(model.protocol, _ANYTHING) + COLLECTED.get(model.collects, _ANYTHING)
    if model.protocol == "centralized":  # in one place, from which nothing leaves
        own = TALK["centralized"]
    if model.protocol == "vertical" and study.protocol.options["patches"] == "labels":
        own = (*own, *_FOLLOWED)
    plans = _OWN_PLANS if study.plan.fingerprint == "site" else ()
    return (*_STUDY, *plans, *own, *_MODEL)


def replies_of(models: Iterable[Trained]) -> tuple[type, ...]:
    """The types of replies that the models' sites send, in the order of `messages.py`."""
    there = {x.reply for model in models for x in exchanges(model)}
    return tuple(reply for reply in m.REPLIES if reply in there)


def how_often(often: str, model: Trained) -> str:
    """How often a site answers so, in words."""
    p, v = model.study.protocol, model.study.validation
    each = f", in each of {model.times} trainings (seeds, folds)" if model.times > 1 else ""
    partly = " at most" if fewest(model.study.sites, p.options, 1) < len(model.study.sites) else ""
    steps = p.steps or 0
    match often:
        case "once":
            return "once" + (", in one exchange or a few" if is_vertical(model.study) else "")
        case "setting":
            return f"once{each}"
        case "training":
            return f"once or twice{each}"
        case "round":
            return f"once a round: {p.rounds:,} times{partly}{each}"
        case "others":
            n = p.rounds * (len(model.study.sites) - 1)
            return f"for each other site's update in a round: {n:,} times{partly}{each}"
        case "step" if p.steps is None:
            return f"in every step: {p.rounds:,} rounds of {p.epochs:g} passes over the site's cases{partly}{each}"
        case "step":
            return f"in every step: {p.rounds:,} rounds of {steps:,} steps, {p.rounds * steps:,} times{partly}{each}"
    between = (
        f", and after every {v.every} rounds" if (v.every or 0) > 1 else ", and after each round" if v.every else ""
    )
    return f"when the model is finished{between}{each}"


def n_messages(model: Trained, site: str, rounds: int, steps: int) -> int:
    """How many answers a site gives in so many rounds and steps of training, scoring not counted."""
    tail = model.protocol != "vertical" or site == model.study.protocol.options["labels"]
    asked = [x for x in exchanges(model) if x.sure and (tail or x.reply not in OF_LABELS)]
    judged = (len(model.study.sites) - 1) * any(x.often == OTHERS for x in exchanges(model))
    return rounds * (judged + sum(x.often == ROUND for x in asked)) + steps * sum(x.often == STEP for x in asked)
