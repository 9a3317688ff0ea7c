"""A MONAI bundle: `configs`, `models/model.pt`, `docs`, and `scripts` with the steps around the network.

The network is named by its class in nnU-Net's network package, so that running the bundle needs neither Concilium nor nnunetv2.
MONAI reads and writes the images; between both stands nnU-Net's arithmetic (`scripts`), since MONAI's own transforms give other
label maps. Bundle specification: docs.monai.io/en/stable/mb_specification.html.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from concilium.data.labels import IGNORE, foreground, ids_of, n_heads
from concilium.exports import comparison, refuse_other_networks, write_json
from concilium.exports._sidecar import sidecar
from concilium.exports._torch_file import write_torch_file
from concilium.finished import Finished
from concilium.networks.nnunet import to_library

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_NEEDED = {
    "dynamic_network_architectures": "0.4",
    "fire": "0.7",
    "nibabel": "5",
    "pytorch-ignite": "0.5",
    "scipy": "1.13",
}
"""Beside MONAI itself: releases that the tests run, or later."""


def export(finished: Finished, out: Path, *, card: str, intended_use: str) -> str:
    """Write the bundle.

    Raises:
        StudyError: the network is not nnU-Net's, or the plan cannot be described.
    """
    refuse_other_networks(finished, "monai")
    write_json(out / "configs" / "preprocessing.json", sidecar(finished, ["models/model.pt"]))
    write_json(out / "configs" / "metadata.json", _metadata(finished, intended_use))
    write_json(out / "configs" / "inference.json", _inference(finished))
    write_torch_file(out / "models" / "model.pt", _state(finished))
    (out / "docs").mkdir()
    (out / "docs" / "README.md").write_text(card, encoding="utf-8")
    (out / "scripts").mkdir()
    (out / "scripts" / "__init__.py").write_text('"""The steps of this bundle."""\n\nfrom . import transforms\n')
    for name, copied in {"_steps.py": "_steps.py", "_monai_transforms.py": "transforms.py"}.items():
        shutil.copyfile(Path(__file__).with_name(name), out / "scripts" / copied)
    return (
        "(cd {out} && python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES "
        "--output_dir SEGMENTATIONS)"
    ) + comparison(finished)


def _state(finished: Finished) -> dict[str, Tensor]:
    """The network's tensors; those of several members stand under `networks.0.`, `networks.1.`, ..."""
    several = len(finished.files) > 1
    state: dict[str, Tensor] = {}
    for i, weights in enumerate(finished.weights()):
        named = to_library(
            weights,
            plan=finished.plan.architecture,
            n_channels=len(finished.channels),
            n_labels=n_heads(finished.labels),
        )
        state |= {f"networks.{i}.{name}" if several else name: tensor for name, tensor in named.items()}
    return state


def _network(finished: Finished) -> dict[str, Any]:
    architecture = finished.plan.architecture["architecture"]
    arguments = dict(architecture["arch_kwargs"])
    imported = {k: f"${arguments[k]}" for k in architecture["_kw_requires_import"] if arguments.get(k) is not None}
    one = {
        "_target_": architecture["network_class_name"],
        "input_channels": len(finished.channels),
        "num_classes": n_heads(finished.labels),
        **arguments,
        **imported,
        "deep_supervision": False,
    }
    if len(finished.files) == 1:
        return one
    return {"_target_": "scripts.transforms.Members", "networks": [one for _ in finished.files]}


def _inference(finished: Finished) -> dict[str, Any]:
    return {
        "imports": ["$import json", "$import torch", "$import scripts"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/segmentations'",
        "about": "$json.load(open(@bundle_root + '/configs/preprocessing.json'))",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": _network(finished),
        "network": "$@network_def.to(@device)",
        **_transforms(finished),
        "datalist": "$scripts.transforms.list_cases(@dataset_dir, @about)",
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
                "strict": True,
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def _transforms(finished: Finished) -> dict[str, Any]:
    """From file to network, over the image, and from logits to file."""

    def step(name: str) -> dict[str, Any]:
        return {"_target_": f"scripts.transforms.{name}", "_mode_": "callable", "about": "@about"}

    load = {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True, "dtype": "$np.float32"}
    save = {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "output_ext": finished.file_ending,
        "output_postfix": "",
        "output_dtype": "$np.dtype(@about['label_type'])",
        "separate_folder": False,
        "resample": False,
    }
    return {
        "preprocessing": {"_target_": "Compose", "transforms": [load, step("prepare")]},
        "inferer": step("infer"),
        "postprocessing": {"_target_": "Compose", "transforms": [step("finish"), save]},
    }


def _metadata(finished: Finished, intended_use: str) -> dict[str, Any]:
    n, patch = len(finished.plan.patch_size), list(finished.plan.patch_size)
    labels = {ids_of(value)[0]: name for name, value in finished.labels.items() if name != IGNORE}
    tensor = {"spatial_shape": patch, "dtype": "float32", "value_range": [], "is_patch_data": True}
    name = f"{finished.study.study.name}: {finished.name}"
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by Concilium"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": _NEEDED,
        "name": name,
        "task": f"Segmentation of {', '.join(foreground(finished.labels))} in {n}D images",
        "description": f"{name}, trained between {len(finished.study.sites)} sites. Research software, not a medical device. "
        "The figures and how they were found: docs/README.md.",
        "authors": "Not stated",
        "copyright": "Not stated",
        "intended_use": intended_use,
        "network_data_format": {
            "inputs": {"image": _tensor(tensor, "magnitude", dict(enumerate(finished.channels)))},
            "outputs": {"pred": _tensor({**tensor, "dtype": "float32"}, "labels", labels)},
        },
    }


def _tensor(about: Mapping[str, Any], format: str, channels: Mapping[Any, str]) -> dict[str, Any]:
    named = {str(i): name for i, name in channels.items()}
    return {"type": "image", "format": format, "num_channels": len(named), **about, "channel_def": named}
