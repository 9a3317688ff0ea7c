"""Vertical training: what whoever gets a party's maps has of it, and what that party gets back; a scene for each party.

The attacker's own cases have the channels of all parties. They go through the protocol as the victims' do, at parties that run
the code of a site (`answers/vertical.py`), so that transport and everything that defends is as it is when a party sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from concilium import wire
from concilium.answers import Cut, Job
from concilium.answers.train import Learner
from concilium.answers.vertical import DRAWN, Party
from concilium.attacks import Auxiliary, Cases, Known, Transcript, releases
from concilium.data.draws import drawn_from
from concilium.data.patches import Batch
from concilium.engines import SiteInfo, Traffic
from concilium.errors import ContractError
from concilium.leakage.exchange import (
    Fixed,
    Way,
    batches_of,
    exchange,
    label_map,
    makers,
    one_round,
    own_cases,
    together,
)
from concilium.leakage.scene import Amount, Scene, gallery_of
from concilium.leakage.subject import ATTACKER, Subject
from concilium.messages import Failure, Finish, Front, Reply, Request, Tail
from concilium.networks import Stages
from concilium.networks._fusion import FRONTS, Fronts
from concilium.optimization import device_named
from concilium.planning import network_of

FRONT, TAIL = "front", "tail"
"""What gradients are of: of the maps that a front sent, or of those that a server which has the body sent to the tail."""
APART = 1_000_000
"""Added to the numbers of rounds in which attackers' cases are sent: dropout draws otherwise than in the victims'."""


@dataclass(frozen=True)
class _Sent:
    """What was sent of some patches, with what is behind it."""

    transcript: Transcript
    images: torch.Tensor
    """Of all channels (N, C, *spatial)."""
    labels: torch.Tensor

    def of(self, site: str, channels: Sequence[int], *, tail: bool = False) -> Cases:
        """What a party sent, with its channels; or what the tail returned."""
        sent = tuple(r for r in self.transcript if r.site == site and bool(r.maps) != tail)
        return Cases(self.images[:, list(channels)], self.labels, sent)


def party_scenes(subject: Subject, amount: Amount, *, gallery: bool) -> Iterator[Scene]:
    """For each party its maps, and the gradients that it got; and what the tail returns to the server, if that has the body."""
    steps = max(1, -(-amount.victims // subject.plans.batch_size))
    way = Way("vertical", {**subject.study.protocol.options, "exchange_seconds": None}, steps)
    begin = partial(Scene, subject.number, " ".join(way.cut))
    transcript = exchange(subject, way, f"{subject.number:06d}-parties")
    sender = PartySender(subject, way)
    drawn = own_cases(subject, amount.own)
    own = _sent(drawn, [sender.send(batch, i) for i, batch in enumerate(drawn)])
    fronts, galleries = known_fronts(subject), _Galleries(subject, sender, amount.gallery)
    for site, channels in subject.places.items():
        named = tuple(subject.plans.channels[i] for i in channels)
        if maps := tuple(replace(r, gradients=()) for r in transcript if r.site == site and r.maps):
            truth, cases = truth_at(subject, site, maps)
            candidates, behind = galleries.of(site, cases) if gallery else (None, ())
            made = makers(fronts[site], torch.zeros_like(truth.images[:1]))
            front = None if subject.hidden else fronts[site]
            known, mine = Known(front, tuple(range(len(made)))), Auxiliary(own.of(site, channels), candidates)
            yield begin(maps, known, mine, truth, tuple(made), behind, site=site, channels=named)
        back = {
            FRONT: tuple(replace(r, maps=()) for r in transcript if r.site == site and r.maps and r.gradients),
            TAIL: tuple(r for r in transcript if r.site == site and not r.maps),
        }
        for what, sent in back.items():
            if sent and (
                what == FRONT or way.options["body"] == "server"
            ):  # else the tail's are all the fronts', together
                truth, _ = truth_at(subject, site, sent)
                mine = Auxiliary(own.of(site, channels, tail=what == TAIL))
                yield begin(sent, Known(), mine, truth, site=site, channels=named, gradient=what)


def truth_at(subject: Subject, site: str, transcript: Transcript) -> tuple[Cases, list[str]]:
    """Image of every patch behind a party's transcript, in the party's channels, its label map, and its case's place."""
    images, labels = [], []
    cases: list[str] = []
    for r in transcript:
        key = (subject.study.study.seed, DRAWN, r.round, r.step)
        batch, names = batches_of(subject.jobs[site]).draw_named(*key)
        images.append(batch.image)
        labels.append(label_map(batches_of(subject.jobs[subject.labels_at]).draw(*key)))
        cases += names
    return Cases(torch.cat(images), torch.cat(labels), tuple(transcript)), cases


