"""Answer to `Evaluate`: segment cases in their original geometry and score every label."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from concilium import catalog
from concilium.answers import Cancelled, Check, Entry, Job, Settings, pictures
from concilium.answers.new_patients import NEW, new_entries
from concilium.answers.statistics import Exclusions, count, find_cases
from concilium.data.dataset import Case, Dataset, pixel_size, read_case
from concilium.data.draws import drawn_from
from concilium.data.labels import Labels, foreground, ignored, looked_for, silenced
from concilium.data.matching import Space
from concilium.data.plan import Plan
from concilium.data.preprocess import preprocess, restore
from concilium.data.windows import predict_logits
from concilium.disclosure import MIN_CASES
from concilium.errors import DataError
from concilium.messages import Average, Evaluate, Evaluated, PlugIn, Score, Tensors
from concilium.metrics import NOT_ANNOTATED, status
from concilium.metrics._lesions import count_lesions
from concilium.metrics._pairs import pairs


def evaluate(
    settings: Settings,
    job: Job,
    members: Sequence[Tensors],
    request: Evaluate,
    *,
    device: torch.device,
    cancelled: Check,
) -> tuple[Evaluated, Exclusions]:
    """The scores of every case of the subset, and the cases that could not be scored; `members`: the weights of each.

    Raises:
        DataError: the site has no such subset.
        Cancelled: the request was cancelled.
    """
    started = time.monotonic()
    networks = []
    for weights in members:
        network = (job.network if request.defended else job.in_one_place)().to(device)
        network.load_state_dict(dict(weights))
        networks.append(network.eval())
    found, excluded = subset_of(settings, job, request.subset)
    scorer = Scorer(settings, job, request, device, excluded)
    for entry in found:
        if cancelled():
            raise Cancelled
        scorer.add(entry, networks)
    return scorer.reply(time.monotonic() - started), scorer.excluded


class Scorer:
    """Scores of one case after the other, and the reply that they make."""

    def __init__(
        self,
        settings: Settings,
        job: Job,
        request: Evaluate,
        device: torch.device,
        excluded: Exclusions | None = None,
    ) -> None:
        self.excluded: Exclusions = {} if excluded is None else excluded
        self._settings, self._job, self._request, self._device = settings, job, request, device
        self._unknown = (*request.unknown, *(job.unknown if request.own else ()))
        self._scores: list[Score] = []
        self._kept: list[pictures.Row] = []  # for the site's own eyes

    def add(self, entry: Entry, networks: Sequence[nn.Module]) -> None:
        """Segment a case and score it; one that cannot be is set aside."""
        settings, request, job = self._settings, self._request, self._job
        try:
            scored, arrays, spacing = _score_case(entry, job, networks, request.metrics, self._device, self._unknown)
        except DataError as e:
            self.excluded[entry.key] = (e.code, str(e))
            return
        self._scores += scored
        if request.final:
            self._kept += pictures.save_case(
                settings.folder, request, entry, arrays, spacing, scored, labels=job.labels, pictures=settings.pictures
            )

    def reply(self, seconds: float) -> Evaluated:
        """The scores; or where the site keeps them back, what they are on average."""
        settings, request = self._settings, self._request
        if request.final:
            pictures.save_scores(settings.folder, settings.name, request, self._kept, self._job.labels)
        if not settings.policy.case_scores:
            return Evaluated((), count(self.excluded), seconds, average(self._scores))
        return Evaluated(tuple(self._scores), count(self.excluded), seconds)


def _not_annotated(label: str, unit: str, metrics: Sequence[PlugIn], case: int, patient: int) -> Score:
    """What is said of a label that nobody looked for."""
    return Score(case, patient, label, NOT_ANNOTATED, unit, {m.name: None for m in metrics}, 0.0, 0.0, 0, 0, 0)


def average(scores: Sequence[Score]) -> tuple[Average, ...]:
    """The scores over patients, by label and metric; no value that describes fewer than `MIN_CASES` of them."""
    found = []
    scores = [s for s in scores if s.status != NOT_ANNOTATED]
    labels = list(dict.fromkeys(s.label for s in scores))
    metrics = list(dict.fromkeys(name for s in scores for name in s.values))
    for label in [*labels, *([""] if len(labels) > 1 else [])]:
        own = [s for s in scores if label in (s.label, "")]
        for metric in metrics:
            patients = _means(_means(((s.patient, s.label), s.values[metric]) for s in own).items(), key=lambda k: k[0])
            values = list(patients.values())
            told = len(values) >= MIN_CASES
            found.append(
                Average(
                    label,
                    metric,
                    len(values),
                    len({s.case for s in own}),
                    sum(s.values[metric] is None for s in own),
                    statistics.fmean(values) if told else None,
                    statistics.stdev(values) if told else None,
                )
            )
    return tuple(found)


def _means(values: Iterable[tuple[Any, float | None]], *, key: Callable[[Any], Any] = lambda k: k) -> dict[Any, float]:
    """The mean of the values of each key; what is undefined does not count."""
    of: dict[Any, list[float]] = {}
    for k, value in values:
        if value is not None:
            of.setdefault(key(k), []).append(value)
    return {k: statistics.fmean(found) for k, found in of.items()}


def subset_of(settings: Settings, job: Job, subset: str) -> tuple[Sequence[Entry], Exclusions]:
    """The cases of a subset, and those of which a file is missing.

    Raises:
        DataError: the site has no such subset.
    """
    if subset in job.entries:
        return job.entries[subset], {}
    if subset == NEW:
        return new_entries(settings), {}
    if subset == "all":
        return [entry for part in job.entries.values() for entry in part], {}
    if subset == "test" and settings.test is not None:
        return find_cases({"test": settings.test}, settings.names, Space(job.channels, job.labels))
    raise DataError(
        f"{settings.name} has no cases for {subset!r}. Expected training, validation or test. Correct the study.",
        code="no_such_subset",
    )


def _score_case(
    entry: Entry,
    job: Job,
    networks: Sequence[nn.Module],
    metrics: Sequence[PlugIn],
    device: torch.device,
    unknown: Sequence[str],
) -> tuple[list[Score], tuple[NDArray[Any], NDArray[Any], NDArray[Any]], tuple[float, ...] | None]:
    """Scores of a case; its image, reference and prediction; its spacing [mm], if known."""
    image, reference, properties = read_case(entry.case, entry.dataset)
    if reference is None:
        raise DataError(f"{entry.key} has no label map. Expected one to score against. Add it.", code="missing_label")
    t = job.training
    prediction, _ = segment(
        entry.case,
        entry.dataset,
        plan=job.plan,
        labels=job.labels,
        networks=networks,
        device=device,
        mirror=t.mirror,
        precision=t.precision,
        unknown=unknown,
    )
    spacing = pixel_size(entry.case, entry.dataset, properties)
    numbers = {"case": entry.number, "patient": entry.patient}
    annotated = entry.case.annotated
    if unknown:
        annotated = tuple(n for n in looked_for(job.labels, annotated) if n not in unknown)
    scores = score_labels(prediction, reference[0], spacing, job.labels, metrics, **numbers, annotated=annotated)
    return scores, (image, reference[0], prediction), spacing


def segment(  # noqa: PLR0913  (what a network needs, and what it does not know)
    case: Case,
    dataset: Dataset,
    *,
    plan: Plan,
    labels: Labels,
    networks: Sequence[nn.Module],
    device: torch.device,
    mirror: bool,
    precision: str,
    unknown: Sequence[str] = (),
    asked: Callable[..., Tensor] | None = None,
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Label map (X, Y, Z) of a case in its original geometry, and that geometry. Its own label map is not looked at.

    The logits of several networks are averaged, as nnU-Net does with those of its folds. Labels that are `unknown` to them are
    not in the label map. `asked` (network, image, geometry) gives the logits in place of the sliding window.
    """
    image, properties = preprocess(case, dataset, plan)
    see: Callable[..., Tensor] = partial(
        predict_logits, plan=plan, labels=labels, device=device, mirror=mirror, precision=precision
    )
    if asked is not None:
        see = partial(asked, properties=properties)
    with drawn_from("segment", case.name) as number:  # defences draw in prediction too
        if device.type == "cuda":
            torch.cuda.manual_seed_all(number)
        logits = see(networks[0], image)
        for network in networks[1:]:
            logits = logits + see(network, image)
    if len(networks) > 1:
        logits = logits / len(networks)
    return restore(silenced(logits, labels, unknown), plan, labels, properties), properties


