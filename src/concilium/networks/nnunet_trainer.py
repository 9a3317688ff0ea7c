"""The network of an `nnUNetTrainer` or a subclass; and the trainer itself, by which `local_updates/nnunet_trainer.py` trains.

Isensee et al., nnU-Net, Nature Methods 18 (2021) 203-211.

A trainer's constructor makes folders, a log and a logger that may tell servers of others. For the length of the constructor
the names of its module that lead there are replaced, as `data/plan.py` does with the planner's: folders that are gone
afterwards, and a logger that keeps nothing. So it is not for two threads at once.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from concilium import catalog
from concilium.errors import StudyError
from concilium.networks import Stages, as_stages
from concilium.networks._plan import check_plan
from concilium.nnunet_parts import nnUNetTrainer, trainer_module

NAME = "nnunet_trainer"
"""Of this network, and of the local update."""
NEVER_CALLED = (
    "run_training", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end", "on_epoch_start",
    "on_epoch_end", "get_dataloaders", "get_tr_and_val_datasets", "do_split", "save_checkpoint", "load_checkpoint",
)  # fmt: skip
"""Methods whose place rounds, sites and snapshots take: what a subclass does there would not happen."""
CONFIGURATION = "planned"


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    trainer: str,
    base_features: int | None = None,
    deep_supervision: bool = True,
) -> Stages:
    """The trainer's network, as one stage with the axes that the trainer allows images to be mirrored along.

    Args:
        n_channels: channels of the image.
        n_labels: channels of the logits, background included.
        plan: one configuration, e.g. `plans["configurations"]["3d_fullres"]`, with what it inherits filled in.
        trainer: the class, `module:Class`.
        base_features: features at full resolution. Planning has used it already; here it is checked against the plan.
        deep_supervision: not used; the trainer decides it.

    Raises:
        StudyError: no such class, one that cannot be honoured, or it does not build a network from this plan.
    """
    check_plan(plan, base_features)
    names = {"background": 0} | {f"label {i}": i for i in range(1, n_labels)}
    about = {"labels": names, "channel_names": dict.fromkeys(map(str, range(n_channels)), "channel")}
    plans = {
        "dataset_name": "Dataset001_Concilium",
        "plans_name": "nnUNetPlans",
        "configurations": {CONFIGURATION: plan},
    }
    made = construct(trainer, plans, CONFIGURATION, about, torch.device("cpu"))
    with refused(trainer):
        settings = made.configuration_manager
        how: tuple[Any, ...] = (made.plans_manager, settings)
        if "plans_manager" not in inspect.signature(made.build_network_architecture).parameters:  # of older trainers
            how = (
                settings.network_arch_class_name,
                settings.network_arch_init_kwargs,
                settings.network_arch_init_kwargs_req_import,
            )
        network: nn.Module = made.build_network_architecture(*how, n_channels, n_labels, made.enable_deep_supervision)
        made.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        stages = as_stages(network)
        stages.mirror_axes = tuple(made.inference_allowed_mirroring_axes or ())
    return stages


def trainer_class(name: str) -> type[Any]:
    """The class behind `module:Class`.

    Raises:
        StudyError: there is none, or it replaces what is never called.
    """
    if ":" not in name:
        raise StudyError(f"Trainer {name!r} is not allowed. Expected `module:Class` of an installed module. Name one.")
    found: Any = catalog.load("local_updates", name)
    if not isinstance(found, type) or not issubclass(found, nnUNetTrainer):
        raise StudyError(f"{name} is no nnUNetTrainer. Allowed: that class, or a subclass of it. Name one.")
    replaced = [m for m in NEVER_CALLED if getattr(found, m, None) is not getattr(nnUNetTrainer, m, None)]
    if replaced:
        raise StudyError(
            f"{name} replaces {', '.join(replaced)}, which a federation never calls: rounds, sites and snapshots take their "
            "place. Allowed to replace: everything else, such as train_step, _build_loss, configure_optimizers, "
            "get_training_transforms. Move what it does there."
        )
    return found


def stock_name(name: str) -> str | None:
    """The name of nnU-Net's own class that builds the network of this trainer; `None` where it builds one of its own."""
    found: Any = trainer_class(name)
    build_network = found.build_network_architecture
    stock = (c for c in found.__mro__ if catalog.is_stock_trainer(c.__module__))
    return next((c.__name__ for c in stock if c.build_network_architecture is build_network), None)


def construct(
    trainer: str, plans: Mapping[str, Any], configuration: str, about: Mapping[str, Any], device: torch.device
) -> Any:
    """The trainer, not yet initialised. `about`: labels and channel_names, as in nnU-Net's dataset.json.

    Raises:
        StudyError: no such class, one that cannot be honoured, or it cannot be made.
    """
    found = trainer_class(trainer)
    own = json.loads(json.dumps(plans)) | {"continue_training": False}  # trainers write into their plans
    about = {"file_ending": ".nii.gz", "numTraining": 1, **about}
    with refused(trainer), _no_folders():
        made = found(plans=own, configuration=configuration, fold=0, dataset_json=about, device=device)
    if made.is_ddp or made.is_cascaded:
        raise StudyError(
            f"{trainer} would be {'distributed over processes' if made.is_ddp else 'the second of a cascade'}. Allowed is "
            "neither. Start the site outside torch.distributed, and choose 2d, 3d_fullres or 3d_lowres."
        )
    made.print_to_log_file = _silent
    made._do_i_compile = _never  # compiled networks have other names, and other bits
    made.num_iterations_per_epoch = 1  # a trainer counts epochs; here each is one step
    return made


def initialize(made: Any, trainer: str) -> None:
    """Give the trainer its network, loss, optimiser and schedule.

    Raises:
        StudyError: its own code fails.
    """
    with refused(trainer), _no_folders():
        made.initialize()
        made.set_deep_supervision_enabled(made.enable_deep_supervision)  # nnU-Net does so before its first epoch


@contextlib.contextmanager
def refused(trainer: str) -> Iterator[None]:
    """A block of the trainer's own code: in silence, and what it raises is told as an error of the study."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except StudyError:
        raise
    except Exception as e:  # somebody else's code
        raise StudyError(
            f"{trainer} cannot be used ({type(e).__name__}: {e}). Expected a trainer that nnU-Net can train with on this plan. "
            "Correct it, or choose another."
        ) from e


@dataclass(frozen=True)
class _Folder:
    """In place of one of nnU-Net's environment variables."""

    path: Path

    def is_set(self) -> bool:
        return True

    def __fspath__(self) -> str:
        return str(self.path)


class _KeepsNothing:
    """In place of nnU-Net's loggers."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def update_config(self, *_: Any, **__: Any) -> None: ...

    def log(self, *_: Any, **__: Any) -> None: ...


@contextlib.contextmanager
def _no_folders() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        replaced = {
            "nnUNet_results": _Folder(Path(folder) / "results"),
            "nnUNet_preprocessed": _Folder(Path(folder) / "preprocessed"),
            "MetaLogger": _KeepsNothing,
            "infer_dataset_class": _silent,  # it would look at a folder of cases
        }
        for name, value in replaced.items():
            stack.callback(setattr, trainer_module, name, getattr(trainer_module, name))
            setattr(trainer_module, name, value)
        yield


def _silent(*_: Any, **__: Any) -> None:
    return None


def _never() -> bool:
    return False
