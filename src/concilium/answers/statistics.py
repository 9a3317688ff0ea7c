"""Answers to `Examine` and `Prepare`: read every case, tell what adds up, preprocess, and set aside what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from concilium.answers import Cancelled, Check, Entry, Job, Settings, secret_of
from concilium.answers.micro_batch import must_be_divisible
from concilium.data.dataset import Dataset, folds, open_dataset, read_case, translated
from concilium.data.draws import drawn_from
from concilium.data.fingerprint import fingerprint_of_case, merge
from concilium.data.labels import annotation_mask, flaw, foreground, n_heads, unknown_labels
from concilium.data.matching import Names, Space
from concilium.data.patches import Batches
from concilium.data.plan import Plan, open_plan
from concilium.data.preprocess import Prepared as PreparedCase
from concilium.data.preprocess import prepare as prepare_case
from concilium.defences import guarded
from concilium.errors import ContractError, DataError
from concilium.local_updates import brought_by
from concilium.messages import Examine, Examined, Excluded, Fingerprint, Prepare, Prepared, Training
from concilium.networks import Stages, make_network
from concilium.sharing import kept_of

T = TypeVar("T")
Exclusions = dict[str, tuple[str, str]]
"""Case -> (code, text). The text stays at the site."""


def find_cases(
    data: Mapping[str, Path], names: Mapping[str, Names] | None = None, space: Space | None = None
) -> tuple[tuple[Entry, ...], Exclusions]:
    """All cases of all members, numbered, and those of which a file is missing.

    Args:
        names: what members call otherwise than the study.
        space: the study's channels and labels, which all get; omitted: the first member's.

    Raises:
        DataError: a data set cannot be used, or the names of its channels or labels are others.
    """
    found: list[Entry] = []
    excluded: Exclusions = {}
    for member, folder in data.items():
        dataset = open_dataset(folder, (names or {}).get(member))
        space = space or dataset.space
        dataset = translated(dataset, space)
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
    found, excluded = find_cases(settings.data, settings.names)
    read = partial(_fingerprint, exact_geometry=request.exact_geometry)
    made = _each(found, read, excluded, cancelled)
    _limit(excluded, len(made), request.max_excluded)
    dataset = found[0].dataset
    usable = [e.case.annotated for e in found if e.key in made]
    if settings.role != "test" and not any(names is None or names for names in usable):
        raise DataError(
            f"{dataset.folder}: of no case any label is annotated ({len(usable)} cases, annotated is []). Allowed in single "
            f"cases, but a site that trains must have looked for one of {', '.join(foreground(dataset.labels))} in one. List "
            "what was looked for (annotated, in dataset.json or the site's table of the study), or take the site out."
        )
    every = set(foreground(dataset.labels))
    reply = Examined(
        merge(list(made.values())),
        dataset.channels,
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
        DataError: the data set cannot be used, or too many cases were set aside.
    """
    found, excluded = find_cases(settings.data, settings.names, _agreed(request))
    plan = open_plan(request.plans, request.configuration)
    trains = settings.role != "test"
    bare = _builder(request, plan, found[0].dataset)
    image = (1, len(found[0].dataset.channels), *plan.configuration.patch_size)
    network = guarded(bare, request.guard, image=image)
    if trains and settings.micro_batch is not None:  # before an hour of preprocessing
        with drawn_from("micro_batch"):
            must_be_divisible(settings.micro_batch, plan.batch_size, request.training.local_update.name, network())
    read = partial(_prepare_case, plan=plan, cache=settings.cache)
    files = _each(found, read, excluded, cancelled) if trains else {}
    if trains:
        _limit(excluded, len(files), request.max_excluded)
    usable = [e for e in found if e.key in files]
    held_out = {
        (m, p)
        for m in settings.data
        for p in folds(sorted({e.case.patient for e in usable if e.member == m}), request.folds, request.fold)
    }
    parts = {
        "training": tuple(e for e in usable if (e.member, e.case.patient) not in held_out),
        "validation": tuple(e for e in usable if (e.member, e.case.patient) in held_out),
    }
    dataset = found[0].dataset
    own = {e.key: files[e.key] for e in parts["training"]}
    job = Job(
        plan,
        dataset.labels,
        len(dataset.channels),
        network,
        request.training,
        request.seed,
        parts,
        _batches(own, request.training, plan, dataset, _partly(parts["training"])) if own else None,
        dataset.channels,
        _kept(request, network),
        unknown_labels(dataset.labels, [e.case.annotated for e in usable or found]),
        settings.micro_batch,
        request.guard,
        bare,
        request.filters,
        settings.name,
        secret_of(settings),
    )
    warnings = _warnings(settings, request, found, usable, validated=bool(parts["validation"]))
    n_patients = len({(e.member, e.patient) for e in usable})
    reply = Prepared(len(parts["training"]), len(parts["validation"]), n_patients, count(excluded), tuple(warnings))
    return reply, job, excluded


def _kept(request: Prepare, network: Callable[..., Stages]) -> frozenset[str]:
    """The tensors of the network that stay here."""
    if not request.keep:
        return frozenset()
    with drawn_from("kept"):  # the weights are thrown away
        return kept_of(network(), request.keep)


def _batches(
    files: Mapping[str, PreparedCase],
    training: Training,
    plan: Plan,
    dataset: Dataset,
    annotated: Mapping[str, tuple[str, ...]],
) -> Batches:
    """Where the batches of these cases come from. `annotated`: what was looked for, in cases where that is not all."""
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
        n_channels=len(dataset.channels),
        n_labels=n_heads(dataset.labels),
        plan=plan.architecture,
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


def _fingerprint(entry: Entry, *, exact_geometry: bool) -> Fingerprint:
    image, label, properties = read_case(entry.case, entry.dataset)
    if label is None:
        raise DataError(f"{entry.key} has no label map. Training needs one. Add it.", code="missing_label")
    return fingerprint_of_case(image, label, properties["spacing"], exact_geometry=exact_geometry)


def _prepare_case(entry: Entry, *, plan: Plan, cache: Path) -> PreparedCase:
    return prepare_case(entry.case, entry.dataset, plan, cache / entry.member)


def _limit(excluded: Exclusions, n_usable: int, max_excluded: float) -> None:
    """Check that not too many cases were set aside.

    Raises:
        DataError: more than the share `max_excluded`, or none is left.
    """
    n = n_usable + len(excluded)
    if n_usable == 0 or len(excluded) > max_excluded * n:
        reasons = "; ".join(f"{case}: {text}" for case, (_, text) in list(excluded.items())[:5])
        raise DataError(
            f"{len(excluded)} of {n} cases cannot be used ({reasons}). "
            f"At most {max_excluded:.0%} may be set aside ([study] max_excluded), and one must be left. Mend or remove them.",
            code="too_many_excluded",
        )
