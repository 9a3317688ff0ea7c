"""Data sets that hold channels of the same cases, joined in one nnU-Net raw folder of links."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from concilium.data.dataset import Dataset
from concilium.data.labels import to_nnunet
from concilium.errors import DataError


def write_joined(
    folder: Path, sets: Mapping[str, tuple[Dataset, bool]], *, labels: str, cases: Collection[str]
) -> None:
    """Write a raw folder whose images have the channels of all sets, one after the other; files are links, or copies.

    Args:
        folder: what there is of it is replaced.
        sets: name -> a data set, and whether its channels count.
        labels: whose label maps and patients are taken.
        cases: which cases.

    Raises:
        DataError: the sets' files end differently.
    """
    endings = {name: dataset.file_ending for name, (dataset, _) in sets.items()}
    if len(set(endings.values())) > 1:
        told = ", ".join(f"{name} {ending}" for name, ending in endings.items())
        raise DataError(
            f"Files end in {told}. To be joined for 'centralized' all must end alike. Convert them, or take it out of compare."
        )
    labelled = sets[labels][0]
    ending = labelled.file_ending
    shutil.rmtree(folder, ignore_errors=True)
    channels: list[str] = []
    for dataset, counts in sets.values():
        if counts:
            for name in dataset.channels:
                place = len(channels)
                channels.append(name)
                of = {case.name: case.images[dataset.channels.index(name)] for case in dataset.cases}
                for case in cases:
                    _link(of[case], folder / "imagesTr" / f"{case}_{place:04d}{ending}")
    own = {case.name: case for case in labelled.cases if case.name in cases}
    for name, labelled_case in own.items():
        if labelled_case.label is not None:
            _link(labelled_case.label, folder / "labelsTr" / f"{name}{ending}")
    about = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        **to_nnunet(labelled.labels),
        "numTraining": len(own),
        "file_ending": ending,
        "patient": {name: c.patient for name, c in own.items()},
    }
    looked_for = {name: list(c.annotated) for name, c in own.items() if c.annotated is not None}
    if looked_for:
        about["annotated"] = looked_for
    (folder / "dataset.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(source.resolve(), target)
    except OSError:  # a disk that knows no links
        shutil.copyfile(source, target)
