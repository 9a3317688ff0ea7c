"""Images without label maps, to be segmented."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from concilium.data._description import read_channels
from concilium.data._names import images_in
from concilium.data._reading import reader, some
from concilium.data.dataset import Case, Dataset
from concilium.data.labels import Labels
from concilium.data.matching import Translation
from concilium.errors import DataError


def list_images(
    folder: str | Path, channels: Sequence[str], file_ending: str, *, missing: Sequence[str] = ()
) -> tuple[Case, ...]:
    """The images of a folder as cases without label, sorted by name, for prediction.

    Files of `missing` channels need not be there: another channel's stands in their place, which the network then does not see.

    Raises:
        DataError: no such folder, no image in it, or a case that lacks a channel.
    """
    folder = Path(folder)
    reader(file_ending)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Expected one with <case>_0000{file_ending}. Check the path.")
    found = images_in(folder, channels, file_ending, missing=missing)
    short = [name for name, files in found.items() if files is None]
    if short:
        raise DataError(
            f"{len(short)} of {len(found)} cases in {folder} lack a channel ({some(short)}). Each needs {len(channels)} "
            f"({', '.join(channels)}). Add the files or move these cases away.",
            code="missing_channel",
        )
    if not found:
        raise DataError(
            f"{folder} has no image. Expected <case>_0000{file_ending}. Check the folder and the file ending."
        )
    return tuple(Case(name, files, None, name) for name, files in sorted(found.items()) if files is not None)


def images_as(
    folder: Path, channels: tuple[str, ...], labels: Labels, file_ending: str, *, missing: Sequence[str] = ()
) -> Dataset:
    """The images of a folder as a data set with these channels: re-ordered by name where a `dataset.json` tells their order.

    Args:
        folder: its `dataset.json` lies in it or in the folder above, as in nnU-Net; without one the order is taken to be this.
        missing: as in `list_images`.

    Raises:
        DataError: `list_images` raises it, or the file cannot be used, or names other channels.
    """
    described = next((f for f in (folder, folder.parent) if (f / "dataset.json").is_file()), None)
    own = channels if described is None else read_channels(described)
    if sorted(own) != sorted(channels):
        raise DataError(
            f"{described}/dataset.json has channels {', '.join(own)}. The model needs {', '.join(channels)}. Call them so "
            "there, or move the images to a folder of their own, in the model's order.",
            code="channel_mismatch",
        )
    order = tuple(own.index(channel) for channel in channels)
    return Dataset(
        folder,
        channels,
        labels,
        file_ending,
        list_images(folder, own, file_ending, missing=missing),
        (),
        translation=Translation(order, {}, {}),
    )
