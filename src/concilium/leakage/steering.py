"""A receiver of maps that departs from the protocol: it answers a site's maps by gradients of its own making, for many steps.

Sites run the code of a run, and so does whoever has the rest of the network; only the gradients that fronts get are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from concilium.attacks import Auxiliary, Known, Release, Transcript, releases
from concilium.engines import Engine, SiteInfo, Traffic
from concilium.errors import EngineError
from concilium.leakage.exchange import Sender, Way, makers, one_round, own_cases, ready, split_way, together, truth_of
from concilium.leakage.parties import known_fronts, truth_at
from concilium.leakage.scene import Amount, Scene
from concilium.leakage.subject import Subject
from concilium.messages import Failure, Finish, Front, Maps, Reply, Request
from concilium.networks import Stack
from concilium.study import is_vertical
from concilium.transport import encode

Answer = Callable[[Release], Stack]


def steered_scenes(subject: Subject, cut: tuple[str, ...] | None, amount: Amount) -> Iterator[Scene]:
    """All sites of split training, or each party but the one with the labels, steered from the subject's weights on."""
    if not is_vertical(subject.study):
        yield _split(subject, split_way(subject, cut, amount.steering), amount)
        return
    way = Way("vertical", {**subject.study.protocol.options, "exchange_seconds": None, "drop": 0.0}, amount.steering)
    fronts, whole = known_fronts(subject, anew=subject.hidden), together(own_cases(subject, amount.own))
    for site, channels in subject.places.items():
        if site in fronts and site != subject.labels_at:
            last = _last(subject, way, [site], amount)
            truth, _ = truth_at(subject, site, last)
            made = makers(fronts[site], truth.images[:1])
            known = Known(fronts[site], tuple(range(len(made))), steer=_Steer(subject, way, last))
            yield Scene(
                subject.number,
                " ".join(way.cut),
                (),
                known,
                Auxiliary(replace(whole, images=whole.images[:, list(channels)])),
                truth,
                site=site,
                channels=tuple(subject.plans.channels[i] for i in channels),
            )


def _split(subject: Subject, way: Way, amount: Amount) -> Scene:
    last = _last(subject, way, [*subject.sites], amount)
    truth, _ = truth_of(subject, last)
    front, places, _ = Sender(subject, way).known_front()
    own = Auxiliary(together(own_cases(subject, amount.own)))
    return Scene(
        subject.number, " ".join(way.cut), (), Known(front, places, steer=_Steer(subject, way, last)), own, truth
    )


def _last(subject: Subject, way: Way, sites: Sequence[str], amount: Amount) -> Transcript:
    """Site and number of the releases that are guessed, without what is in them: those of the last steps."""
    steps = max(1, -(-amount.victims // (subject.plans.batch_size * len(sites))))
    return tuple(
        Release(site, subject.number + 1, step)
        for step in range(max(0, way.steps - steps), way.steps)
        for site in sites
    )


@dataclass(frozen=True)
class _Steer:
    """What an attack calls to have sites take steps (`Known.steer`)."""

    subject: Subject
    way: Way
    last: Transcript
    """What is guessed: sites and numbers."""

    def __call__(self, answer: Answer) -> Transcript:
        """Have the sites take all steps with these answers; what they sent in the last.

        Raises:
            EngineError: a site failed, or sent nothing in one of the last steps.
        """
        sites = {r.site for r in self.last}
        with ready(self.subject, f"{self.subject.number:06d}-steered", ()) as (engine, cases, _):
            steered = Steering(engine, answer, frozenset(sites), frozenset((r.site, r.step) for r in self.last))
            one_round(self.subject, self.way, steered, cases, self.subject.number)
        if missing := [r for r in self.last if (r.site, r.step) not in steered.kept]:
            raise EngineError(
                f"{missing[0].site} sent nothing in step {missing[0].step} of {self.way.steps}. Expected maps in every step "
                "that is guessed: a batch without annotation sends none. Choose another number of steps with --steering."
            )
        return tuple(steered.kept[r.site, r.step] for r in self.last)


class Steering:
    """An engine around another, which puts an attacker's gradients in the place of those that these sites were to get."""

    def __init__(
        self, engine: Engine, answer: Answer, steered: frozenset[str], keep: frozenset[tuple[str, int]]
    ) -> None:
        self.sites: Mapping[str, SiteInfo] = engine.sites
        self.traffic: Mapping[str, Traffic] = engine.traffic
        self.kept: dict[tuple[str, int], Release] = {}
        """What came, by site and step, of those that are to be kept."""
        self._engine, self._answer, self._steered, self._keep = engine, answer, steered, keep
        self._due: dict[str, tuple[Tensor, ...]] = {}
        self._asked: dict[str, Front] = {}

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        """Send the requests, with other gradients for the maps that came."""
        self._engine.send({site: self._bent(site, r) for site, r in requests.items()}, deadline_s=deadline_s)

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        """The replies as they arrive; the attacker looks at maps first."""
        for site, reply in self._engine.replies():
            if isinstance(reply, Maps) and reply.maps and site in self._steered:
                front = self._asked[site]
                (release,) = releases([(site, front), (site, reply)])
                self._due[site] = encode(self._answer(release), front.transport)
                if (site, front.step) in self._keep:
                    self.kept[site, front.step] = release
            yield site, reply

    def cancel(self, sites: Iterable[str]) -> None:
        """As the engine within."""
        self._engine.cancel(sites)

    def close(self) -> None:
        """As the engine within."""
        self._engine.close()

    def _bent(self, site: str, request: Request) -> Request:
        if isinstance(request, Front):
            self._asked[site] = request
        if isinstance(request, Front | Finish) and request.gradients and site in self._due:
            return replace(request, gradients=self._due.pop(site))
        return request
