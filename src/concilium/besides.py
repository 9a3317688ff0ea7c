"""What a model sends outside of its rounds, forecast: validation between rounds, the finished model, and scoring.

    federated, splitfed   the weights down, as often as the model is scored: between rounds ([validation] every), and in the end
    vertical              each part down as often; and, of every validation case and window, each party's maps up, and what the
                          tail takes down to whoever has the labels
    cyclic               sealed weights, as often, up from the site that has them to every other, and down

Scores and headers of messages are not in it, nor new patients. A validation case counts as the median case of all sites.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from concilium.data.augment import mirror_axes
from concilium.data.plan import open_plan
from concilium.forecast import look_bytes
from concilium.nnunet_parts import compute_steps_for_sliding_window
from concilium.planning import Plans, image_of, network_of
from concilium.study import Study


@dataclass(frozen=True)
class Besides:
    """Bytes of one site outside of rounds, in the whole run."""

    up: int = 0
    down: int = 0


def besides(study: Study, held: Mapping[str, int]) -> dict[str, Besides]:
    """Where every site gets so many bytes of weights (`held`) whenever the model is scored; in `cyclic` from that which has it.

    Which that is then is not known before: there each counts as if it was.
    """
    times, others = n_scorings(study), 0
    if study.protocol.name == "cyclic":
        others = len(study.sites) - 1 + (study.test is not None)
    return {site: Besides(times * others * size, times * size) for site, size in held.items()}


def besides_of_parties(
    study: Study, plans: Plans, held: Mapping[str, int], *, after: str, labels: str, transport: str, windows: int
) -> dict[str, Besides]:
    """The same in vertical training.

    Args:
        after: the stage after which the tail begins.
        labels: who has it.
        windows: of all validation cases.
    """
    network, image = network_of(study, plans), (1, *image_of(study, plans)[1:])
    each = look_bytes(
        network, image=image, precision=study.training.precision, after=after, labels=labels, transport=transport
    )
    times = n_scorings(study)
    return {
        site: Besides(times * windows * up, times * (windows * down + held[site])) for site, (up, down) in each.items()
    }


def n_scorings(study: Study) -> int:
    """How often a model is given to its sites and scored."""
    every = study.validation.every
    return 1 + (study.protocol.rounds // every if every else 0)


def validation_windows(study: Study, plans: Plans, n_training: int) -> int:
    """Windows of all validation cases of a vertical study, each as the median case.

    Args:
        n_training: cases that train; where it is not known how many all have, those that validate are taken to be as many as
            in each of the other folds.
    """
    n = len(plans.patients) - n_training if plans.patients else round(n_training / (study.validation.folds - 1))
    return n_windows(study, plans) * n


def n_windows(study: Study, plans: Plans) -> int:
    """Windows of the median case in nnU-Net's sliding window, mirrored ones included."""
    plan = open_plan(plans.text, study.plan.configuration)
    patch = plan.patch_size
    shape = json.loads(plans.text)["original_median_shape_after_transp"]
    slices = round(shape[0]) if len(patch) < len(shape) else 1
    if study.preprocessing.name == "resize":
        positions = 1
    else:
        median = plan.configuration.median_image_size_in_voxels
        image = tuple(max(round(n), p) for n, p in zip(median, patch, strict=True))
        positions = math.prod(len(steps) for steps in compute_steps_for_sliding_window(image, patch, 0.5))
    own = network_of(study, plans)().mirror_axes
    axes = mirror_axes(plan) if own is None else own
    return slices * positions * (2 ** len(axes) if study.training.mirror else 1)
