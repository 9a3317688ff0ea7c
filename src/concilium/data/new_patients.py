"""The new patients of an nnU-Net raw folder: the images of `imagesTs`, of which nobody has a label map yet."""

from __future__ import annotations

from pathlib import Path

from concilium.data._description import read_description
from concilium.data._names import images_in
from concilium.data.dataset import Case, Dataset
from concilium.data.matching import Names, Space, renamed

FOLDER = "imagesTs"


def open_new(folder: Path, names: Names | None = None) -> Dataset:
    """The cases of `imagesTs`, none where there is no such folder, channels and labels called as `names` says; no image is read.

    Raises:
        DataError: a `dataset.json` that cannot be used, or a file whose name says no channel.
    """
    about = read_description(folder)
    there = (folder / FOLDER).is_dir()
    files = images_in(folder / FOLDER, about.channels, about.file_ending) if there else {}
    space = renamed(Space(about.channels, about.labels), names or Names(), str(folder))
    cases = tuple(Case(name, f, None, about.patients.get(name, name)) for name, f in files.items() if f is not None)
    missing = tuple((name, "missing_channel") for name, f in files.items() if f is None)
    return Dataset(folder, space.channels, space.labels, about.file_ending, cases, missing)
