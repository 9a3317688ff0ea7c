"""Segment new images with a finished model, from the run folder alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from concilium import catalog
from concilium.answers.evaluate import segment
from concilium.data.dataset import Dataset, list_images, reader
from concilium.data.plan import open_plan
from concilium.errors import DataError, StudyError
from concilium.networks import make_network
from concilium.optimization import device_named
from concilium.study import read_study
from concilium.wire import read_tensors


def predict(
    run: Path,
    images: Path,
    out: Path,
    *,
    model: str | None = None,
    device: str = "auto",
    watch: Callable[[str, int, int], None] = lambda *_: None,
) -> list[tuple[str, str]]:
    """Write a label map for every image of a folder; the cases that could not be segmented, with the reason.

    Args:
        run: a run folder.
        images: files named CASE_0000.ENDING, one per channel, as in nnU-Net's imagesTs.
        model: as in results.json, such as `federated` or `local:north`; omitted: the study's own protocol.
        watch: is told each case, its number and how many there are.

    Raises:
        StudyError: no run folder, or it holds no such model.
        DataError: the folder holds no images of the right kind.
    """
    if not (run / "plans.json").is_file():
        raise StudyError(f"{run} is no run folder: it has no plans.json. Give the folder that `concilium run` printed.")
    study = read_study(run / "study.toml", check_data=False)
    weights, _ = read_tensors(_weights_file(run, model or study.protocol.name))
    about = json.loads((run / "dataset.json").read_text(encoding="utf-8"))
    channels, labels, ending = tuple(about["channel_names"].values()), about["labels"], about["file_ending"]
    plan = open_plan((run / "plans.json").read_text(encoding="utf-8"), study.plan.configuration)
    network = make_network(
        study.network,
        n_channels=len(channels),
        n_labels=len(labels),
        plan=plan.architecture,
        deep_supervision=study.training.deep_supervision,
    )
    network.load_state_dict(weights)
    network.eval()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise StudyError(
            f"Device {device!r} is not available. Allowed: auto, cpu, and cuda where there is a GPU. Choose with --device."
        )
    where = device_named(device)
    torch.set_num_threads(study.engine.threads)
    cases = list_images(images, channels, ending)
    dataset = Dataset(images, channels, labels, ending, cases, ())
    t = study.training
    cut = partial(
        segment,
        plan=plan,
        labels=labels,
        network=network.to(where),
        device=where,
        mirror=t.mirror,
        precision=t.precision,
    )
    out.mkdir(parents=True, exist_ok=True)
    skipped: list[tuple[str, str]] = []
    for number, case in enumerate(cases, 1):
        watch(case.name, number, len(cases))
        try:
            label_map, properties = cut(case, dataset)
            reader(ending)().write_seg(label_map, str(out / f"{case.name}{ending}"), properties)
        except DataError as e:
            skipped.append((case.name, str(e)))
    return skipped


def _weights_file(run: Path, model: str) -> Path:
    """The file of a model: with the server, or at the simulated site that it never left."""
    name, _, site = model.partition(":")
    path = run / "sites" / site / "models" / f"{name}.safetensors" if site else run / "weights" / f"{name}.safetensors"
    if not path.is_file():
        known = [p.stem for p in sorted((run / "weights").glob("*.safetensors"))]
        known += [f"local:{p.parts[-3]}" for p in sorted((run / "sites").glob("*/models/local.safetensors"))]
        raise StudyError(f"{run} holds no model {model!r}. {catalog.allowed(model, known)} Choose one with --model.")
    return path
