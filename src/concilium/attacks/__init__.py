"""Attacks: what a receiver can find out from what was really sent. One file here: one attack.

    attack(transcript, network, auxiliary, *, seed, ...options) -> Guess

It is given messages as they arrived, what their receiver knows of the network, and cases of its own. It never sees the truth:
who owns the simulation scores the guess (`leakage/`). A file says with `SEES` which part of a transcript it reads (`maps`,
`gradients`, `updates`; `model`: none, but the finished weights; or `steering`: maps that it answers by gradients of its own), and
with `GUESSES` what comes out (`images`, `labels`, `members`, `patients`). `REVEALS` says in one line who could do this. With
`ON_REQUEST = True` it is run only where it is asked for by name, with `NEEDS_FRONT = True` only where the receiver knows the
front's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from concilium.errors import ContractError
from concilium.messages import Finish, Front, Gradients, Look, Looked, Maps, Tensors, Train, Trained
from concilium.networks import Stack, Stages
from concilium.transport import decode

AUDITED = ("federated", "splitfed", "vertical")
"""Protocols whose messages an audit knows."""
SEES = ("maps", "gradients", "updates", "model", "steering")
"""`steering`: maps, of which the attacker says what gradients their site gets (`Known.steer`)."""
GUESSES = ("images", "labels", "members", "patients")


@dataclass(frozen=True)
class Release:
    """What one site let go in one step (in one round, of an update), as its receiver has it. The batch comes first."""

    site: str
    round: int
    """Of a finished model at work: the case's place in its subset."""
    step: int
    """Of a finished model at work: the window of the case."""
    maps: tuple[Tensor, ...] = ()
    """Of the front (B, C, *spatial), the lowest first; float, or uint8."""
    gradients: tuple[Tensor, ...] = ()
    """Of the loss with respect to the float maps that the site was sent; of a party of vertical training, to those it sent."""
    update: Tensors = field(default_factory=dict)
    """Weights before the round less those after it; of several sites, which are called `sum`, their mean."""
    parts: tuple[tuple[int, float], ...] = ()
    """For each site behind an update how many patches it is of, and what share of the mean it is; known to the server."""


Transcript: TypeAlias = tuple[Release, ...]


@dataclass(frozen=True)
class Known:
    """What the receiver knows of the network."""

    front: Stages | None = None
    """The stages before the cut with their weights, where the receiver has them; what is fed in is as a site feeds it. Of a front
    that stays at its site whoever steers it knows the stages, which are here with weights of its own."""
    places: tuple[int, ...] = ()
    """Which of the maps that the front leaves the maps of the transcript are."""
    whole: Stages | None = None
    """The network with its weights at the start of the round, or finished."""
    loss: Callable[[Sequence[Tensor], Tensor], Tensor] | None = None
    """The study's loss of logits, finest first, and a label map (B, *spatial); the logits of deep supervision included."""
    steer: Callable[[Callable[[Release], Stack]], Transcript] | None = None
    """Has sites train, and asks for each of their releases what gradients of the float maps they get. What they sent at last."""
    finished: bool = False
    """Whether the front is at work in a finished model, and not in training."""

    @property
    def open_front(self) -> Stages:
        """The front.

        Raises:
            ContractError: it is not known.
        """
        if self.front is None:
            raise ContractError(
                "The weights of the front were asked for. They are not known here. Use an attack without them."
            )
        return self.front

    @property
    def open_steer(self) -> Callable[[Callable[[Release], Stack]], Transcript]:
        """What has sites train by the attacker's gradients.

        Raises:
            ContractError: nothing of it is here.
        """
        if self.steer is None:
            raise ContractError(
                "Sites were to be steered. Here none can be. Use an attack that keeps to the protocol, or a protocol that splits."
            )
        return self.steer

    @property
    def open_whole(self) -> Stages:
        """The whole network.

        Raises:
            ContractError: it is not known.
        """
        if self.whole is None:
            raise ContractError(
                "The whole network was asked for. It is not known here. Use an attack that does not need it."
            )
        return self.whole


@dataclass(frozen=True)
class Cases:
    """Patches whose image and label map the attacker has, and what the network, with all that defends it, lets go of each."""

    images: Tensor
    """float32 (N, C, *spatial)."""
    labels: Tensor
    """int64 (N, *spatial); 0 is background."""
    sent: Transcript = ()
    """In the same order."""


@dataclass(frozen=True)
class Auxiliary:
    """What an attacker brings along."""

    own: Cases
    """Cases of its own, none of which is a victim's."""
    candidates: Cases | None = None
    """Cases of which it asks: was this one trained on, or which of these is it."""
    labels: Tensor | None = None
    """Label maps of the victims, where the attacker is taken to know them (`gradient_inversion`)."""


