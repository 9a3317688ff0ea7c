"""Trainers as users write them, for `[local_update] trainer = "trainers_elsewhere:NAME"`."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn


class Own(nnUNetTrainer):
    """Another network, of which a tensor has two names, a buffer, and a loss of one line."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.initial_lr = 0.1

    def build_network_architecture(  # type: ignore[override]  # not static: stock prediction could not call it
        self, plans_manager: Any, configuration_manager: Any, n_in: int, n_out: int, deep_supervision: bool = True
    ) -> nn.Module:
        conv = nn.Conv3d(n_in, 4, 3, padding=1)
        network = nn.Sequential(conv, nn.BatchNorm3d(4), nn.Conv3d(4, n_out, 1))
        network.add_module("again", nn.Identity())
        network.again.conv = conv
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        pass

    def _build_loss(self) -> Any:
        return lambda logits, target: nn.functional.cross_entropy(logits, target[:, 0].long())


class Runs(nnUNetTrainer):
    def run_training(self) -> None:
        pass


class Loads(nnUNetTrainer):
    def get_dataloaders(self) -> Any:
        pass


class Wants(nnUNetTrainer):
    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, more: int, device: torch.device
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)


class Breaks(nnUNetTrainer):
    def _build_loss(self) -> Any:
        raise ValueError("no licence")


class Averages(Own):
    """Keeps a moving average of its weights."""

    def train_step(self, batch: dict) -> dict:
        told = super().train_step(batch)
        self.ema = [p.detach().clone() for p in self.network.parameters()]
        return told


class Counts(Own):
    """Remembers its losses."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.seen: deque[float] = deque()

    def train_step(self, batch: dict) -> dict:
        told = super().train_step(batch)
        self.seen.append(float(told["loss"]))
        return told


class Hides(Own):
    """Its network has a buffer that is in no state dict."""

    def build_network_architecture(self, plans_manager: Any, *given: Any) -> nn.Module:  # type: ignore[override]
        network = super().build_network_architecture(plans_manager, *given)
        network.again.register_buffer("n", torch.zeros(1), persistent=False)
        return network

    def train_step(self, batch: dict) -> dict:
        self.network.again.n += 1
        return super().train_step(batch)


class Silent(Own):
    def train_step(self, batch: dict) -> dict:  # type: ignore[override]
        super().train_step(batch)
        return {}


class Plateau(Own):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.network.parameters(), 0.1)
        return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


class Recursive(Own):
    """A rate that is half of the one before."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.network.parameters(), 0.1)

        class Halves:
            def step(self, epoch: int) -> None:
                optimizer.param_groups[0]["lr"] /= 2

        return optimizer, Halves()


def function(**_: Any) -> None:
    pass
