"""Vertical prediction: what whoever gets a party's maps has of the cases that a finished model segments; a scene for each party.

The validation cases are segmented as a run does it (`serving.py`). Of other protocols nothing of a case leaves in prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from concilium.answers.service import Windows
from concilium.attacks import Auxiliary, Cases, Known, Release, Transcript, releases
from concilium.data.draws import drawn_from
from concilium.data.labels import n_heads
from concilium.data.windows import Some, predict_logits
from concilium.engines import ask
from concilium.errors import EngineError
from concilium.leakage.exchange import MODEL, Way, makers, model_of, own_cases, ready, together
from concilium.leakage.parties import known_fronts
from concilium.leakage.scene import Amount, Scene
from concilium.leakage.subject import ATTACKER, Subject
from concilium.messages import Done, Evaluate, Evaluated, Failure, Keep, Look, Looked, describe
from concilium.networks import Stack, Stages
from concilium.optimization import autocast, device_named
from concilium.serving import own_weights, serve
from concilium.transport import decode, encode

SUBSET = "validation"
"""Whose cases are segmented."""


def predicting_scenes(subject: Subject, amount: Amount) -> Iterator[Scene]:
    """For each party the maps that it sends where the finished model is at work."""
    way = Way("vertical", subject.study.protocol.options, 1)
    transcript = _segment(subject, way)
    fronts = known_fronts(subject)
    drawn = own_cases(subject, amount.own)
    whole = together(drawn)
    for site, channels in subject.places.items():
        sent = tuple(r for r in transcript if r.site == site)[: amount.victims]
        if not sent or site not in fronts:
            continue
        front = fronts[site].eval()
        mine = tuple(look(subject, front, b.image[:, list(channels)], i) for i, b in enumerate(drawn))
        truth = truth_behind(subject, site, sent)
        made = makers(front, torch.zeros_like(truth.images[:1]))
        yield Scene(
            subject.number,
            " ".join(way.cut),
            sent,
            Known(None if subject.hidden else front, tuple(range(len(made))), finished=True),
            Auxiliary(Cases(whole.images[:, list(channels)], whole.labels, mine)),
            truth,
            tuple(made),
            site=site,
            channels=tuple(subject.plans.channels[i] for i in channels),
            predicting=True,
        )


def look(subject: Subject, front: Stages, image: Tensor, number: int) -> Release:
    """What a party sends of a batch of windows, as it does in prediction (`answers/service.py`)."""
    study = subject.study
    transport, device = study.protocol.options["transport"], device_named(study.engine.device)
    with drawn_from(study.study.seed, ATTACKER, number), torch.no_grad(), autocast(device, study.training.precision):
        sent: Stack = front.to(device).run((image.to(device),))
    maps = decode(encode(sent, transport), transport, dtype=torch.float32)
    return Release(ATTACKER, number, 0, maps=tuple(m.float() if m.is_floating_point() else m for m in maps))


def truth_behind(subject: Subject, site: str, transcript: Sequence[Release]) -> Cases:
    """Image, in the party's channels, and label map of every window behind a transcript."""
    images, labels = [], []
    windows: dict[int, list[Tensor]] = {}
    for r in transcript:
        if r.round not in windows:
            windows[r.round] = _windows(subject, site, r.round)
        window = windows[r.round][r.step]
        images.append(window[:, :-1])
        labels.append(window[:, -1].round().long().clamp_min(0))
    return Cases(torch.cat(images), torch.cat(labels), tuple(transcript))


def _windows(subject: Subject, site: str, case: int) -> list[Tensor]:
    """The windows of a case, its label map as the last channel."""
    job, labelled = subject.jobs[site], subject.jobs[subject.labels_at]
    image = torch.from_numpy(subject.prepared(job, job.entries[SUBSET][case]).image.copy())
    label = torch.from_numpy(subject.prepared(labelled, labelled.entries[SUBSET][case]).label.copy())
    seen = Windows(Stages({}), Some(0, 1 << 30), n_heads(job.labels))
    t = job.training
    both = torch.cat([image, label.to(image.dtype)])
    predict_logits(
        seen, both, job.plan, labels=job.labels, device=torch.device("cpu"), mirror=t.mirror, precision="float32"
    )
    return [maps[0] for maps in seen.maps]


def _segment(subject: Subject, way: Way) -> Transcript:
    """What the server has of all parties when the validation cases have been segmented.

    Raises:
        EngineError: a site failed.
    """
    with ready(subject, f"{subject.number:06d}-prediction", (Look, Looked)) as (engine, cases, said):
        model = model_of(subject, way, cases)
        own = own_weights(model, subject.plans, subject.weights)
        kept = dict(ask(engine, {site: Keep(MODEL, weights) for site, weights in own.items()}))
        wrong = {site: reply for site, reply in kept.items() if not isinstance(reply, Done)}
        request, device = (
            Evaluate(MODEL, SUBSET, (), defended=bool(subject.study.defences)),
            subject.study.engine.device,
        )
        reply = serve(engine, model, subject.plans, subject.weights, request, device=device)
        if wrong or not isinstance(reply, Evaluated):
            failed = [r for r in (*wrong.values(), reply) if isinstance(r, Failure)]
            told = describe(failed[0]) if failed else type(reply).__name__
            raise EngineError(
                f"The validation cases could not be segmented for the audit: {told}. Expected an answer of all parties. "
                f"Look into {subject.work / 'sites'}."
            )
    return releases(said())
