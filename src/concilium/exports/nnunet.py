"""A model folder as nnU-Net writes it, for stock `nnUNetv2_predict_from_modelfolder`: one `fold_X` per member.

The weights stand under all of nnU-Net's names. Optimiser and history are not part of it: nnU-Net can predict with the folder and
start other trainings from it (`-pretrained_weights`), and cannot resume this one.
"""

from __future__ import annotations

import json
from pathlib import Path

from concilium.data.augment import mirror_axes
from concilium.data.fingerprint import from_json, to_nnunet
from concilium.data.labels import n_heads
from concilium.exports import (
    dataset_description,
    members,
    refuse_other_networks,
    refuse_other_preprocessing,
    write_json,
)
from concilium.exports._torch_file import write_torch_file
from concilium.finished import Finished
from concilium.networks.nnunet import to_library

TRAINER = "nnUNetTrainer"


def export(finished: Finished, out: Path, *, card: str, intended_use: str) -> str:
    """Write `dataset.json`, `plans.json`, `dataset_fingerprint.json` and `fold_X/checkpoint_final.pth`.

    Raises:
        StudyError: the network is not nnU-Net's.
    """
    refuse_other_networks(finished, "nnunet")
    refuse_other_preprocessing(finished, "nnunet")
    description, plans = dataset_description(finished), json.loads(finished.plans)
    write_json(out / "dataset.json", description)
    write_json(out / "plans.json", plans)
    fingerprint = finished.run / "fingerprint.json"
    if fingerprint.is_file():
        write_json(out / "dataset_fingerprint.json", to_nnunet(from_json(fingerprint.read_text(encoding="utf-8"))))
    configuration = finished.study.plan.configuration
    folds = members(finished)
    for fold, weights in zip(folds, finished.weights(), strict=True):
        named = to_library(
            weights,
            plan=finished.plan.architecture,
            n_channels=len(finished.channels),
            n_labels=n_heads(finished.labels),
        )
        checkpoint = {
            "network_weights": named,
            "optimizer_state": None,
            "grad_scaler_state": None,
            "logging": {},
            "_best_ema": None,
            "current_epoch": finished.study.protocol.rounds,
            "init_args": {"plans": plans, "configuration": configuration, "fold": fold, "dataset_json": description},
            "trainer_name": TRAINER,
            # None, not an empty tuple: nnU-Net takes the largest of these axes
            "inference_allowed_mirroring_axes": mirror_axes(finished.plan) if finished.study.training.mirror else None,
        }
        write_torch_file(out / f"fold_{fold}" / "checkpoint_final.pth", checkpoint)
    return f"nnUNetv2_predict_from_modelfolder -i IMAGES -o SEGMENTATIONS -m {{out}} -f {' '.join(map(str, folds))}"