def score_labels(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    spacing: tuple[float, ...] | None,
    labels: Labels,
    metrics: Sequence[PlugIn],
    *,
    case: int,
    patient: int,
    annotated: Sequence[str] | None = None,
) -> list[Score]:
    """Scores of every foreground label or region of one case; both label maps (X, Y, Z) in original geometry.

    Voxels that the reference says to `ignore` are left out; labels that were not looked for have no scores (`not_annotated`).

    Raises:
        ContractError: the label maps differ in shape, or hold something else than ids.
    """
    functions = {m.name: partial(catalog.load("metrics", m.name), **m.options) for m in metrics}
    voxel = float(np.prod(spacing)) / 1000 if spacing else 1.0  # [ml], or [px]
    scores = []
    ignore = ignored(labels)
    counted = None if ignore is None else reference != ignore
    for label, pair in pairs(prediction, reference, foreground(labels), spacing, counted=counted):
        if annotated is not None and label not in annotated:
            scores.append(_not_annotated(label, pair.unit, metrics, case, patient))
            continue
        values = {name: function(pair) for name, function in functions.items()}
        volumes = [float(np.count_nonzero(mask)) * voxel for mask in (pair.reference, pair.prediction)]
        lesions = count_lesions(pair)
        scores.append(
            Score(
                case, patient, label, status(pair), pair.unit, values, volumes[0], volumes[1],
                lesions.found, lesions.missed, lesions.false,
            )
        )  # fmt: skip
    return scores
