"""What a site keeps of its own scores: a small picture of every case, and a table. Nothing of it travels.

    SITE/pictures/MODEL/SUBSET/NUMBER.png    the slice with the most wrong voxels: image, reference and prediction in outline
    SITE/scores/MODEL.SUBSET.json            a line per case and label, with the case's name and its picture

A picture shows channel 0 in grey, or a colour photograph in its colours, between its 0.5th and 99.5th percentile, cut to what is
outlined and some surroundings, at the true ratio of its sides. Rows and columns are as stored: of an image along the usual axes
that is the patient's right on the left. Where both outlines meet there is a third colour: a line of one colour is an error.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concilium.answers import Entry
from concilium.data.labels import Labels, foreground
from concilium.messages import Evaluate, Score

Array: TypeAlias = NDArray[Any]
Row: TypeAlias = dict[str, Any]

REFERENCE = ((86, 180, 233), (0, 178, 130), (120, 150, 255))
"""Colours of a reference's outline, by label in turn: bluish, so that colour-blind people can tell them from a prediction's."""
PREDICTION = ((250, 225, 40), (235, 130, 195), (240, 110, 20))
"""Colours of a prediction's outline, by label in turn: yellowish or pink."""
BOTH = (255, 255, 255)
"""Where the two outlines of a label meet."""
SIZE = 256
"""Longest side [pixels]."""
PHOTOGRAPH = 216
"""Longest side of a photograph, which takes more bytes."""
MAX_BYTES = 15_000
UNKNOWN = 1.0
"""Spacing where there is none."""

LEVELS = 32
"""Greys, or colours of a photograph."""
SMALLEST = 32
"""No picture is made smaller than this to save bytes."""


def save_case(
    folder: Path,
    request: Evaluate,
    entry: Entry,
    arrays: tuple[Array, Array, Array],
    spacing: tuple[float, ...] | None,
    scores: Sequence[Score],
    *,
    labels: Labels,
    pictures: bool,
) -> list[Row]:
    """Save the picture of a case that was scored; the lines of the site's own table, which say what went wrong with it.

    Args:
        arrays: image (C, X, Y, Z), reference and prediction (X, Y, Z), in original geometry.
        spacing: [mm] along X, Y, Z.
    """
    image, reference, prediction = arrays
    about: Row = {"picture": None, "spacing": spacing, "foreground_median": None}
    if pictures:
        try:  # whatever is wrong with a picture, the case is scored
            about["foreground_median"] = _medians(image, reference)
            content = draw(image, reference, prediction, spacing, _ids(labels))
            path = Path("pictures", request.model, request.subset, f"{entry.number}.png")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
            about["picture"] = path.as_posix()
        except Exception as e:
            about["note"] = f"No picture: {type(e).__name__}: {e}"
    case = {"case": entry.case.name, "patient": entry.case.patient, "number": entry.number}
    rows = []
    for score in scores:
        values = asdict(score)
        rows.append(values | values.pop("values") | case | about)  # the names in place of the numbers
    return rows


def save_scores(folder: Path, site: str, request: Evaluate, rows: Sequence[Row], labels: Labels) -> None:
    """Write the site's own table of what `request` found."""
    places = {value: i for i, value in enumerate(_ids(labels))}
    colours = {
        name: [_hex(palette[places[ids[0]] % len(palette)]) for palette in (REFERENCE, PREDICTION)]
        for name, ids in foreground(labels).items()
    }
    path = folder / "scores" / f"{request.model}.{request.subset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    table = {"model": request.model, "subset": request.subset, "site": site, "colours": colours, "cases": rows}
    unfinished.write_text(json.dumps(table, indent=1), encoding="utf-8")
    unfinished.replace(path)


def _ids(labels: Labels) -> list[int]:
    """Every id that is outlined; of a region the first is the one that predictions have."""
    return sorted({value for ids in foreground(labels).values() for value in ids})


