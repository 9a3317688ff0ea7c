"""Finished runs without training: a plan made from real or made-up cases, and weights as they are drawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from concilium.data.dataset import Dataset, open_dataset, read_case
from concilium.data.fingerprint import fingerprint_of_case, merge, to_json
from concilium.data.labels import from_nnunet, ids_of, n_heads, to_nnunet
from concilium.data.plan import make_plans, open_plan
from concilium.finished import Finished, open_finished
from concilium.networks import make_network
from concilium.results import SCALES
from concilium.statistics import summarize
from concilium.study import Study, parse_study, to_toml
from concilium.wire import write_tensors

Edit = Callable[[dict[str, Any]], None]

REGIONS = {"labels": {"background": 0, "whole": [1, 2], "back": 2}, "regions_class_order": [1, 2]}
IGNORE = {"labels": {"background": 0, "front": 1, "back": 2, "ignore": 3}}
BOTH = {"labels": {"background": 0, "whole": [1, 2], "back": 2, "ignore": 3}, "regions_class_order": [1, 2]}
"""Other label spaces of the volumes, as a `dataset.json` says them."""
REAL: list[tuple[str, str, dict[str, Any] | None]] = [
    ("hippocampus", "3d_fullres", None),
    ("polyps", "2d", None),
    ("polyps", "2d", {"size": (128, 160), "intensity": "0-1"}),
]
"""Federation, configuration and, where images are resized, how: real cases to compare on."""


def make_run(
    folder: Path,
    data: Path,
    *,
    configuration: str = "3d_fullres",
    network: dict[str, Any] | None = None,
    patch: list[int] | None = None,
    n_cases: int = 3,
    edit: Edit | None = None,
    resize: dict[str, Any] | None = None,
    labels: dict[str, Any] | None = None,
    **training: Any,
) -> Path:
    """A run folder of one site; `edit` changes the plan's configuration, keyword arguments the study's `[training]`.

    `resize`: `size` and `intensity`, in place of nnU-Net's preprocessing. `labels`: what a `dataset.json` says of them, in
    place of the data's own.
    """
    study = parse_study(
        {
            "study": {"name": "small", "seed": 1},
            "sites": {"north": {"data": str(data)}},
            "protocol": {"rounds": 2, "steps": 2, "min_sites": 1},
            "plan": {"configuration": configuration},
            "network": network or {"base_features": 4},
            "training": {"batch_size": 2, "mirror": False} | ({"patch_size": patch} if patch else {}) | training,
            "engine": {"threads": 1, "device": "cpu"},
        }
        | ({"preprocessing": {"name": "resize", **resize}} if resize else {}),
        folder=folder,
    )
    dataset = open_dataset(data)
    if labels is not None:
        dataset = dataclasses.replace(dataset, labels=from_nnunet(labels))
    parts = []
    for case in dataset.cases[:n_cases]:
        image, label, properties = read_case(case, dataset)
        parts.append(fingerprint_of_case(image, label, properties["spacing"], exact_geometry=False))
    merged = merge(parts)
    plans = json.loads(
        make_plans(
            merged, channels=dataset.channels, labels=dataset.labels, file_ending=dataset.file_ending,
            configuration=configuration, base_features=study.network.options.get("base_features"),
            batch_size=2, patch_size=study.training.patch_size, resize=resize,
        )
    )  # fmt: skip
    if edit is not None:
        edit(plans)
    _write(folder, study, dataset, json.dumps(plans), to_json(merged))
    write_tensors(folder / "weights" / "federated.safetensors", drawn(folder, seed=0), {"model": "federated"})
    return folder


def drawn(run: Path, *, seed: int) -> dict[str, torch.Tensor]:
    """Weights of the run's network, spread wide enough that the labels of a random network are not all the same."""
    finished = dataclasses.replace(open_finished_without_weights(run))
    torch.manual_seed(seed)
    network = make_network(
        finished.study.network, n_channels=len(finished.channels), n_labels=n_heads(finished.labels),
        plan=finished.plan.architecture, deep_supervision=finished.study.training.deep_supervision,
    )  # fmt: skip
    weights = {k: v + 0.2 * torch.randn_like(v) for k, v in network.state_dict().items()}
    for name, tensor in weights.items():
        if name.startswith("head") and tensor.ndim > 1:
            weights[name] = tensor - tensor.mean(1, keepdim=True)  # what all features share decides nothing
    return weights


def open_finished_without_weights(run: Path) -> Finished:
    place = run / "weights" / "federated.safetensors"
    if not place.is_file():
        write_tensors(place, {"a": torch.zeros(1)}, {})
    return open_finished(run)


def two_members(run: Path) -> Finished:
    """The run's model with a second member beside the first."""
    other = run / "weights" / "other.safetensors"
    write_tensors(other, drawn(run, seed=1), {})
    finished = open_finished(run)
    return dataclasses.replace(finished, files=(*finished.files, other))