class PartySender:
    """All parties with given weights, on any batches of whole images: what each would send for them, and what it would get."""

    def __init__(self, subject: Subject, way: Way) -> None:
        self._subject = subject
        self._way = replace(way, options={**way.options, "drop": 0.0}, steps=1)
        self._engine = _Here(subject.jobs, device_named(subject.study.engine.device))

    def send(self, batch: Batch, number: int) -> Transcript:
        """The releases of one step on this batch of images with all channels."""
        parts = {
            site: Batch(batch.image[:, list(mine)], batch.labels) for site, mine in self._subject.places.items()
        }  # annotated in full: what was not looked for counts as background, as everywhere in an audit
        self._engine.begin(parts)
        cases = dict.fromkeys(parts, len(batch.image))
        one_round(self._subject, self._way, self._engine, cases, APART + number)
        return releases(self._engine.said)


def known_fronts(subject: Subject, *, anew: bool = False) -> Mapping[str, Stages]:
    """Each party's front, with its weights; or with others, which are drawn anew."""
    with drawn_from(subject.study.study.seed, ATTACKER):
        whole = network_of(subject.study, subject.plans)()
    if not anew:
        whole.load_state_dict(dict(subject.weights))
    stage = whole[FRONTS]
    if not isinstance(stage, Fronts):
        raise ContractError(f"The network begins with {whole.names[0]}. Expected fronts of parties. Report this.")
    return {name: stage.of(name) for name in stage.parties}


class _Here:
    """An engine of parties in this process, which train on batches that are given. Messages are packed as for a network."""

    def __init__(self, jobs: Mapping[str, Job], device: torch.device) -> None:
        self.sites: Mapping[str, SiteInfo] = {name: SiteInfo(name, "site") for name in jobs}
        self.traffic: Mapping[str, Traffic] = {name: Traffic() for name in jobs}
        self.said: list[tuple[str, object]] = []
        self._jobs, self._device = jobs, device
        self._learners: dict[str, Learner] = {}
        self._parties: dict[str, Party] = {}
        self._batches: Mapping[str, Batch] = {}
        self._replies: list[tuple[str, Reply | Failure]] = []

    def begin(self, batches: Mapping[str, Batch]) -> None:
        """Train on these from now on; what was said before is forgotten."""
        self._batches, self.said = batches, []

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        """Have the parties answer."""
        for site, request in requests.items():
            asked = wire.pack(request)
            told = wire.pack(self._answer(site, wire.unpack(asked)))
            self.said += [
                (site, wire.unpack(asked)),
                (site, wire.unpack(told)),
            ]  # copies: their receivers may change theirs
            self._replies.append((site, wire.unpack(told)))

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        """The replies, in the order of the requests."""
        replies, self._replies = self._replies, []
        return iter(replies)

    def cancel(self, sites: Iterable[str]) -> None:
        """Nothing: every answer is there."""

    def close(self) -> None:
        """Nothing."""

    def _answer(self, site: str, request: Request) -> Reply:
        match request:
            case Front():
                if request.step == 0:
                    self._parties[site] = self._party(site, request)
                return self._parties[site].front(request, lambda: False)
            case Tail():
                return self._parties[site].tail(request)
            case Finish():
                return self._parties[site].finish(request)
            case _:
                raise ContractError(f"{type(request).__name__} came. Expected a step of training. Report this.")

    def _party(self, site: str, request: Front) -> Party:
        if site not in self._learners:
            cut = Cut(request.cut, request.reveal_labels, site)
            self._learners[site] = Learner(self._jobs[site], self._device, cut)
        learner = self._learners[site]
        learner.job = replace(self._jobs[site], batches=Fixed(self._batches[site]))  # type: ignore[arg-type]
        return Party(learner, request, site=f"{ATTACKER}/{site}")


def _sent(drawn: Sequence[Batch], sent: Sequence[Transcript]) -> _Sent:
    whole = together(list(drawn))
    return _Sent(tuple(r for of in sent for r in of), whole.images, whole.labels)


class _Galleries:
    """What parties would send of a gallery (`scene.gallery_of`); made once for the parties that sent maps of the same cases."""

    def __init__(self, subject: Subject, sender: PartySender, most: int) -> None:
        self._subject, self._sender, self._most = subject, sender, most
        self._made: dict[tuple[str, ...], tuple[_Sent, tuple[int, ...]]] = {}

    def of(self, site: str, cases: Sequence[str]) -> tuple[Cases, tuple[int, ...]]:
        """The candidates as this party would send them, and the place of the patient of each of these cases among them."""
        subject, key = self._subject, tuple(cases)
        if key not in self._made:
            labels = subject.labels_at
            found = {f"{i:06d}": (labels, e) for i, e in enumerate(subject.jobs[labels].entries["training"])}
            chosen, places = gallery_of(found, cases, self._most)
            drawn = [subject.plain_patch(labels, e) for _, e in chosen]
            self._made[key] = _sent(drawn, [self._sender.send(b, APART + i) for i, b in enumerate(drawn)]), places
        sent, places = self._made[key]
        return sent.of(site, subject.places[site]), places
