"""A model folder as nnU-Net writes it, for stock `nnUNetv2_predict_from_modelfolder`: one `fold_X` per member.

The weights stand under all of nnU-Net's names. Optimiser and history are not part of it: nnU-Net can predict with the folder and
start other trainings from it (`-pretrained_weights`), and cannot resume this one. Where a trainer trained, the name written
is that of nnU-Net's own class that builds the same network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from concilium.catalog import TRAINER as TRAINER_OPTION
from concilium.data._resize import resizes
from concilium.data.fingerprint import from_json, to_nnunet
from concilium.data.labels import n_heads
from concilium.errors import StudyError
from concilium.exports import (
    comparison,
    dataset_description,
    members,
    refuse_other_networks,
    write_json,
)
from concilium.exports._torch_file import write_torch_file
from concilium.finished import Finished
from concilium.networks import Whole
from concilium.networks.nnunet import to_library
from concilium.networks.nnunet_trainer import NAME, stock_name

TRAINER = "nnUNetTrainer"


def export(finished: Finished, out: Path, *, card: str, intended_use: str) -> str:
    """Write `dataset.json`, `plans.json`, `dataset_fingerprint.json` and `fold_X/checkpoint_final.pth`.

    Raises:
        StudyError: the network is not nnU-Net's, or the study resizes its images.
    """
    trainer = _trainer_name(finished)
    _refuse_resizing(finished)
    description, plans = dataset_description(finished), json.loads(finished.plans)
    write_json(out / "dataset.json", description)
    write_json(out / "plans.json", plans)
    fingerprint = finished.run / "fingerprint.json"
    if fingerprint.is_file():
        write_json(out / "dataset_fingerprint.json", to_nnunet(from_json(fingerprint.read_text(encoding="utf-8"))))
    configuration = finished.study.plan.configuration
    folds = members(finished)
    for fold, weights in zip(folds, _weights(finished), strict=True):
        checkpoint = {
            "network_weights": weights,
            "optimizer_state": None,
            "grad_scaler_state": None,
            "logging": {},
            "_best_ema": None,
            "current_epoch": finished.study.protocol.rounds,
            "init_args": {"plans": plans, "configuration": configuration, "fold": fold, "dataset_json": description},
            "trainer_name": trainer,
            # None, not an empty tuple: nnU-Net takes the largest of these axes
            "inference_allowed_mirroring_axes": finished.mirror_axes or None,
        }
        write_torch_file(out / f"fold_{fold}" / "checkpoint_final.pth", checkpoint)
    named = " ".join(map(str, folds))
    return f"nnUNetv2_predict_from_modelfolder -i IMAGES -o SEGMENTATIONS -m {{out}} -f {named}" + comparison(finished)


def _refuse_resizing(finished: Finished) -> None:
    """nnU-Net always crops, resamples and normalises by the plan.

    Raises:
        StudyError: the study resizes its images.
    """
    if resizes(finished.plan):
        raise StudyError(
            f"{finished.name} with [preprocessing] name = 'resize' cannot be exported as nnunet: nnU-Net's own prediction crops, "
            "resamples and normalises, and knows no other way. Allowed there: 'nnunet'. Export it as onnx, monai or safetensors."
        )


def _trainer_name(finished: Finished) -> str:
    """The name by which nnU-Net finds what builds the network.

    Raises:
        StudyError: it is another network, or a trainer from outside builds it.
    """
    trainer = _trainer(finished)
    if trainer is None:
        refuse_other_networks(finished, "nnunet")
        return TRAINER
    name = stock_name(trainer)
    if name is None:
        raise StudyError(
            f"{trainer} builds a network of its own and cannot be exported as nnunet: nnU-Net has no such trainer. Allowed: "
            "a network that one of nnU-Net's own trainers builds. Export it as onnx or safetensors."
        )
    return name


def _weights(finished: Finished) -> Iterator[Mapping[str, Tensor]]:
    """The weights of each member, under all of nnU-Net's names."""
    if _trainer(finished) is not None:
        for network in finished.networks():
            yield cast(Whole, network["whole"]).network.state_dict()
        return
    for weights in finished.weights():
        yield to_library(
            weights,
            plan=finished.plan.architecture,
            n_channels=len(finished.channels),
            n_labels=n_heads(finished.labels),
        )


def _trainer(finished: Finished) -> str | None:
    """The trainer whose network it is, if it is one's."""
    network = finished.study.network
    return str(network.options[TRAINER_OPTION]) if network.name == NAME else None
