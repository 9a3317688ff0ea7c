"""Fingerprint -> plan, by nnU-Net's own planners.

Sources: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z; residual presets: Isensee et al. 2024, arXiv:2404.09556.

The planners read and write folders named by environment variables. They get two temporary ones, and the names of their module
are replaced for the length of one call, here and nowhere else; so planning is not for two threads at once. No image is
needed. Networks are built without memory on PyTorch's `meta` device, so planning is quick and draws no random number.

Deviation from nnU-Net: its residual presets may put the whole data set into one batch (1618 slices of hippocampus in 2D). Here
the batch is capped, as with its default planner, at 5 % of the data set's voxels.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from concilium.data._description import FLAT
from concilium.data._reading import reader_name
from concilium.data._resize import write_settings
from concilium.data.fingerprint import to_nnunet
from concilium.data.labels import Labels
from concilium.data.labels import to_nnunet as labels_to_nnunet
from concilium.errors import ContractError, DataError, StudyError
from concilium.messages import Fingerprint
from concilium.nnunet_parts import (
    ExperimentPlanner,
    PlansManager,
    default_experiment_planner,
    get_pool_and_conv_props,
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
PLANNERS: Mapping[str, Any] = {
    "default": ExperimentPlanner,
    "resenc_m": nnUNetPlannerResEncM,
    "resenc_l": nnUNetPlannerResEncL,
    "resenc_xl": nnUNetPlannerResEncXL,
}
DATASET_NAME = "Dataset001_Concilium"

_LARGEST_SHARE = 0.05
"""Of the data set's voxels in one batch: the default planner's rule."""
_TRUSTED = ("torch.nn.", "dynamic_network_architectures.")


@dataclass(frozen=True)
class Plan:
    """One configuration of an opened plan. Sizes [voxels] and spacing [mm] are along the plan's (transposed) axes."""

    configuration_name: str
    manager: Any
    """nnU-Net's `PlansManager`."""
    configuration: Any
    """nnU-Net's `ConfigurationManager`, inheritance resolved."""
    architecture: Mapping[str, Any]
    """The configuration as a mapping, inheritance resolved: what `networks` take as `plan` (class under `architecture`)."""
    patch_size: tuple[int, ...]
    batch_size: int
    spacing: tuple[float, ...]
    strides: tuple[tuple[int, ...], ...]
    """Of each stage, per axis; the first are 1."""
    batch_dice: bool
    transpose_forward: tuple[int, ...]


def make_plans(  # noqa: PLR0913  (options of the study)
    fingerprint: Fingerprint,
    *,
    channels: Sequence[str],
    labels: Labels,
    file_ending: str,
    configuration: str,
    planner: str = "default",
    memory_gb: float | None = None,
    base_features: int | None = None,
    batch_size: int | None = None,
    patch_size: tuple[int, ...] | None = None,
    resize: Mapping[str, Any] | None = None,
) -> str:
    """The plan as JSON in nnU-Net's own format (`plans.json`): the same text for the same arguments.

    Args:
        fingerprint: of all sites together. Its number of cases takes the place of `numTraining`.
        labels: with background.
        configuration: which one `batch_size` and `patch_size` are for; it must exist.
        planner: one of `PLANNERS`.
        memory_gb: GPU memory to plan for; omitted, the planner's own (8, 8, 24, 40). Never that of a site.
        base_features: channels at full resolution (nnU-Net: 32). Narrower networks get larger patches or batches.
        batch_size: replaces the plan's.
        patch_size: replaces the plan's, along its axes; pooling and kernels follow nnU-Net's rule, the batch size does not
            change.
        resize: every image at `size`, scaled as `intensity` says (see `_resize`), as one patch.

    Raises:
        StudyError: an argument is not allowed, or this configuration does not exist for these data; says which do.
        DataError: no case has foreground, or the images are flat along an axis that nnU-Net does not take for the slices'.
    """
    _check(configuration, planner, memory_gb=memory_gb, base_features=base_features, batch_size=batch_size)
    flat = all(g.spacing == FLAT for g in fingerprint.geometry)
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        **labels_to_nnunet(labels),
        "numTraining": fingerprint.n_cases,
        "file_ending": file_ending,
        "overwrite_image_reader_writer": reader_name(file_ending, flat=flat),
        # asked for, never opened
        "dataset": {"case": {"images": [f"case_0000{file_ending}"], "label": f"case{file_ending}"}},
    }
    options = {} if memory_gb is None else {"gpu_memory_target_in_gb": memory_gb}
    with _folders(description, to_nnunet(fingerprint)):
        planning = PLANNERS[planner](DATASET_NAME, **options)
        planning.max_dataset_covered = _LARGEST_SHARE
        if base_features is not None:
            planning.UNet_base_num_features = base_features
        plans = planning.plan_experiment()
    plan = _chosen(plans["configurations"], configuration)
    _check_flat(plan)
    if resize is not None:
        write_settings(plans, configuration, resize)
        patch_size = tuple(resize["size"])
    if patch_size is not None:
        _set_patch_size(plan, tuple(patch_size), planning)
    if batch_size is not None:
        plan["batch_size"] = batch_size
    return json.dumps(plans, indent=2, allow_nan=False)


