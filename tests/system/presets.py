"""A preset study on the built-in phantom: what costs time made small, phantoms that fit for its data, all else as it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from PIL import Image

from concilium.data.phantom import DEFAULT_SITES, write_phantom
from concilium.data.phantom_sequences import SEQUENCES, write_sequences

Tables = dict[str, Any]
PARTIAL = {"marginal", "own_labels"}
"""Losses for sites that annotate some labels only."""
SMALLER: Mapping[str, Callable[[Any], Any]] = {
    "rounds": lambda n: min(n, 2),
    "steps": lambda n: min(n, 2),
    "epochs": lambda n: min(n, 1),
    "seeds": lambda n: 1,
    "every": lambda n: 1,
    "base_features": lambda n: min(n, 4),
    "width": lambda n: min(n, 24),
    "decoder_features": lambda n: min(n, 16),
    "size": lambda size: [32 for _ in size],
    "patch_size": lambda size: [min(n, 32) for n in size],
    "min_patients": lambda n: min(n, 2),
}
"""Keys that cost time, or more patients than the phantom has, wherever they stand: the value in its place."""


def shrunk(tables: Mapping[str, Any]) -> Tables:
    """The tables, and those of variants, with the keys of `SMALLER` made so, and two folds where each is trained."""
    small: Tables = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            small[key] = shrunk(value)
        else:
            small[key] = SMALLER[key](value) if key in SMALLER else copy.deepcopy(value)
    if small.get("fold") == "all":
        small["folds"] = 2
    return small


def on_phantoms(tables: Mapping[str, Any], folder: Path) -> Tables:
    """The shrunk study on phantoms in this folder: of its sites, of its test set, or of the data set that it divides."""
    raw = shrunk(tables)
    raw.get("network", {}).pop("weights", None)  # of a file that whoever runs it makes first
    if raw["protocol"]["name"] == "vertical":
        return _on_sequences(raw, folder)
    flat = raw.get("plan", {}).get("configuration") == "2d"
    names = ["all"] if "partition" in raw else list(raw["sites"])
    scanners = [
        replace(DEFAULT_SITES[i % 3], name=name, n_cases=12 if name == "all" else 3) for i, name in enumerate(names)
    ]
    write_phantom(folder, sites=scanners, n_test=1, scale=0.8 if flat else 0.5)
    called = dict(zip(("organ", "lesion"), dict.fromkeys(_labels(raw)), strict=False))
    somewhere = _says_what_is_annotated(raw) or not _losses(raw) & PARTIAL
    for i, name in enumerate((*names, "test")):
        own = {ours: theirs for theirs, ours in raw["sites"].get(name, {}).get("labels", {}).items()}
        _describe(folder / name, {ours: own.get(said, said) for ours, said in called.items()})
        if not somewhere and name != "test":
            _annotate(folder / name, i)
        if flat:
            _flatten(folder / name)
    if "partition" in raw:
        raw["partition"]["data"] = str(folder / "all")
    else:
        for name, site in raw["sites"].items():
            site["data"] = str(folder / name)
    if "test" in raw:
        raw["test"]["data"] = str(folder / "test")
    return raw


def _on_sequences(raw: Tables, folder: Path) -> Tables:
    """Each site has one sequence of the same patients; label maps lie with the first."""
    write_sequences(folder, n_cases=5, n_test=1, size=32)
    channels = {site: table["holds"][0] for site, table in raw["sites"].items()}
    for called, (site, table) in zip(SEQUENCES, raw["sites"].items(), strict=True):
        table["data"] = str(folder / called)
        _call(folder / called, [channels[site]])
    _call(folder / "test", list(channels.values()))
    raw["test"]["data"] = str(folder / "test")
    return raw


def _call(folder: Path, channels: Sequence[str]) -> None:
    """Call the channels otherwise."""
    about = json.loads((folder / "dataset.json").read_text())
    about["channel_names"] = {str(i): name for i, name in enumerate(channels)}
    (folder / "dataset.json").write_text(json.dumps(about))


def changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> set[str]:
    """Keys whose values differ, wherever they stand."""
    found: set[str] = set()
    for key in {**a, **b}:
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= changed(one, other)
        elif one != other:
            found.add(key)
    return found


def _labels(tables: Mapping[str, Any]) -> Iterator[str]:
    """The labels that a study speaks of."""
    for key, value in tables.items():
        if key == "annotated" and isinstance(value, list):
            yield from value
        elif key == "labels" and isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, Mapping):
            yield from _labels(value)


def _says_what_is_annotated(raw: Tables) -> bool:
    return any("annotated" in site for site in raw["sites"].values())


def _losses(raw: Tables) -> set[str]:
    tables = [raw, *raw.get("variants", {}).values()]
    return {table["loss"]["name"] for table in tables if "name" in table.get("loss", {})}


def _describe(folder: Path, called: Mapping[str, str]) -> None:
    """Call the labels otherwise."""
    about = json.loads((folder / "dataset.json").read_text())
    about["labels"] = {called.get(label, label): i for label, i in about["labels"].items()}
    (folder / "dataset.json").write_text(json.dumps(about))


def _annotate(folder: Path, i: int) -> None:
    """Say that the site looked for one label only."""
    about = json.loads((folder / "dataset.json").read_text())
    labels = [label for label in about["labels"] if label != "background"]
    (folder / "dataset.json").write_text(json.dumps(about | {"annotated": [labels[i % len(labels)]]}))


def _flatten(folder: Path) -> None:
    """Colour pictures in place of volumes: of each the slice with most of the lesion."""
    about = json.loads((folder / "dataset.json").read_text())
    for file in sorted((folder / "labelsTr").iterdir()):
        case = file.name.removesuffix(".nii.gz")
        image = folder / "imagesTr" / f"{case}_0000.nii.gz"
        label, volume = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (file, image))
        z = int((label == 2).sum(axis=(1, 2)).argmax())
        low, high = volume.min(), volume.max()
        grey = np.rint((volume[z] - low) / (high - low) * 255).astype(np.uint8)
        Image.fromarray(np.stack([grey, grey // 2, 255 - grey], axis=-1)).save(folder / "imagesTr" / f"{case}_0000.png")
        Image.fromarray(label[z]).save(folder / "labelsTr" / f"{case}.png")
        file.unlink()
        image.unlink()
    about |= {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    (folder / "dataset.json").write_text(json.dumps(about))
