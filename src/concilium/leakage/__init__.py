"""What leaks: attacks on what is really sent, run and scored by whoever owns the simulation, before anything is sent anywhere.

An audit takes a run, lets its protocol go on for a round from the weights it has (`exchange.py`), gives attacks what the server
then has and cases of their own (`scene.py`), and scores what they say against the truth, which is computed anew (`audit.py`). An
attack that finds little proves nothing: a better one may find more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from concilium import catalog
from concilium.errors import StudyError
from concilium.leakage.audit import Attack, Row, figures_of, holds, place
from concilium.leakage.parties import party_scenes
from concilium.leakage.pictures import shower
from concilium.leakage.predicting import predicting_scenes
from concilium.leakage.scene import Amount, Scene, every_cut, model_scene, split_scene
from concilium.leakage.steering import steered_scenes
from concilium.leakage.subject import Subject, subject_of
from concilium.leakage.updates import update_scenes
from concilium.leakage.written import depth_of, write_leakage
from concilium.study import is_vertical

ALL_CUTS = "all"
ANYTHING = "anything"
"""The one label of a party that has none, in its own audit (`Asked.untrained`)."""


@dataclass(frozen=True)
class Asked:
    """What an audit is to do."""

    model: str | None = None
    """As in results.json; omitted: the study's own."""
    attacks: tuple[str, ...] = ()
    """Omitted: all that apply."""
    options: Mapping[str, Mapping[str, Any]] | None = None
    """Of attacks, by name."""
    cuts: tuple[str, ...] = ()
    """Cuts with a name, `STAGE,STAGE`, or `all`; omitted: the study's own."""
    auxiliary: str | None = None
    """Whose cases the attacker has: a site, or a folder; omitted: the test set."""
    rounds: tuple[int, ...] = ()
    """Audit also the weights after these rounds, where they were kept."""
    amount: Amount = field(default_factory=Amount)
    predicting: bool = False
    """Attack the maps of a finished vertical model at work, in place of those of training."""
    untrained: bool = False
    """Attack only the maps that a vertical party sends in the first round: all that it can make without the others."""
    hidden: bool = False
    """Of these: the front will stay at the party, so that nobody who gets its maps has the weights."""


