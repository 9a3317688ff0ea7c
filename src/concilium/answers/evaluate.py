"""Answer to `Evaluate`: segment cases in their original geometry and score every label."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from concilium import catalog
from concilium.answers import Cancelled, Check, Entry, Job, Settings
from concilium.answers.statistics import Exclusions, count, find_cases
from concilium.data.dataset import Case, Dataset, read_case
from concilium.data.patches import predict_logits
from concilium.data.plan import Plan
from concilium.data.preprocess import preprocess, restore
from concilium.errors import DataError
from concilium.messages import Evaluate, Evaluated, PlugIn, Score, Tensors
from concilium.metrics import status
from concilium.metrics._lesions import count_lesions
from concilium.metrics._pairs import pairs


def evaluate(
    settings: Settings, job: Job, weights: Tensors, request: Evaluate, *, device: torch.device, cancelled: Check
) -> tuple[Evaluated, Exclusions]:
    """The scores of every case of the subset, and the cases that could not be scored.

    Raises:
        DataError: the site has no such subset.
        Cancelled: the request was cancelled.
    """
    started = time.monotonic()
    network = job.network().to(device)
    network.load_state_dict(dict(weights))
    network.eval()
    found, excluded = _subset(settings, job, request.subset)
    scores: list[Score] = []
    for entry in found:
        if cancelled():
            raise Cancelled
        try:
            scores += _score_case(entry, job, network, request.metrics, device)
        except DataError as e:
            excluded[entry.key] = (e.code, str(e))
    return Evaluated(tuple(scores), count(excluded), time.monotonic() - started), excluded


def _subset(settings: Settings, job: Job, subset: str) -> tuple[Sequence[Entry], Exclusions]:
    if subset in job.entries:
        return job.entries[subset], {}
    if subset == "test" and settings.test is not None:
        return find_cases({"test": settings.test})
    raise DataError(
        f"{settings.name} has no cases for {subset!r}. Expected training, validation or test. Correct the study.",
        code="no_such_subset",
    )


def _score_case(
    entry: Entry, job: Job, network: nn.Module, metrics: Sequence[PlugIn], device: torch.device
) -> list[Score]:
    _, reference, properties = read_case(entry.case, entry.dataset)
    if reference is None:
        raise DataError(f"{entry.key} has no label map. Expected one to score against. Add it.", code="missing_label")
    t = job.training
    prediction, _ = segment(
        entry.case,
        entry.dataset,
        plan=job.plan,
        labels=job.labels,
        network=network,
        device=device,
        mirror=t.mirror,
        precision=t.precision,
    )
    # headers hold float32: without rounding, a distance equal to a tolerance may fall on either side of it
    spacing = (
        None
        if entry.dataset.file_ending in UNKNOWN_SPACING
        else tuple(round(float(s), 6) for s in properties["spacing"])
    )
    return score_labels(
        prediction, reference[0], spacing, job.labels, metrics, case=entry.number, patient=entry.patient
    )


def segment(
    case: Case,
    dataset: Dataset,
    *,
    plan: Plan,
    labels: Mapping[str, int],
    network: nn.Module,
    device: torch.device,
    mirror: bool,
    precision: str,
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Label map (X, Y, Z) of a case in its original geometry, and that geometry. Its own label map is not looked at."""
    image, properties = preprocess(case, dataset, plan)
    logits = predict_logits(network, image, plan, labels=labels, device=device, mirror=mirror, precision=precision)
    return restore(logits, plan, labels, properties), properties


UNKNOWN_SPACING = (".png", ".bmp", ".tif", ".tiff")
"""Formats without a spacing: distances are in pixels."""


def score_labels(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    spacing: tuple[float, ...] | None,
    labels: Mapping[str, int | tuple[int, ...]],
    metrics: Sequence[PlugIn],
    *,
    case: int,
    patient: int,
    counted: NDArray[np.bool_] | None = None,
) -> list[Score]:
    """Scores of every foreground label of one case; both label maps (X, Y, Z) in original geometry.

    A label is an id, or several (a region); voxels where `counted` is false are left out.

    Raises:
        ContractError: the label maps differ in shape, or hold something else than ids.
    """
    functions = {m.name: partial(catalog.load("metrics", m.name), **m.options) for m in metrics}
    voxel = float(np.prod(spacing)) / 1000 if spacing else 1.0  # [ml], or [px]
    scores = []
    for label, pair in pairs(prediction, reference, labels, spacing, counted=counted):
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
