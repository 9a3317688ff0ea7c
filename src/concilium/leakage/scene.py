"""What one attack is given, and the truth that its guess is scored against: of split training, updates, or a finished model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from concilium.answers import Entry
from concilium.answers.objective import make_objective
from concilium.attacks import Auxiliary, Cases, Known, Release, Transcript
from concilium.data.draws import digest, drawn_from
from concilium.data.patches import Batch
from concilium.errors import StudyError
from concilium.leakage.exchange import Sender, exchange, own_cases, split_way, together, truth_of
from concilium.leakage.subject import Subject
from concilium.networks import Stages, cut_apart
from concilium.planning import network_of
from concilium.study import is_vertical


@dataclass(frozen=True)
class Scene:
    """One transcript with all that is around it."""

    round: int
    cut: str
    """Of split training; empty: the network is not split."""
    transcript: Transcript
    known: Known
    auxiliary: Auxiliary
    truth: Cases
    maps: tuple[str, ...] = ()
    """Name of each map that is sent: the stage that made it."""
    patients: tuple[int, ...] = ()
    """For each patch of the transcript its place in the gallery."""
    members: Tensor | None = None
    """bool, for each candidate whether it was trained on."""
    site: str = ""
    """Whose messages they are, where sites hold different channels; empty: those of all."""
    channels: tuple[str, ...] = ()
    """Of the images; empty: all of the study."""
    gradient: str = ""
    """Of vertical training: what the gradients are of."""
    predicting: bool = False
    """Whether it is what a finished model lets go at work, and not in training."""

    @property
    def trained_on(self) -> Tensor:
        """`members`, where there are any."""
        return torch.zeros(0, dtype=torch.bool) if self.members is None else self.members


@dataclass(frozen=True)
class Amount:
    """How much an audit looks at."""

    victims: int = 48
    """Patches that are attacked, over all sites; a few more, since batches are whole."""
    own: int = 256
    """Patches of the attacker."""
    gallery: int = 100
    """Candidates of re-identification and, of each kind, of membership inference."""
    steering: int = 400
    """Steps for which an attack that departs from the protocol says what gradients fronts get."""


def split_scene(
    subject: Subject, cut: tuple[str, ...] | None, amount: Amount, *, gradients: bool, gallery: bool
) -> Scene:
    """Split training at a cut: maps, and with `gradients` what comes back."""
    size = subject.plans.batch_size * len(subject.sites)
    way = split_way(subject, cut, steps=max(1, -(-amount.victims // size)))
    named = " ".join(way.cut)
    transcript = exchange(subject, way, f"{subject.number:06d}-{'-'.join(way.cut)}")
    truth, cases = truth_of(subject, transcript)
    sender = Sender(subject, way)
    drawn = own_cases(subject, amount.own)
    sent = tuple(sender.send(b, i + 1, gradients=gradients) for i, b in enumerate(drawn))
    candidates: Cases | None = None
    places: tuple[int, ...] = ()
    if gallery:
        candidates, places = _gallery(subject, sender, transcript, cases, amount.gallery)
    front, kept, names = sender.known_front()
    return Scene(
        subject.number,
        named,
        transcript,
        Known(front, kept),
        Auxiliary(together(drawn, sent), candidates),
        replace(truth, sent=transcript),
        names,
        places,
    )


def model_scene(subject: Subject, amount: Amount) -> Scene:
    """The finished model, and as many cases that it was trained on as cases of the same sites that it was not."""
    kinds: dict[str, list[tuple[str, Entry]]] = {"training": [], "validation": []}
    for site, job in subject.jobs.items():
        if is_vertical(subject.study) and site != subject.labels_at:
            continue  # all have the same cases
        for kind, found in kinds.items():
            found += [(site, e) for e in job.entries[kind]]
    n = min(amount.gallery, *(len(found) for found in kinds.values()))
    if n < 2:
        raise StudyError(
            f"{n} cases were kept out of training. Membership inference compares with at least 2. Leave membership out, or "
            "validate on more cases."
        )
    chosen = []
    for kind, found in kinds.items():
        random.Random(digest("members", kind)).shuffle(found)
        chosen += found[:n]
    asked = together([subject.plain_patch(site, e) for site, e in chosen])
    own = [*subject.attacker.entries["training"]]
    random.Random(digest("members", "own")).shuffle(own)
    mine = together([subject.plain_patch("", e) for e in own[: amount.own]])
    members = torch.arange(len(chosen)) < n
    known = Known(whole=whole_of(subject))
    return Scene(subject.number, "", (), known, Auxiliary(mine, asked), asked, members=members)


def every_cut(subject: Subject) -> list[tuple[str, str]]:
    """For each stage on the way down after which the network may be cut: the cut there that sends least, and sends it latest."""
    with drawn_from("look"):
        network = network_of(subject.study, subject.plans)(deep_supervision=False)
    image = torch.zeros(1, len(subject.plans.channels), *subject.plans.patch_size)
    points, found, smallest = network.split_points, [], image[0, 0].numel()
    for i, first in enumerate(points):
        sizes = {}
        for last in points[i + 1 :]:
            try:
                parts = cut_apart(network, (first, last))
            except StudyError:  # only heads come after it
                continue
            with torch.no_grad():
                sent = parts.front.run((image,))[-parts.body.reach() :]
            sizes[last] = sum(m.numel() for m in sent)
            top = sent[-1][0, :1].numel() if sent[-1].shape[1] else 0
        if not sizes or top > smallest:  # the way up
            break
        smallest = top
        found.append((first, min(reversed(sizes), key=lambda last: sizes[last])))
    return found


def whole_of(subject: Subject) -> Stages:
    """The network with the subject's weights."""
    with drawn_from("look"):
        whole = network_of(subject.study, subject.plans)()
    whole.load_state_dict(dict(subject.weights))
    return whole