def open_plan(plans_json: str, configuration: str) -> Plan:
    """One configuration of a plan written by `make_plans` or by nnU-Net.

    Raises:
        ContractError: no plan, or one that names code outside PyTorch's and nnU-Net's layers (it would be imported and run).
        StudyError: the configuration is not in it.
    """
    try:
        plans = json.loads(plans_json)
        names = list(plans["configurations"])
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ContractError(f"A plan cannot be read ({e!r}). Expected nnU-Net's plans.json. Make it again.") from e
    if configuration not in names:
        raise StudyError(
            f"Configuration {configuration!r} is not in the plan. There are: {', '.join(names)}. Choose one of them in [plan]."
        )
    manager = PlansManager(plans)
    try:
        opened = manager.get_configuration(configuration)
        settings = opened.configuration
        network = settings["architecture"]
        arguments = network["arch_kwargs"]
        _check_names([network["network_class_name"], *(arguments[key] for key in network["_kw_requires_import"])])
        return Plan(
            configuration_name=configuration,
            manager=manager,
            configuration=opened,
            architecture=settings,
            patch_size=tuple(int(n) for n in settings["patch_size"]),
            batch_size=int(settings["batch_size"]),
            spacing=tuple(float(s) for s in settings["spacing"]),
            strides=tuple(tuple(int(n) for n in stride) for stride in arguments["strides"]),
            batch_dice=bool(settings["batch_dice"]),
            transpose_forward=tuple(int(i) for i in plans["transpose_forward"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise ContractError(
            f"Configuration {configuration} cannot be used ({e!r}). Expected nnU-Net's plans.json. Make it again."
        ) from e


# ----------------------------------------------------------------------------------------------------------- arguments


def _check(configuration: str, planner: str, **numbers: float | None) -> None:
    if configuration == "3d_cascade_fullres":
        raise StudyError(
            "Configuration '3d_cascade_fullres' trains on another network's predictions, which is not federated yet. "
            f"Allowed are: {', '.join(CONFIGURATIONS)}. Choose 3d_fullres or 3d_lowres."
        )
    if configuration not in CONFIGURATIONS:
        raise StudyError(
            f"Configuration {configuration!r} is unknown. Allowed are: {', '.join(CONFIGURATIONS)}. Choose one."
        )
    if planner not in PLANNERS:
        raise StudyError(f"Planner {planner!r} is unknown. Allowed are: {', '.join(PLANNERS)}. Choose one.")
    for name, number in numbers.items():
        if number is not None and not 0 < number < float("inf"):
            raise StudyError(
                f"{name} is {number}. Allowed is a number above 0. Correct it, or omit it for the plan's own."
            )


def _check_flat(plan: Mapping[str, Any]) -> None:
    """nnU-Net takes the axis of the largest spacing for that of the slices; one that is a single voxel must be it."""
    size = [round(n) for n in plan["median_image_size_in_voxels"]]
    if 1 in size:
        raise DataError(
            f"The images are a single voxel thick, but not along the axis of their largest spacing (median size {size}). nnU-Net "
            "takes that axis for the slices'. Give the thin axis a spacing [mm] above the others, or save the images as 2D."
        )


def _chosen(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    if name in configurations:
        chosen: dict[str, Any] = configurations[name]
        return chosen
    existing = [n for n in configurations if n in CONFIGURATIONS]
    reason = (
        "a patch of 3d_fullres already covers the images well enough"
        if "3d_fullres" in configurations
        else "the images are two-dimensional"
    )
    raise StudyError(
        f"Configuration {name!r} does not exist for these data: {reason}. There are: {', '.join(existing)}. Choose one."
    )


def _check_names(names: Sequence[object]) -> None:
    """nnU-Net imports whatever a plan names; a plan comes from outside the site."""
    for name in names:
        if name is not None and not (isinstance(name, str) and name.startswith(_TRUSTED)):
            raise ContractError(
                f"A plan names {name!r}. Allowed is what begins with {' or '.join(_TRUSTED)}. Do not use this plan."
            )


# ------------------------------------------------------------------------------------------------------------ planning


@contextlib.contextmanager
def _folders(description: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> Iterator[None]:
    """Where nnU-Net's planners find a data set of this description: two folders that are gone afterwards."""
    module = default_experiment_planner
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        places = {name: Path(folder) / name / DATASET_NAME for name in ("raw", "preprocessed")}
        for place in places.values():
            place.mkdir(parents=True)
        (places["raw"] / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
        (places["preprocessed"] / "dataset_fingerprint.json").write_text(json.dumps(fingerprint), encoding="utf-8")
        replaced = {
            "nnUNet_raw": str(places["raw"].parent),
            "nnUNet_preprocessed": str(places["preprocessed"].parent),
            "get_allowed_n_proc_DA": torch.get_num_threads,  # it starts a process to learn the host's name
        }
        for name, value in replaced.items():
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # residual presets warn of any other memory
        stack.enter_context(torch.device("meta"))
        yield


def _set_patch_size(plan: dict[str, Any], patch_size: tuple[int, ...], planning: Any) -> None:
    """Give the configuration this patch, and the pooling, kernels and widths that nnU-Net's rule derives from it."""
    spacing = plan["spacing"]
    if len(patch_size) != len(spacing) or any(n < 1 for n in patch_size):
        raise StudyError(
            f"patch_size is {patch_size}. Allowed are {len(spacing)} numbers above 0, like {tuple(plan['patch_size'])}. "
            "Correct it, or omit it."
        )

    def topology(size: tuple[int, ...]) -> tuple[Any, Any, tuple[int, ...]]:
        _, strides, kernels, padded, _ = get_pool_and_conv_props(
            spacing, size, planning.UNet_featuremap_min_edge_length, 999999
        )
        return strides, kernels, tuple(int(n) for n in padded)

    strides, kernels, padded = topology(patch_size)
    if padded != patch_size:
        while topology(padded)[2] != padded:
            padded = topology(padded)[2]
        raise StudyError(
            f"patch_size {patch_size} does not halve as often as the network does. The next size that does is {padded}. Use it."
        )
    if len(strides) < 2:
        raise StudyError(
            f"patch_size {patch_size} leaves nothing to pool. Allowed is 8 or more along two axes. Enlarge it."
        )
    n = len(strides)
    most = planning.UNet_max_features_2d if len(spacing) == 2 else planning.UNet_max_features_3d
    arguments = plan["architecture"]["arch_kwargs"]
    per_stage = "n_blocks_per_stage" if "n_blocks_per_stage" in arguments else "n_conv_per_stage"
    arguments.update(
        n_stages=n,
        features_per_stage=[min(most, planning.UNet_base_num_features * 2**i) for i in range(n)],
        kernel_sizes=kernels,
        strides=strides,
        n_conv_per_stage_decoder=planning.UNet_blocks_per_stage_decoder[: n - 1],
    )
    arguments[per_stage] = planning.UNet_blocks_per_stage_encoder[:n]
    plan["patch_size"] = list(patch_size)