def _write(folder: Path, study: Study, dataset: Dataset, plans: str, fingerprint: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.toml").write_text(to_toml(study))
    (folder / "plans.json").write_text(plans)
    (folder / "fingerprint.json").write_text(fingerprint)
    open_plan(plans, study.plan.configuration)
    about = {
        "channel_names": {str(i): c for i, c in enumerate(dataset.channels)},
        **to_nnunet(dataset.labels),
        "file_ending": dataset.file_ending,
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    (folder / "results.json").write_text(json.dumps(results(dataset)))
    line = {"model": "federated", "round": 1, "sites": {"north": {"n_cases": 17, "n_steps": 2}}}
    (folder / "rounds.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line)[:30])  # killed while it wrote
    session = {"concilium": "0.1", "python": "3.11", "gpu": None, "packages": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps({"run": "0", "sessions": [session]}))


def results(dataset: Dataset) -> dict[str, Any]:
    """results.json: 7 patients, of whom one was imaged twice, with Dice 0.1 to 0.7 (the twice imaged: mean of 0.6 and 0.8)."""
    label = next(name for name, value in dataset.labels.items() if 1 in ids_of(value))
    scores = [(f"secret_{i}", f"secret_{i}", 0.1 * (i + 1)) for i in range(6)]
    scores += [("secret_6a", "secret_6", 0.6), ("secret_6b", "secret_6", 0.8)]
    cases = [
        {
            "model": "federated", "site": "north", "subset": "validation", "case": case, "patient": patient, "label": label,
            "status": "ok", "unit": "mm", "dice": dice, "iou": None, "hd95": 2.0, "nsd": 1.0,
            "reference_volume": 1.0, "prediction_volume": 1.0,
        }
        for case, patient, dice in scores
    ]  # fmt: skip
    model = {
        "name": "federated", "protocol": "federated", "parameters": 1234, "rounds": 2, "updates": 4, "patches": 8,
        "batch_size": 2, "seconds": 1.0, "sites": {},
    }  # fmt: skip
    return {
        "version": 1, "study": "small", "seed": 1, "complete": True, "models": [model], "cases": cases,
        "summary": summarize(cases, SCALES), "comparisons": [], "excluded": [], "warnings": [],
        "problems": [],
    }  # fmt: skip


def two_images(data: Path, folder: Path) -> Path:
    """The first two images of a data set whose cases have one file each, as a data set of their own."""
    (folder / "imagesTr").mkdir(parents=True)
    for image in sorted((data / "imagesTr").iterdir())[:2]:
        (folder / "imagesTr" / image.name).symlink_to(image)
    return folder


def write_volumes(folder: Path, *, n: int = 3, spacing: tuple[float, float, float] = (0.8, 1.1, 2.5)) -> Path:
    """An nnU-Net raw folder: two channels, oblique, with margins of zeros to crop and a corner of zeros that stays."""
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(n):
        shape = (14 + i, 40 + 2 * i, 36)
        image = rng.normal(100, 10, shape).astype(np.float32)
        label = np.zeros(shape, np.uint8)
        label[4:9, 10:25, 8:16], label[4:9, 10:25, 16:26] = 1, 2
        image += 40.0 * label
        image[:1], image[:, :3], image[:, :, -4:], image[:, :8, :6] = 0, 0, 0, 0
        second = np.where(image == 0, 0, rng.normal(-3, 1, shape)).astype(np.float32)
        for array, file in (
            (image, f"imagesTr/c{i}_0000"), (second, f"imagesTr/c{i}_0001"), (label, f"labelsTr/c{i}"),
        ):  # fmt: skip
            written = sitk.GetImageFromArray(array)
            written.SetSpacing(spacing)
            written.SetOrigin((-7.0, 3.5, 11.0))
            written.SetDirection((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
            sitk.WriteImage(written, str(folder / f"{file}.nii.gz"))
    _describe(folder, ["T1", "T2"], {"background": 0, "front": 1, "back": 2}, n, ".nii.gz")
    return folder


def write_pictures(folder: Path, *, n: int = 2) -> Path:
    """An nnU-Net raw folder of colour pictures, larger than a patch along one axis."""
    rng = np.random.default_rng(1)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(n):
        image = rng.integers(1, 200, (50 + 4 * i, 76, 3), dtype=np.uint8)
        label = np.zeros(image.shape[:2], np.uint8)
        label[10:30, 12:25] = 1
        image[:4], image[:, -3:] = 0, 0
        sitk.WriteImage(sitk.GetImageFromArray(image, isVector=True), str(folder / f"imagesTr/p{i}_0000.png"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / f"labelsTr/p{i}.png"))
    _describe(folder, ["R", "G", "B"], {"background": 0, "polyp": 1}, n, ".png")
    return folder


def _describe(folder: Path, channels: list[str], labels: dict[str, int], n: int, ending: str) -> None:
    names = {str(i): c for i, c in enumerate(channels)}
    about = {"channel_names": names, "labels": labels, "numTraining": n, "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(about))
