"""One more round of a protocol from given weights, at the sites of a simulation, with what is said kept.

What is asked, and how a site answers, is the code of a run. The round has the number that would come next: so the maps of its
first step are, to the bit, those that a run sends which goes on from these weights (`tests/leakage`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from concilium import catalog, wire
from concilium.answers import Cut, Job
from concilium.answers.split import Session
from concilium.answers.train import Learner
from concilium.attacks import Cases, Release, Transcript, releases
from concilium.data.patches import Batch, Batches
from concilium.engines import Engine, ask
from concilium.engines._transcript import KEPT, Keeping, read_transcript
from concilium.errors import EngineError
from concilium.leakage.subject import ATTACKER, Subject
from concilium.line import rounds_of
from concilium.messages import Failure, Front, Prepared, Tail, describe
from concilium.networks import Parts, Stages
from concilium.optimization import device_named
from concilium.preparation import Work
from concilium.protocols import Round, start_with
from concilium.protocols._body import Body
from concilium.schedule import Model, Setting
from concilium.study import of_sites, training_of

MODEL = "leakage"
"""What the model is called in an audit's messages."""


@dataclass(frozen=True)
class Way:
    """How a round goes: the protocol with its options, and how many rounds of how many steps each from the same weights."""

    protocol: str
    options: Mapping[str, Any]
    steps: int
    rounds: int = 1

    @property
    def cut(self) -> tuple[str, ...]:
        """After which stages the network is cut, or the cut's name."""
        cut = self.options["cut"]
        return (cut,) if isinstance(cut, str) else tuple(cut)


def split_way(subject: Subject, cut: tuple[str, ...] | None, steps: int) -> Way:
    """Split training, as the study does it or as it would at this cut."""
    p = subject.study.protocol
    given = dict(p.options) if p.name == "splitfed" else {}
    if cut is not None:
        given["cut"] = cut[0] if len(cut) == 1 else cut
    options, _ = catalog.fill("protocols", "splitfed", given, "[protocol]")
    return Way("splitfed", options | {"cohorts": (), "participation": 1.0}, steps)


def exchange(subject: Subject, way: Way, where: str) -> Transcript:
    """What the server has after these rounds; the messages lie in the work folder's `transcripts/WHERE`.

    Raises:
        EngineError: a site failed.
    """
    with ready(subject, where) as (engine, cases, said):
        for i in range(way.rounds):
            one_round(subject, way, engine, cases, subject.number + i)
    return releases(said())


@contextmanager
def ready(
    subject: Subject, where: str, kept: tuple[type, ...] = KEPT
) -> Iterator[tuple[Engine, Mapping[str, int], Callable[[], Iterator[tuple[str, object]]]]]:
    """The sites of a simulation, ready to be asked, how many training cases each has, and what reads what was said of `kept`.

    Raises:
        EngineError: a site could not prepare.
    """
    study = subject.study
    folder = subject.work / "transcripts" / where
    for old in (folder, subject.work / "sites"):  # what a site knows of another exchange is none of this one's
        shutil.rmtree(old, ignore_errors=True)
    engine = catalog.load("engines", "simulation")(
        sites=subject.sites, test=None, folder=subject.work, run="leakage", workers=1, threads=study.engine.threads,
        device=study.engine.device, cache=subject.cache, pictures=False, weights=subject.files, **of_sites(study),
    )  # fmt: skip
    subject.align()
    try:
        cases: dict[str, int] = {}
        for site, reply in ask(engine, {name: subject.requests[name] for name in subject.sites}):
            if not isinstance(reply, Prepared):
                told = describe(reply) if isinstance(reply, Failure) else type(reply).__name__
                raise EngineError(
                    f"{site} could not prepare for the audit: {told}. Look into {subject.work / 'sites' / site}."
                )
            cases[site] = reply.n_training
        yield Keeping(engine, folder, kept=kept), cases, lambda: read_transcript(folder)
    finally:
        engine.close()


def one_round(subject: Subject, way: Way, engine: Engine, cases: Mapping[str, int], number: int) -> Round:
    """The protocol's round after round `number`, from the subject's weights; what the server has after it."""
    model = model_of(subject, way, cases, number)
    record: Any = SimpleNamespace(folder=subject.work)  # all that the protocol's loop asks of it
    trains = {n: t for n, t in subject.weights.items() if n not in subject.plans.frozen}
    begin = replace(start_with(trains), number=number)
    work = Work(model.setting.study, engine, record, subject.plans, lambda event: None)
    return [begin, *rounds_of(work, model, begin)][-1]


def model_of(subject: Subject, way: Way, cases: Mapping[str, int], number: int = 0) -> Model:
    """What is trained, or asked for, in an audit's messages; the round after round `number` is its last."""
    study = subject.study
    protocol = replace(
        study.protocol, name=way.protocol, rounds=number + 1, min_sites=len(subject.sites), round_seconds=None,
        time_box=False, options=way.options,
    )  # fmt: skip
    setting = Setting(way.protocol, replace(study, protocol=protocol), "", is_base=True, is_member=False)
    return Model(MODEL, MODEL, setting, way.protocol, dict.fromkeys(subject.sites, way.steps), cases=cases)