@dataclass(frozen=True)
class Guess:
    """What an attack says, one entry per patch of the transcript (or per candidate, of members). One field is given."""

    images: Tensor | None = None
    """float32 (N, C, *spatial)."""
    labels: Tensor | None = None
    """Chance of foreground, float32 (N, *spatial)."""
    members: Tensor | None = None
    """float32 (candidates,): the larger, the more it was trained on."""
    patients: Tensor | None = None
    """float32 (N, candidates): the larger, the more alike."""

    def of(self, kind: str) -> Tensor:
        """What was guessed of this kind (one of `GUESSES`).

        Raises:
            ContractError: nothing.
        """
        found: Tensor | None = getattr(self, kind)
        if found is None:
            raise ContractError(
                f"An attack that said it guesses {kind} guessed none. Expected them. Correct the attack."
            )
        return found


def releases(said: Iterable[tuple[str, object]]) -> Transcript:
    """What the receiver has after these messages (site, message), in the order in which it was complete.

    A step in which nothing was annotated sends nothing, and is left out. In vertical training a party's release has its maps and
    the gradients that the party gets back for them; what the tail returns is a release of its own, without maps.
    """
    heard = _Heard()
    for site, message in said:
        heard.take(site, message)
    return heard.all()


class _Heard:
    """Releases that are being put together of messages."""

    def __init__(self) -> None:
        self._open: dict[str, Release] = {}
        self._fronts: dict[str, Front] = {}
        self._trains: dict[str, Train] = {}
        self._looks: dict[str, Look] = {}
        self._done: list[Release] = []

    def all(self) -> Transcript:
        """Also those that nothing came after."""
        for site in list(self._open):
            self._close(site)
        return tuple(self._done)

    def take(self, site: str, message: object) -> None:
        """The next message to or from a site."""
        match message:
            case Front() | Finish():
                self._close(site, message.gradients if self._is_party(site) else ())
                if isinstance(message, Front):
                    self._fronts[site] = message
            case Train():
                self._trains[site] = message
            case Look():
                self._looks[site] = message
            case Looked(maps) if site in self._looks:
                look = self._looks[site]
                self._done += [
                    Release(site, look.case, look.start + i, maps=_came(window, look)) for i, window in enumerate(maps)
                ]
            case Maps(maps) if maps:
                self._open[site] = self._released(site, maps=maps)
            case Gradients(gradients) if self._is_party(site):
                self._done.append(self._released(site, gradients=gradients))
            case Gradients(gradients) if site in self._open:
                self._open[site] = replace(self._open[site], gradients=_came(gradients, self._fronts[site]))
            case Trained(weights) if weights and site in self._trains:
                self._done.append(self._update(site, weights))

    def _is_party(self, site: str) -> bool:
        return site in self._fronts and self._fronts[site].party

    def _close(self, site: str, gradients: Sequence[Tensor] = ()) -> None:
        """No more comes of the step that is open but, at a party, these gradients."""
        if site in self._open:
            release = self._open.pop(site)
            self._done.append(
                replace(release, gradients=_came(gradients, self._fronts[site])) if gradients else release
            )

    def _released(self, site: str, *, maps: Sequence[Tensor] = (), gradients: Sequence[Tensor] = ()) -> Release:
        front = self._fronts[site]
        return Release(site, front.round, front.step, _came(maps, front), _came(gradients, front))

    def _update(self, site: str, weights: Tensors) -> Release:
        before = self._trains[site].weights
        moved = {n: before[n].double() - t.double() for n, t in weights.items() if n in before}
        return Release(site, self._trains[site].round, 0, update={n: t.float() for n, t in moved.items()})


def _came(tensors: Sequence[Tensor], asked: Front | Look) -> tuple[Tensor, ...]:
    """Maps or gradients as their receiver decodes them: half precision as float32, whole numbers as they are."""
    came = decode(tensors, asked.transport, dtype=torch.float32)
    return tuple(m.float() if m.is_floating_point() else m for m in came)


def stacked(transcript: Transcript, what: str = "maps") -> Stack:
    """Each map (or gradient) of all patches together, (N, C, *spatial)."""
    return tuple(torch.cat(of) for of in zip(*(getattr(r, what) for r in transcript), strict=True))


def only(transcript: Transcript, places: Sequence[int], what: str = "maps") -> Transcript:
    """The same with these maps (or gradients) alone."""
    chosen: list[dict[str, Any]] = [{what: tuple(getattr(r, what)[i] for i in places)} for r in transcript]
    return tuple(replace(r, **fields) for r, fields in zip(transcript, chosen, strict=True))


def about(name_to: Mapping[str, object]) -> tuple[str, str, str]:
    """What an attack's file says of itself: what it sees, what it guesses, who could do it.

    Raises:
        ContractError: it does not say it, or something else.
    """
    sees, guesses, reveals = (str(name_to.get(key, "")) for key in ("SEES", "GUESSES", "REVEALS"))
    if sees not in SEES or guesses not in GUESSES or not reveals:
        raise ContractError(
            f"An attack says SEES = {sees!r}, GUESSES = {guesses!r}. Allowed: {', '.join(SEES)}; {', '.join(GUESSES)}; and a "
            "line REVEALS. Say them in its file."
        )
    return sees, guesses, reveals
