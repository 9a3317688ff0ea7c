"""A study whose sites train by nnU-Net's trainers: its network is the trainer's, and what the trainer decides it may not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from concilium.catalog import TRAINER, fill
from concilium.errors import StudyError
from concilium.messages import PlugIn
from concilium.networks.nnunet_trainer import NAME, trainer_class
from concilium.study.tables import Study, TrainingTable

_DECIDED = (
    "optimizer", "learning_rate", "weight_decay", "momentum", "precision", "foreground", "augmentation", "clip_norm",
    "deep_supervision", "views",
)  # fmt: skip
"""Keys of [training] that a trainer decides."""
_RESOLVED = {"learning_rate": 0.01}
"""What the file in a run folder says where the study said nothing."""


def network_of_trainer(
    network: Mapping[str, Any], local_update: Mapping[str, Any], problems: list[str]
) -> Mapping[str, Any]:
    """The table of the network, with that of the trainer in it where the study trains by one."""
    if local_update.get("name") != NAME or TRAINER not in local_update:
        return network
    own = {"name": NAME, TRAINER: local_update[TRAINER]}
    for key, value in own.items():
        given = network.get(key, value)
        if given != value and (key, given) != ("name", "nnunet"):
            problems.append(
                f"[network] {key} = {given!r} is not allowed with [local_update] name = {NAME!r}: the network is the trainer's. "
                f"Allowed: {value!r}, or none. Leave it out."
            )
    return {**network, **own}


def overruled(found: Mapping[str, Any]) -> list[str]:
    """What a study of a trainer says that the trainer decides, and what is wrong with the trainer."""
    update, training = found["local_update"], found["training"]
    if update.name != NAME or TRAINER not in update.options:
        return []
    problems = []
    try:
        trainer_class(update.options[TRAINER])
    except StudyError as e:
        problems.append(f"[local_update] {TRAINER} = {update.options[TRAINER]!r} is not allowed. {e}")
    text = "{} is not allowed with [local_update] name = {!r}: the trainer decides it. Leave it out, or change the trainer."
    for key in _DECIDED if training else ():
        default = getattr(TrainingTable, key)
        if (given := getattr(training, key)) not in (default, _RESOLVED.get(key, default)):
            problems.append(text.format(f"[training] {key} = {given!r}", NAME))
    loss = Study.loss.name
    if found["loss"] != PlugIn(loss, fill("losses", loss, {}, "[loss]")[0]):
        problems.append(text.format(f"[loss] name = {found['loss'].name!r}", NAME))
    return problems
