"""Answers to `Examine` and `Prepare`: read every case, tell what adds up, preprocess, and set aside what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from concilium.answers import AUTO, Cancelled, Check, Entry, Job, Settings, secret_of
from concilium.answers._aligned import aligned, divided, limit, must_prepare_all, shapes_of, shown_before
from concilium.answers.features import views_of
from concilium.answers.fitting import fitted
from concilium.answers.frozen import with_frozen
from concilium.answers.micro_batch import must_be_divisible
from concilium.data.dataset import Dataset, open_dataset, read_case, restricted, translated
from concilium.data.draws import digest, drawn_from
from concilium.data.fingerprint import fingerprint_of_case, merge
from concilium.data.labels import annotation_mask, flaw, foreground, n_heads, unknown_labels, with_labels
from concilium.data.matching import Names, Space
from concilium.data.patches import Batches
from concilium.data.plan import Plan, open_plan
from concilium.data.preprocess import Prepared as PreparedCase
from concilium.data.preprocess import prepare as prepare_case
from concilium.defences import guarded
from concilium.errors import ContractError, DataError
from concilium.local_updates import brought_by
from concilium.messages import Examine, Examined, Excluded, Fingerprint, Holding, Prepare, Prepared
from concilium.networks import Stages, make_network
from concilium.sharing import kept_of

T = TypeVar("T")
Exclusions = dict[str, tuple[str, str]]
"""Case -> (code, text). The text stays at the site."""


def find_cases(
    data: Mapping[str, Path],
    names: Mapping[str, Names] | None = None,
    space: Space | None = None,
    holding: Holding | None = None,
) -> tuple[tuple[Entry, ...], Exclusions]:
    """All cases of all members, numbered, and those of which a file is missing.

    Args:
        names: what members call otherwise than the study.
        space: the study's channels and labels, which all get; omitted: the first member's.
        holding: what of its channels a site contributes, where others have the others.

    Raises:
        DataError: a data set cannot be used, or the names of its channels or labels are others.
    """
    found: list[Entry] = []
    excluded: Exclusions = {}
    for member, folder in data.items():
        dataset = open_dataset(folder, (names or {}).get(member), labelled=holding is None or holding.labelled)
        space = space or dataset.space
        if holding is None:
            dataset = translated(dataset, space)
        else:
            dataset = restricted(dataset, holding.channels, labels=None if holding.labelled else space.labels)
        before = len(found)  # numbers go on from member to member: in a pool no two cases have the same
        patients = {p: i for i, p in enumerate(sorted({c.patient for c in dataset.cases}), before)}
        found += [Entry(member, dataset, c, i, patients[c.patient]) for i, c in enumerate(dataset.cases, before)]
        excluded |= {
            f"{member}/{case}": (reason, f"{dataset.folder} lacks a file of case {case}.")
            for case, reason in dataset.missing
        }
    return tuple(found), excluded


def examine(settings: Settings, request: Examine, cancelled: Check) -> tuple[Examined, Exclusions]:
    """What `Examine` asks for, and the cases that were set aside.

    Raises:
        DataError: the data set cannot be used, too many cases were set aside, or a site that trains annotates nothing at all.
    """
    held = request.holding
    found, excluded = find_cases(settings.data, settings.names, holding=held)
    found, excluded = (aligned(settings, found), {}) if request.common else (found, excluded)
    labelled = held is None or held.labelled
    read = partial(_fingerprint, exact_geometry=request.exact_geometry, crop=held is None, labelled=labelled)
    made = _each(found, read, excluded, cancelled)
    limit(excluded, len(made), request.max_excluded)
    dataset = found[0].dataset
    usable = [e.case.annotated for e in found if e.key in made]
    if settings.role != "test" and labelled and not any(names is None or names for names in usable):
        raise DataError(
            f"{dataset.folder}: of no case any label is annotated ({len(usable)} cases, annotated is []). Allowed in single "
            f"cases, but a site that trains must have looked for one of {', '.join(foreground(dataset.labels))} in one. List "
            "what was looked for (annotated, in dataset.json or the site's table of the study), or take the site out."
        )
    every = set(foreground(dataset.labels))
    merged, channels = merge(list(made.values())), dataset.channels
    if held is not None and not held.channels:  # its images serve for their geometry
        merged, channels = replace(merged, channels=()), ()
    reply = Examined(
        merged,
        channels,
        dict(dataset.labels),
        dataset.file_ending,
        count(excluded),
        dataset.space.annotated,
        any(names is not None and bool(every - set(names)) for names in usable),
    )
    return reply, excluded


def prepare(settings: Settings, request: Prepare, cancelled: Check) -> tuple[Prepared, Job, Exclusions]:
    """Preprocess every case into the cache and divide them by patient.

    Raises:
        DataError: the data set cannot be used, or too many cases were set aside: at a party any (`case_failed`), until all
            leave it out.
    """
    party = request.holding is not None
    found, excluded = find_cases(settings.data, settings.names, _agreed(request), request.holding)
    if party:
        found, excluded = aligned(settings, found), {}
    plan = open_plan(request.plans, request.configuration)
    trains = settings.role != "test"
    bare, frozen = with_frozen(settings, request, _builder(request, plan, found[0].dataset))
    at_once = None
    if trains:
        at_once, bare = fitted(settings, request, plan, bare, len(found[0].dataset.channels))
    network = guarded(bare, request.guard, image=(1, len(found[0].dataset.channels), *plan.configuration.patch_size))
    if at_once is not None:  # before an hour of preprocessing
        with drawn_from("micro_batch"):
            must_be_divisible(at_once, plan.batch_size, request.training.local_update.name, network())
    read = partial(_prepare_case, plan=plan, cache=settings.cache, labelled=request.labelled)
    files = _each(found, read, excluded, cancelled) if trains else {}
    if party:
        must_prepare_all(settings, excluded)
    elif trains:
        limit(excluded, len(files), request.max_excluded)
    usable = [e for e in found if e.key in files]
    parts = divided(settings, request, usable)
    dataset = found[0].dataset
    own = {e.key: files[e.key] for e in parts["training"]}
    if party:  # by their places, which are the same at all parties
        own = {f"{i:06d}": files[e.key] for i, e in enumerate(parts["training"])}
    made = _batches(own, request, plan, dataset, _partly(parts["training"]), settings) if own else None
    unknown = unknown_labels(dataset.labels, [e.case.annotated for e in usable or found])
    job = Job(
        plan, dataset.labels, len(dataset.channels), network, request.training, request.seed, parts, made, dataset.channels,
        _kept(request, network), unknown, at_once, request.labelled, request.guard, bare, request.filters, settings.name,
        secret_of(settings), frozen, request.holding is None, settings.micro_batch == AUTO, f"{digest(repr(request)):016x}",
    )  # fmt: skip
    warnings = _warnings(settings, request, found, usable, validated=bool(parts["validation"]))
    n_patients = len({(e.member, e.patient) for e in usable})
    shapes = shapes_of(files[e.key] for e in usable) if party and trains else 0
    told = count(shown_before(settings, new=False).lost if party else excluded)
    reply = Prepared(len(parts["training"]), len(parts["validation"]), n_patients, told, tuple(warnings), shapes)
    return reply, job, excluded


def _kept(request: Prepare, network: Callable[..., Stages]) -> frozenset[str]:
    """The tensors of the network that stay here."""
    if not request.keep:
        return frozenset()
    with drawn_from("kept"):  # the weights are thrown away
        return kept_of(network(), request.keep)


def _batches(
    files: Mapping[str, PreparedCase],
    request: Prepare,
    plan: Plan,
    dataset: Dataset,
    annotated: Mapping[str, tuple[str, ...]],
    settings: Settings,
) -> Batches:
    """Where the batches of these cases come from. `annotated`: what was looked for, in cases where that is not all."""
    training = request.training
    brought = brought_by(
        training.local_update, plan=plan, labels=dataset.labels, channels=dataset.channels, device=torch.device("cpu")
    )
    if brought is not None:
        if annotated:
            raise ContractError(
                f"{training.local_update.name} trains on cases of which every label is annotated. Here {len(annotated)} are "
                "annotated in part. Choose another [local_update]."
            )
        return brought.batches(files)
    return Batches(
        files,
        plan=plan,
        labels=dataset.labels,
        batch_size=plan.batch_size,
        foreground=training.foreground,
        mirror=training.mirror,
        augmentation=training.augmentation,
        deep_supervision=training.deep_supervision,
        annotated={case: annotation_mask(dataset.labels, names) for case, names in annotated.items()},
        party=None if request.holding is None else settings.name,
        labelled=request.holding is None or request.holding.labelled,
        views=training.views,
        views_in=settings.cache / ".views" / views_of(request, dataset.labels) if training.views else None,
    )


def _partly(entries: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
    """What was looked for, by case, where that is not all."""
    return {e.key: e.case.annotated for e in entries if e.case.annotated is not None}


def _agreed(request: Prepare) -> Space | None:
    """Channels and labels of the study, where the server tells them.

    Raises:
        ContractError: such labels cannot be.
    """
    if not request.channels:
        return None
    if problem := flaw(request.labels):
        raise ContractError(
            f"The server tells labels {dict(request.labels)}. {problem}. Do not take part in this study."
        )
    return Space(request.channels, request.labels)


def _warnings(
    settings: Settings, request: Prepare, found: Sequence[Entry], usable: Sequence[Entry], *, validated: bool
) -> list[str]:
    """What the server is told besides: sentences of this list, without names."""
    trains, dataset = settings.role != "test", found[0].dataset
    warnings = [] if validated or not trains else ["No validation cases: the site has a single patient."]
    if 1 < len({e.patient for e in usable}) < request.folds:
        warnings.append("Fewer patients than folds: as many folds as patients.")
    if settings.role != "pooled" and not all(e.dataset.patients_known for e in found):
        warnings.append(
            "Patients unknown (no complete patient table in dataset.json): cases count as patients, intervals may be too narrow."
        )
    if settings.role != "pooled" and any(e.dataset.left_out for e in found):
        warnings.append(
            "Cases that the table annotated in dataset.json leaves out count as annotated in full: what is unlabelled there is "
            "taken for background."
        )
    if dataset.translation is not None and len(settings.data) == 1:  # the pool's members have told it themselves
        warnings += dataset.translation.notes
    return warnings


def _builder(request: Prepare, plan: Plan, dataset: Dataset) -> Callable[..., Stages]:
    """What builds the network, with new weights each time."""
    return partial(
        make_network,
        request.network,
        n_channels=len(dataset.channels if request.holding is None else request.channels),
        n_labels=n_heads(dataset.labels),
        plan=with_labels(plan.architecture, dataset.labels),
        deep_supervision=request.training.deep_supervision,
    )


def count(excluded: Exclusions) -> tuple[Excluded, ...]:
    """How many cases were set aside for each reason."""
    return tuple(Excluded(code, n) for code, n in sorted(Counter(code for code, _ in excluded.values()).items()))


def _each(found: Sequence[Entry], do: Callable[[Entry], T], excluded: Exclusions, cancelled: Check) -> dict[str, T]:
    """`do` for every case; one that cannot be used is set aside with its reason."""
    made: dict[str, T] = {}
    for entry in found:
        if cancelled():
            raise Cancelled
        try:
            made[entry.key] = do(entry)
        except DataError as e:
            excluded[entry.key] = (e.code, str(e))
    return made


def _fingerprint(entry: Entry, *, exact_geometry: bool, crop: bool, labelled: bool) -> Fingerprint:
    image, label, properties = read_case(entry.case, entry.dataset)
    if label is None and labelled:
        raise DataError(f"{entry.key} has no label map. Training needs one. Add it.", code="missing_label")
    return fingerprint_of_case(image, label, properties["spacing"], exact_geometry=exact_geometry, crop=crop)


def _prepare_case(entry: Entry, *, plan: Plan, cache: Path, labelled: bool) -> PreparedCase:
    return prepare_case(entry.case, entry.dataset, plan, cache / entry.member, labelled=labelled)