def loss_of(subject: Subject) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    """The study's loss, of a label map at the finest scale; the coarser ones are every second voxel, and so on."""
    objective = make_objective(next(iter(subject.jobs.values())))

    def loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        maps = []
        for x in logits:
            steps = [a // b for a, b in zip(labels.shape[1:], x.shape[2:], strict=True)]
            maps.append(labels[(slice(None), *(slice(None, None, s) for s in steps))].unsqueeze(1).to(torch.int16))
        return objective(logits, Batch(logits[0], tuple(maps)))

    return loss


# ----------------------------------------------------------------------------------------------------------- internals


def _gallery(
    subject: Subject, sender: Sender, transcript: Transcript, cases: Sequence[str], most: int
) -> tuple[Cases, tuple[int, ...]]:
    """One patch for each patient behind the transcript and for others of the sites, and which of them each patch is of.

    It is of another image of the patient where there is one, and otherwise of the same, drawn anew.
    """
    found = {e.key: (site, e) for site, job in subject.jobs.items() for e in job.entries["training"]}
    chosen, places = gallery_of(found, cases, most)
    drawn = [subject.plain_patch(site, e) for site, e in chosen]
    return together(drawn, tuple(_single(sender, batch, i) for i, batch in enumerate(drawn))), places


def gallery_of(
    found: Mapping[str, tuple[str, Entry]], cases: Sequence[str], most: int
) -> tuple[list[tuple[str, Entry]], tuple[int, ...]]:
    """Whose patches make up a gallery, and which of them each of these cases is of the patient of.

    Args:
        found: every case of the sites that trains, by a key: its site, and the case.
        cases: the keys of those behind the transcript.
        most: candidates; more where more patients are behind it.
    """
    seen = set(cases)
    by_patient: dict[tuple[str, int], list[str]] = {}
    of_case: dict[str, tuple[str, int]] = {}
    for key, (site, e) in found.items():
        by_patient.setdefault((site, e.patient), []).append(key)
        of_case[key] = (site, e.patient)
    behind = sorted({of_case[c] for c in cases})
    others = sorted(by_patient.keys() - set(behind))
    random.Random(digest("gallery")).shuffle(others)
    listed = [*behind, *others[: max(0, most - len(behind))]]
    chosen = [next((k for k in by_patient[p] if k not in seen), by_patient[p][0]) for p in listed]
    return [found[key] for key in chosen], tuple(listed.index(of_case[c]) for c in cases)


def _single(sender: Sender, batch: Batch, i: int) -> Release:
    return sender.send(batch, 1_000_000 + i, gradients=False)