def leakage(
    run: Path, out: Path | None = None, *, asked: Asked = Asked(), watch: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Audit a run: what is written into leakage.json in `out` (the run's `leakage`), with pictures beside it.

    Raises:
        StudyError: no such run, model, attack, option or cut, or no cases for the attacker.
        DataError: the attacker has a victim's case.
        EngineError: a site failed.
    """
    folder = out or run / "leakage"
    work = folder / "work"
    attacks = _attacks(asked)
    rows: list[Row] = []
    notes: list[str] = []
    seen: set[str] = set()
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    try:
        for number in (0,) if asked.untrained else (*asked.rounds, None):
            subject = subject_of(run, asked.model, auxiliary=asked.auxiliary, work=work, number=number)
            subject = replace(subject, hidden=subject.hidden or asked.hidden)
            torch.set_num_threads(subject.study.engine.threads)
            attacks = _possible_alone(subject, attacks, notes) if asked.untrained else attacks
            own = [replace(a, seed=subject.study.study.seed) for a in attacks]
            first = number == next(iter(asked.rounds), None)
            for scene in _scenes(subject, own, asked, first=first, last=number is None, notes=notes, watch=watch):
                seen |= set(holds(scene))
                channels = subject.plans.channels
                rows += figures_of(scene, own, channels, show=shower(folder / "pictures"), watch=watch)
    finally:
        for left in ("sites", "spool"):
            shutil.rmtree(work / left, ignore_errors=True)
    notes += _of_hidden_fronts(subject, attacks)
    for attack in attacks:
        sees, _, _ = attack.about
        if sees not in seen and not any(note.startswith(f"{attack.name} ") for note in notes):
            notes.append(f"{attack.name} was not run: it reads {sees}, and here none were sent.")
    if not rows:
        raise StudyError(
            f"Nothing of {run} was attacked ({' '.join(notes)}). Expected an attack that applies. Choose another."
        )
    return write_leakage(folder, subject, attacks, rows, [*notes, *depth_of(rows)])


def _attacks(asked: Asked) -> list[Attack]:
    given, problems, found = dict(asked.options or {}), [], []
    for name in asked.attacks or [n for n in catalog.names("attacks") if not Attack(n, {}, 0).on_request]:
        options, wrong = catalog.fill("attacks", name, given.pop(name, {}), f"attack {name}:")
        problems += wrong
        found.append(Attack(name, options, 0))
    problems += [f"Options of {name} were given, which is not run. Run it, or leave them out." for name in given]
    if problems:
        raise StudyError("\n".join(problems))
    return found


def _possible_alone(subject: Subject, attacks: Sequence[Attack], notes: list[str]) -> list[Attack]:
    """The attacks that a party can run on its own maps; the others are noted with the reason."""
    labelled = subject.plans.labels.keys() != {"background", ANYTHING}
    why = {
        "gradients": "gradients come of a loss that needs the other parties' maps and the labels",
        "steering": "it takes a server that trains fronts, and many rounds",
        "model": "the finished model is of all parties",
        "updates": "no update leaves a party but its front",
        "maps": "there are no labels here to score it by",
    }
    fits = [a for a in attacks if a.about[0] == "maps" and (labelled or a.about[1] != "labels")]
    notes += [f"{a.name} was not run: {why[a.about[0]]}." for a in attacks if a not in fits]
    notes.append(
        "Attacked were the maps of the first round, of an untrained front and a plan of these cases alone. Later fronts let go "
        "of other things: audit the study in a simulation, on public patients with all channels."
    )
    return fits


def _scenes(
    subject: Subject,
    attacks: Sequence[Attack],
    asked: Asked,
    *,
    first: bool,
    last: bool,
    notes: list[str],
    watch: Callable[[str], None],
) -> Iterator[Scene]:
    """What there is to attack."""
    kinds = {attack.about[:2] for attack in attacks}
    sees = {saw for saw, _ in kinds}
    splits, parted = subject.study.protocol.name == "splitfed", is_vertical(subject.study)
    if parted and asked.cuts:
        raise StudyError(
            f"--cut {asked.cuts[0]} was asked for. Of protocol 'vertical' each cut makes another network: allowed is the model's "
            "own. Train a variant with protocol = { cut = ... }, and audit it with --model."
        )
    if asked.predicting:
        yield from _predicting(subject, asked, parted, notes, watch)
        return
    if parted and sees & {"maps", "gradients"}:
        watch(f"Exchange after round {subject.number}, parties")
        found = party_scenes(subject, asked.amount, gallery=("maps", "patients") in kinds)
        yield from (scene for scene in found if scene.maps or not asked.untrained)
    elif (splits or asked.cuts) and sees & {"maps", "gradients"}:
        for cut in _cuts(subject, asked):
            watch(f"Exchange after round {subject.number}, cut {' '.join(cut) if cut else 'of the study'}")
            yield split_scene(
                subject, cut, asked.amount, gradients="gradients" in sees, gallery=("maps", "patients") in kinds
            )
    if first and "steering" in sees:
        yield from _steered(subject, asked, parted, splits, watch)
    if subject.study.protocol.name == "federated" and "updates" in sees and not asked.cuts:
        watch(f"Exchange after round {subject.number}, updates")
        yield from _of_updates(subject, attacks, asked, notes)
    if last and "model" in sees and not subject.hidden:
        try:
            yield model_scene(subject, asked.amount)
        except StudyError as e:
            notes += [f"{a.name} was not run. {e}" for a in attacks if a.about[0] == "model"]


def _of_hidden_fronts(subject: Subject, attacks: Sequence[Attack]) -> Iterator[str]:
    """What an audit says where fronts stay at their sites."""
    if not subject.hidden:
        return
    for attack in attacks:
        if attack.needs_front:
            yield f"{attack.name} was not run: it needs the weights of a front, which stay at its site. Who gets maps has none."
        elif attack.about[0] == "model":
            yield f"{attack.name} was not run: nobody has the finished model as a whole. Its fronts stay at their sites."
    yield (
        "Fronts stay at their sites. What the attacker's own cases send was made by the true fronts all the same: an attacker "
        "has such pairs of patients whose images it knows from elsewhere, or by the help of a party. So what was found is an "
        "upper bound for one that has none (but for inversion_blind, which uses none). A front that nobody else knows is no "
        "defence against one that has them."
    )


def _of_updates(subject: Subject, attacks: Sequence[Attack], asked: Asked, notes: list[str]) -> Iterator[Scene]:
    guessed = {guesses for saw, guesses, _ in (a.about for a in attacks) if saw == "updates"}
    yield from update_scenes(subject, asked.amount, images="images" in guessed, members=False)
    try:
        yield from update_scenes(subject, asked.amount, images=False, members="members" in guessed)
    except StudyError as e:
        notes += [f"{a.name} was not run. {e}" for a in attacks if a.about[:2] == ("updates", "members")]


def _steered(
    subject: Subject, asked: Asked, parted: bool, splits: bool, watch: Callable[[str], None]
) -> Iterator[Scene]:
    if parted or splits or asked.cuts:
        for cut in [None] if parted else _cuts(subject, asked):
            watch(f"Steering from round {subject.number} on, for {asked.amount.steering} steps")
            yield from steered_scenes(subject, cut, asked.amount)


def _predicting(
    subject: Subject, asked: Asked, parted: bool, notes: list[str], watch: Callable[[str], None]
) -> Iterator[Scene]:
    if not parted:
        raise StudyError(
            f"--predicting was asked for. Protocol {subject.study.protocol.name!r} sends nothing of a case that it segments: "
            "a site has the whole model. Allowed: 'vertical'. Leave --predicting out."
        )
    if subject.number != subject.study.protocol.rounds:
        return  # no model is finished after an earlier round
    watch("Segmenting the validation cases")
    yield from predicting_scenes(subject, asked.amount)
    notes.append(
        "Attacked were maps of prediction, not of training. Attacks that ask for a gallery of patients are left out."
    )


def _cuts(subject: Subject, asked: Asked) -> list[tuple[str, ...] | None]:
    found: list[tuple[str, ...] | None] = []
    for cut in asked.cuts:
        found += every_cut(subject) if cut == ALL_CUTS else [tuple(cut.split(","))]
    return found or [None]


__all__ = ["Amount", "Asked", "leakage", "place"]