def draw(
    image: Array, reference: Array, prediction: Array, spacing: Sequence[float] | None, values: Sequence[int]
) -> bytes:
    """PNG of the slice with the most voxels in which the two label maps differ, or where none do with the most foreground.

    Slices are cut across the axis of the largest spacing, the first of equals.

    Args:
        image: (C, X, Y, Z).
        reference: (X, Y, Z), as `prediction`.
        spacing: [mm] along X, Y, Z; `None` where unknown.
        values: the foreground labels' numbers, in the order of their colours.
    """
    mm = tuple(spacing or (UNKNOWN,) * 3)
    axis = reference.shape.index(1) if 1 in reference.shape else int(np.argmax(mm))
    others = tuple(a for a in range(3) if a != axis)
    wrong = (reference != prediction).sum(axis=others)
    counts = wrong if wrong.any() else (reference > 0).sum(axis=others)
    index = int(np.argmax(counts))
    upright: Callable[[Array], Array] = (lambda plane: plane) if axis == 0 else (lambda plane: plane[..., ::-1, :])
    in_colour = len(image) == 3 and spacing is None
    channels = upright(np.take(image[: 3 if in_colour else 1], index, axis=axis + 1))
    maps = [upright(np.take(m, index, axis=axis)) for m in (reference, prediction)]
    rows, columns = _window((maps[0] > 0) | (maps[1] > 0))
    low, high = np.percentile(channels.ravel()[:: max(1, channels.size // 20_000)], (0.5, 99.5))
    shown = np.clip((channels[:, rows, columns] - low) / max(float(high - low), 1e-9), 0, 1)
    height, width = shown.shape[1] * mm[others[0]], shown.shape[2] * mm[others[1]]
    side = float(SIZE if len(shown) == 1 else PHOTOGRAPH)
    while True:
        shape = tuple(max(1, round(x * side / max(height, width))) for x in (height, width))
        content = _png(shown, [m[rows, columns] for m in maps], shape, values)
        if len(content) <= MAX_BYTES or side <= SMALLEST:
            return content
        side = max(SMALLEST, 0.95 * side * (MAX_BYTES / len(content)) ** 0.5)


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{c:02x}" for c in colour)


def _window(outlined: Array) -> tuple[slice, slice]:
    """The rows and columns to show: what is outlined with half its size around it, and at least two fifths of the slice."""
    if not outlined.any():
        return slice(None), slice(None)
    found = []
    for axis in (0, 1):
        (filled,) = np.nonzero(outlined.any(axis=1 - axis))
        n, extent = outlined.shape[axis], int(filled[-1] - filled[0] + 1)
        wanted = min(n, max(2 * extent, -(-2 * n // 5)))
        start = min(max(0, int(filled[0] + extent // 2 - wanted // 2)), n - wanted)
        found.append(slice(start, start + wanted))
    return found[0], found[1]


def _png(shown: Array, maps: Sequence[Array], shape: tuple[int, ...], values: Sequence[int]) -> bytes:
    """The PNG: `shown` (C, rows, columns) from 0 to 1, the label maps drawn into it, resampled to `shape` (rows, columns)."""
    size = (shape[1], shape[0])
    if len(shown) == 3:
        colour = Image.fromarray(np.moveaxis(shown * 255, 0, -1).round().astype(np.uint8)).resize(size)
        sample = colour.resize((32, 32)).quantize(LEVELS, method=Image.Quantize.MEDIANCUT)
        picture = colour.quantize(palette=sample, dither=Image.Dither.NONE)
        palette = (sample.getpalette() or [])[: 3 * LEVELS]
        pixels = np.array(picture)
    else:
        grey = Image.fromarray(shown[0].astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        pixels = np.clip(np.asarray(grey) * (LEVELS - 1), 0, LEVELS - 1).round().astype(np.uint8)
        palette = [round(255 * i / (LEVELS - 1)) for i in range(LEVELS) for _ in range(3)]
    first = len(palette) // 3
    colours = [*REFERENCE, *PREDICTION, BOTH]
    for i, value in enumerate(values):
        edges = [_outline(_resized(m == value, size)) for m in maps]
        pixels[edges[0]] = first + i % len(REFERENCE)
        pixels[edges[1]] = first + len(REFERENCE) + i % len(PREDICTION)
        pixels[edges[0] & edges[1]] = first + len(colours) - 1
    result = Image.fromarray(pixels, mode="L")
    result.putpalette([*palette, *(c for colour in colours for c in colour)])
    file = io.BytesIO()
    result.save(file, "PNG", compress_level=4)
    return file.getvalue()


def _resized(mask: Array, size: tuple[int, int]) -> Array:
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)).astype(bool)


def _outline(mask: Array) -> Array:
    """The mask's own pixels within two steps of the outside or of the picture's edge."""
    inside = mask
    for _ in range(2):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(mask & ~inside)


def _medians(image: Array, reference: Array) -> list[float] | None:
    """Median intensity of each channel in the reference's foreground."""
    foreground = reference > 0
    return [float(np.median(channel[foreground])) for channel in image] if foreground.any() else None