def truth_of(subject: Subject, transcript: Transcript) -> tuple[Cases, list[str]]:
    """Image and label map of every patch behind a transcript, and its case: what the owner of the simulation knows."""
    batches: list[Batch] = []
    names: list[str] = []
    for r in transcript:
        drawn, cases = batches_of(subject.jobs[r.site]).draw_named(subject.study.study.seed, r.site, r.round, r.step)
        batches.append(drawn)
        names += cases
    return together(batches, transcript), names


def together(batches: list[Batch], sent: Transcript = ()) -> Cases:
    """Patches as one, with their label maps."""
    return Cases(torch.cat([b.image for b in batches]), torch.cat([label_map(b) for b in batches]), sent)


def label_map(batch: Batch) -> Tensor:
    """int64 (B, *spatial); of regions, 1 where any is. What is to be ignored counts as background."""
    finest = batch.labels[0]
    return finest.any(1).long() if finest.dtype == torch.bool else finest[:, 0].long().clamp_min(0)


class Sender:
    """The site's part of the network with given weights, on any batches: what a site would send for the attacker's own cases.

    It is the site's own code (`answers/split.py`) that answers, so that every defence is as it is when a site sends.
    """

    def __init__(self, subject: Subject, way: Way) -> None:
        study = subject.study
        self._job = subject.attacker
        self._device = device_named(study.engine.device)
        self._cut, self._reveal = way.cut, bool(way.options["reveal_labels"])
        self._transport = way.options["transport"]
        self._learner = Learner(self._job, self._device, Cut(self._cut, self._reveal))
        self._weights = {n: subject.weights[n] for n in self._learner.network.state_dict()}
        self.parts = cast(Parts, self._learner.parts)  # there is a cut
        self._body = Body(self.parts, training_of(study), self._device, self._transport)
        self._body.load({n: subject.weights[n] for n in self.parts.body.state_dict()}, {}, "{}")

    def send(self, batch: Batch, number: int, *, gradients: bool) -> Release:
        """Maps, and with `gradients` those that come back from the tail, of one batch."""
        self._learner.job = replace(self._job, batches=Fixed(batch))  # type: ignore[arg-type]
        first = Front(
            "leakage", number, self._cut, self._reveal, 0, 1, 0, 1, self._weights, (), transport=self._transport
        )
        session = Session(self._learner, first, site=ATTACKER)
        said: list[tuple[str, object]] = [(ATTACKER, first), (ATTACKER, maps := session.front(first, lambda: False))]
        if gradients:
            back, order = self._body.forward(maps.maps, (ATTACKER, number))
            said.append((ATTACKER, session.tail(Tail("leakage", number, 0, back, order))))
            self._body.give_up()
        (release,) = releases((site, wire.unpack(wire.pack(message))) for site, message in said)  # as it travels
        return release

    def known_front(self) -> tuple[Stages, tuple[int, ...], tuple[str, ...]]:
        """The front with its weights, which of the maps it leaves are sent, and the stage that made each."""
        self._learner.load_weights(self._weights)
        made = makers(self.parts.front, torch.zeros_like(self._job_image()))
        places = tuple(range(len(made) - self.parts.body.reach(), len(made)))
        return self.parts.front, places, tuple(made[i] for i in places)

    def _job_image(self) -> Tensor:
        return batches_of(self._job).draw("look").image.to(self._device)


def makers(front: Stages, image: Tensor) -> list[str]:
    """For each map that the front leaves of an image (B, C, *spatial), the stage that made it."""
    made: list[tuple[Tensor, str]] = [(image, "image")]
    stack: tuple[Tensor, ...] = (image,)
    with torch.no_grad():
        for name in front.names:
            below = {id(m): by for m, by in made}
            stack = Stages({name: front[name]}).run(stack)
            made = [(m, below.get(id(m), name)) for m in stack]
    return [by for _, by in made]


@dataclass(frozen=True)
class Fixed:
    """One batch, whatever the key."""

    batch: Batch

    def draw(self, *key: str | int) -> Batch:
        return self.batch


def batches_of(job: Job) -> Batches:
    """Where a site's batches come from.

    Raises:
        EngineError: it has none.
    """
    if job.batches is None:
        raise EngineError("A site has no training cases in this fold. Expected at least one. Choose other folds.")
    return job.batches


def own_cases(subject: Subject, n: int) -> list[Batch]:
    """Batches of the attacker's own cases, `n` patches or a few more, drawn as a site draws its own."""
    batches = batches_of(subject.attacker)
    size = subject.attacker.plan.batch_size
    return [batches.draw("attacker", i) for i in range(-(-n // size))]


Watch = Callable[[str], None]
