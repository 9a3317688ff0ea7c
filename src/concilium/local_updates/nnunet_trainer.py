"""Training by an `nnUNetTrainer` or a subclass of it: its network, loss, augmentation, sampling, optimiser, schedule and step.

Isensee et al., nnU-Net, Nature Methods 18 (2021) 203-211. What is a trainer's and what is not: docs/stock-trainers.md.

Trainers count epochs. Here an epoch is one step, of as many as the model takes in all, so that the rate falls at every step. A
trainer lives as long as its model is in memory, which is less than a run: what it remembers between steps beyond weights,
the optimiser's state and the loss scale would be lost, so a trainer that does is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from concilium.data.augment import repeatable
from concilium.data.labels import Labels, to_nnunet
from concilium.data.patches import Batch, Batches
from concilium.data.plan import Plan
from concilium.data.preprocess import Prepared
from concilium.errors import ContractError, StudyError
from concilium.local_updates import Local
from concilium.networks import as_stages
from concilium.networks._plan import check_plan
from concilium.networks.nnunet_trainer import construct, initialize, refused

_KNOWN = {"network", "optimizer", "lr_scheduler", "grad_scaler", "current_epoch", "logger", "my_init_kwargs"}
"""What changes in a trainer with every step, or is its plan."""


def step(local: Local, batch: Batch, *, trainer: str) -> Tensor:
    """Take one step of the trainer's own; the loss before it.

    Raises:
        ContractError: what `bring` gave is not at hand.
    """
    if not isinstance(local.brought, Trainer):
        raise ContractError(f"{trainer} is not at hand. Expected in a step of its own model. Ask for `Train`.")
    return local.brought.step(batch.image, batch.labels)


def bring(*, plan: Plan, labels: Labels, channels: Sequence[str], device: torch.device, trainer: str) -> Trainer:
    """The trainer, with new weights.

    Raises:
        StudyError: no such class, one that cannot be honoured, or it cannot be used with this plan.
    """
    check_plan(plan.architecture)
    names = {str(i): name for i, name in enumerate(channels)}
    about = {**to_nnunet(labels), "channel_names": names}
    made = construct(trainer, plan.manager.plans, plan.configuration_name, about, device)
    initialize(made, trainer)
    return Trainer(trainer, made, plan, labels)


class Trainer:
    """A trainer that takes the steps of a model (`local_updates.Brought`)."""

    def __init__(self, name: str, made: Any, plan: Plan, labels: Labels) -> None:
        self.name = name
        self._made = made
        self._plan = plan
        self._labels = labels
        self._scaled = made._get_deep_supervision_scales() is not None
        self._begun = 0
        """Of how many steps in all the schedule is."""
        self._memory: dict[str, Any] = {}
        self._held: list[Any] = []
        self.network = as_stages(made.network)
        self.scaler: torch.amp.GradScaler | None = made.grad_scaler

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The trainer's own."""
        optimizer: torch.optim.Optimizer = self._made.optimizer
        return optimizer

    def batches(self, prepared: Mapping[str, Path | Prepared]) -> Batches:
        """Where the batches of these cases come from."""
        made, settings, rules = self._made, self._made.configuration_manager, self._made.label_manager
        with refused(self.name):
            rotation, flat, initial, axes = made.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            transforms = made.get_training_transforms(
                settings.patch_size,
                rotation,
                made._get_deep_supervision_scales(),
                axes,
                flat,
                use_mask_for_norm=settings.use_mask_for_norm,
                is_cascaded=False,
                foreground_labels=rules.foreground_labels,
                regions=rules.foreground_regions if rules.has_regions else None,
                ignore_label=rules.ignore_label,
            )
            return Batches(
                prepared,
                plan=self._plan,
                labels=self._labels,
                batch_size=made.batch_size,
                foreground=made.oversample_foreground_percent,
                augment=(repeatable(transforms), tuple(int(n) for n in initial)),
                probabilistic=made.probabilistic_oversampling,
            )

    def begin(self, *, total_steps: int) -> None:
        """Get ready for steps of a model that takes so many in all.

        Raises:
            StudyError: the rate is not a function of the step.
        """
        if self._begun != total_steps:
            self._made.num_epochs = total_steps
            with refused(self.name):
                if not self._is_repeatable():
                    raise StudyError(
                        f"{self.name} has a learning rate that depends on the steps before, which a snapshot does not hold. "
                        "Allowed: one that follows from the number of the step, as that of nnU-Net. Choose another schedule."
                    )
                state = self.optimizer.state_dict()["state"]
                self._made.optimizer, self._made.lr_scheduler = self._made.configure_optimizers()
                self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
            self._begun = total_steps
        self._held = []
        self._memory = self._remembered(self._held)

    def set_rate(self, step: int) -> None:
        """Give the optimiser the rate of this step."""
        self._made.current_epoch = step
        with refused(self.name):
            self._made.lr_scheduler.step(step)

    def step(self, image: Tensor, labels: Sequence[Tensor]) -> Tensor:
        """Take a step; the loss before it."""
        target = list(labels) if self._scaled else labels[0]
        told = self._made.train_step({"data": image, "target": target})
        if not isinstance(told, Mapping) or "loss" not in told:
            raise ContractError(f"{self.name}'s train_step told no loss. Expected {{'loss': number}}. Return it.")
        return torch.as_tensor(np.asarray(told["loss"], dtype=np.float64)).mean()

    def end(self) -> None:
        """Check that nothing else than what a snapshot holds has changed since `begin`.

        Raises:
            StudyError: something has.
        """
        after = self._remembered([])
        changed = sorted(n for n in {**after, **self._memory} if after.get(n) != self._memory.get(n))
        if changed:
            raise StudyError(
                f"{self.name} remembers {', '.join(changed)} between steps, which a snapshot does not hold. Allowed: weights, "
                "optimiser and loss scale. Choose another trainer."
            )

    def _is_repeatable(self) -> bool:
        """Whether the rates of a step are the same with and without the steps before it."""
        last = min(2, self._made.num_epochs - 1)
        rates = []
        for steps in (range(last + 1), (last,)):
            optimizer, scheduler = self._made.configure_optimizers()
            if isinstance(scheduler, ReduceLROnPlateau):
                return False
            for number in steps:
                scheduler.step(number)
            rates.append([group["lr"] for group in optimizer.param_groups])
        return rates[0] == rates[1]

    def _remembered(self, held: list[Any]) -> dict[str, Any]:
        """What the trainer holds beside what a snapshot holds, so that two of these can be compared."""
        network: nn.Module = self._made.network
        kept = network.state_dict(keep_vars=True)
        hidden = {f"network.{n}": _state(t, held) for n, t in network.named_buffers() if n not in kept}
        groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        own = {n: _state(v, held) for n, v in vars(self._made).items() if n not in _KNOWN}
        return own | hidden | {"optimizer.param_groups": _state(groups, held)}


def _state(value: Any, held: list[Any]) -> Any:
    """Something that differs if the value has changed: of tensors how often they were written into, of objects which one.

    What is told apart by its `id` is added to `held`: while it is there, nothing else can have the same.
    """
    match value:
        case Tensor():
            held.append(value)
            return id(value), value._version
        case nn.Module():
            held.append(value)
            return id(value), [_state(t, held) for t in (*value.parameters(), *value.buffers())]
        case np.ndarray():
            return value.shape, value.tobytes()
        case Mapping():
            return {str(k): _state(v, held) for k, v in value.items()}
        case list() | tuple():
            return [_state(v, held) for v in value]
    if hasattr(value, "__dict__"):
        held.append(value)
        return id(value)
    return repr(value)
