"""Federated updates after one step: what the server has of each site, or of all together where it is shown their sum alone.

In a round of `secure_sum` the server is left with the mean of the updates; that is what is attacked there, as the collect leaves
it, and no update of a single site. Where patients are drawn (`dp_sgd`), those of the step are worked out as the site does it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from concilium.answers import Entry
from concilium.answers.ledger import draws_of
from concilium.attacks import Auxiliary, Cases, Known, Release, Transcript
from concilium.data.patches import Batch
from concilium.errors import StudyError
from concilium.leakage.exchange import (
    MODEL,
    Way,
    batches_of,
    exchange,
    label_map,
    one_round,
    own_cases,
    ready,
    together,
)
from concilium.leakage.scene import Amount, Scene, loss_of, whole_of
from concilium.leakage.subject import Subject
from concilium.messages import Train
from concilium.protocols import WEIGHTS
from concilium.wire import part

SUM = "sum"
"""What all sites together are called."""
SUMS = {"mean": True, "unweighted": False}
"""Rules after which the server knows the sum as the mean of the updates, and whether it is weighted by cases."""
Who = tuple[str, str, int]
"""Site, part of its data, patient."""


def update_scenes(subject: Subject, amount: Amount, *, images: bool, members: bool) -> Iterator[Scene]:
    """The updates of one round, of which the attacker is taken to know the label maps; and those of as many rounds, each from the
    same weights, as have so many patches behind them as are attacked, of which it asks who was in them."""
    if not (images or members):
        return
    own, known = together(own_cases(subject, amount.own)), Known(whole=whole_of(subject), loss=loss_of(subject))
    if images:
        transcript, truth, _ = _updates(subject, 1)
        if len(truth.images):
            yield Scene(subject.number, "", transcript, known, Auxiliary(own, labels=truth.labels), truth)
    if members:
        size = subject.plans.batch_size * len(subject.sites)
        transcript, truth, behind = _updates(subject, max(1, -(-amount.victims // size)))
        asked, trained_on = _candidates(subject, truth, behind, amount)
        yield Scene(subject.number, "", transcript, known, Auxiliary(own, asked), asked, members=trained_on)


def _updates(subject: Subject, rounds: int) -> tuple[Transcript, Cases, frozenset[Who]]:
    """What the server has after each round; patches and patients behind it, in the order of the releases and their parts."""
    where = f"{subject.number:06d}-updates-{rounds}"
    summed = subject.study.collect.name == "secure_sum"
    way = Way("federated", {}, steps=1, rounds=rounds)
    transcript = _sums(subject, way, where) if summed else exchange(subject, way, where)
    behind: set[Who] = set()
    cases, told = [], []
    for release in transcript:
        sites = [*subject.sites] if release.site == SUM else [release.site]
        each = [_behind(subject, site, release.round) for site in sites]
        cases += [found for found, _ in each]
        behind |= {who for _, found in each for who in found}
        shares = [share for _, share in release.parts] or [1.0]
        parts = tuple((len(found.images), share) for (found, _), share in zip(each, shares, strict=True))
        told.append(replace(release, parts=parts))
    truth = Cases(torch.cat([c.images for c in cases]), torch.cat([c.labels for c in cases]))
    return tuple(told), truth, frozenset(behind)


def _sums(subject: Subject, way: Way, where: str) -> Transcript:
    """The mean of the updates of each round, as the server is left with it.

    Raises:
        StudyError: the rule makes something else of the sum.
    """
    rule = subject.study.aggregation.name
    if rule not in SUMS:
        raise StudyError(
            f"Sums of updates under [aggregation] name = {rule!r} are not audited. Allowed: {', '.join(SUMS)}, after which the "
            "server's weights tell the sum. Audit a variant with one of these."
        )
    found = []
    with ready(subject, where, ()) as (engine, cases, _):
        shares = _shares(cases, weighted=SUMS[rule])
        for i in range(way.rounds):
            after = part(one_round(subject, way, engine, cases, subject.number + i).tensors, WEIGHTS)
            moved = {n: (subject.weights[n].double() - t.double()).float() for n, t in after.items()}
            parts = tuple((0, shares[site]) for site in subject.sites)
            found.append(Release(SUM, subject.number + i + 1, 0, update=moved, parts=parts))
    return tuple(found)


def _shares(cases: Mapping[str, int], *, weighted: bool) -> dict[str, float]:
    counts = {site: n if weighted else 1 for site, n in cases.items()}
    return {site: n / sum(counts.values()) for site, n in counts.items()}


def _behind(subject: Subject, site: str, number: int) -> tuple[Cases, frozenset[Who]]:
    """The patches of a site's step in a round, and whose they are."""
    job, seed = subject.jobs[site], subject.study.study.seed
    network = job.in_one_place()
    network.load_state_dict(dict(subject.weights))
    asked = Train(MODEL, number, number - 1, 1, number, {}, True)  # as the audit's round asks it (`exchange.one_round`)
    draws = draws_of(job, asked, job.training.local_update, network, batches_of(job))
    key: tuple[str | int, ...] = (seed, site, number, 0, *draws.hidden)
    if not draws.n_patients:
        batch, names = batches_of(job).draw_named(*key)
        chosen = {(site, e.member, e.patient) for e in job.entries["training"] if e.key in set(names)}
    else:
        batch = draws.batches.draw(*key)
        patients = sorted({(e.member, e.patient) for e in job.entries["training"]})  # as the site counts them
        drawn = [] if batch.patients is None else batch.patients.tolist()
        chosen = {(site, *patients[i]) for i in drawn}
    return Cases(batch.image, label_map(batch)), frozenset(chosen)


def _candidates(subject: Subject, truth: Cases, behind: frozenset[Who], amount: Amount) -> tuple[Cases, torch.Tensor]:
    """Patches that were in a step, and as many of other patients, drawn and augmented as those are; which are the former.

    Were they drawn otherwise, how a patch looks would tell who was in the step, without any update.

    Raises:
        StudyError: there are too few of either.
    """
    others: dict[str, list[Entry]] = {}
    for site, job in subject.jobs.items():
        if left := [e for e in job.entries["training"] if (site, e.member, e.patient) not in behind]:
            others[site] = left
    n_others = sum(map(len, others.values()))
    n = min(amount.gallery, len(truth.images))
    if min(n, n_others) < 2:
        raise StudyError(
            f"{len(truth.images)} patches were in the steps, and {n_others} cases are of other patients. Membership inference "
            "compares 2 of each at least. Ask for other --victims, or leave it out."
        )
    drawing = [(site, subject.batches(subject.jobs[site], left)) for site, left in sorted(others.items())]
    drawn: list[Batch] = []
    for number in itertools.count():
        site, batches = drawing[number % len(drawing)]
        drawn.append(batches.draw("members", site, number))
        if sum(len(b.image) for b in drawn) >= n:
            break
    theirs = together(drawn)
    places = torch.Generator().manual_seed(0)
    chosen, their = (torch.randperm(len(of.images), generator=places)[:n] for of in (truth, theirs))
    asked = Cases(
        torch.cat([truth.images[chosen], theirs.images[their]]), torch.cat([truth.labels[chosen], theirs.labels[their]])
    )
    return asked, torch.arange(2 * n) < n
