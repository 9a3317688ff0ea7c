"""What a site may tell about its images before training, as numbers that add up.

nnU-Net's fingerprint (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z) cannot be merged: a weighted mean of standard
deviations drops the difference between sites, one of percentiles is no percentile. Here every part is a sum, a minimum, a
maximum or a table of counts, held in integers, so that `merge` gives the same bits in any order and any grouping.

Deviations from nnU-Net: it draws equally many foreground voxels from each case, with replacement; here each case counts
with its exact distribution and equal mass. Percentiles come from a histogram with bins 2**-10 of the value wide or finer,
without interpolation. Relative sizes are rounded down to 1/1024, so that "below 3/4", all that is asked of them, stays so.

No name is held, and no voxel's place. But the statistics of a single case are its own distribution of intensities, and the
extremes are always some voxel's.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from concilium.errors import ContractError, DataError
from concilium.messages import ChannelStatistics, Fingerprint, Geometry, RelativeSize
from concilium.nnunet_parts import crop_to_nonzero

CASE_MASS = 2**32
"""Mass of one case's histogram."""
SHAPE_BITS = 8
"""Significant bits of a binned shape: exact up to 256 voxels, within 1 up to 512, 2 up to 1024.

Plans stay those of exact geometry unless a median lies at an edge of nnU-Net's rules: another patch in 3 of 467 random
configurations. With 7 bits in 13 of them, and another batch (10 for 11) in one real federation of ten."""
SPACING_BITS = 10
"""Mantissa bits of a binned spacing: within 0.05 %, less than half a voxel over 1024, so no image is resampled for it."""

_UNIT = 1074  # sums are in units of 2**-1074, the smallest float64
_TOGETHER = 64  # fingerprints that `merge` holds at a time


def fingerprint_of_case(
    image: NDArray[Any],
    label: NDArray[Any] | None,
    spacing: Sequence[float],
    *,
    exact_geometry: bool,
    crop: bool = True,
) -> Fingerprint:
    """The fingerprint of one case, after nnU-Net's cropping to the non-zero region, unless `crop` is off.

    Args:
        image: (C, X, Y, Z), finite.
        label: (1, X, Y, Z); foreground is what is above 0. Without one intensities are those of all voxels.
        spacing: [mm] along X, Y, Z; with `exact_geometry` told as it is, like the shape, and else binned.

    Raises:
        ContractError: the arrays do not belong together.
    """
    label = np.ones((1, *image.shape[1:]), bool) if label is None else label
    if image.ndim != 4 or label.shape != (1, *image.shape[1:]) or len(spacing) != 3:
        given = f"Image {image.shape}, label map {label.shape} and spacing {tuple(spacing)} do not belong together"
        raise ContractError(f"{given}. Expected (C, X, Y, Z), (1, X, Y, Z) and three numbers. Use read_case.")
    cropped, _, box = crop_to_nonzero(image) if crop else (image, None, [(0, n) for n in image.shape[1:]])
    foreground = label[0][tuple(slice(a, b) for a, b in box)] > 0
    shape, mm = tuple(cropped.shape[1:]), tuple(float(s) for s in spacing)
    relative = RelativeSize(1024 * math.prod(shape) // math.prod(image.shape[1:]), 1)
    if not exact_geometry:
        shape, mm = tuple(_significant(n) for n in shape), tuple(_rounded(s) for s in mm)
    return Fingerprint(
        n_cases=1,
        n_foreground=int(foreground.any()),
        channels=tuple(_channel(channel[foreground]) for channel in cropped),
        geometry=(Geometry(shape, mm, 1),),
        relative_sizes=(relative,),
        exact_geometry=exact_geometry,
    )


def merge(fingerprints: Iterable[Fingerprint]) -> Fingerprint:
    """The fingerprint of all cases together: the same bits in any order and any grouping.

    Raises:
        ContractError: none is given, or they differ in the number of channels or in whether geometry is exact.
    """
    held: list[Fingerprint] = []
    for fingerprint in fingerprints:
        held.append(fingerprint)
        if len(held) == _TOGETHER:
            held = [_merge(held)]
    if not held:
        raise ContractError("No fingerprint to merge. At least one is needed. Ask a site that has cases.")
    return _merge(held)


def mean_std(channel: ChannelStatistics, n_foreground: int) -> tuple[float, float]:
    """Mean and standard deviation of the pooled foreground; differences between cases and sites are part of the latter.

    Raises:
        DataError: no case has foreground.
    """
    _need_foreground(n_foreground)
    scale = n_foreground << _UNIT
    mean = Fraction(channel.mean_sum, scale)
    variance = Fraction(channel.square_sum, scale) - mean * mean
    return float(mean), math.sqrt(max(float(variance), 0.0))


def percentile(channel: ChannelStatistics, q: float) -> float:
    """The smallest binned intensity that at least `q` percent of the pooled foreground do not exceed, within [minimum, maximum].

    Raises:
        DataError: no case has foreground.
        ContractError: `q` is not between 0 and 100.
    """
    _need_foreground(len(channel.keys))
    if not 0 <= q <= 100:
        raise ContractError(f"Percentile {q} was asked for. Allowed is 0 to 100. Correct the call.")
    cumulative = np.cumsum(channel.masses.numpy())
    wanted = math.ceil(Fraction(q) / 100 * int(cumulative[-1]))
    key = channel.keys.numpy()[np.searchsorted(cumulative, max(wanted, 1))]
    return float(np.clip(_values(key), channel.minimum, channel.maximum))


def to_nnunet(fingerprint: Fingerprint) -> dict[str, Any]:
    """The fingerprint as nnU-Net's `dataset_fingerprint.json`, its lists in no order of cases. Raises as `mean_std` does."""
    geometry = [g for g in fingerprint.geometry for _ in range(g.count)]
    sizes = [r.share / 1024 for r in fingerprint.relative_sizes for _ in range(r.count)]
    intensities = {}
    for i, channel in enumerate(fingerprint.channels):
        mean, std = mean_std(channel, fingerprint.n_foreground)
        intensities[str(i)] = {
            "mean": mean,
            "median": percentile(channel, 50),
            "std": std,
            "min": channel.minimum,
            "max": channel.maximum,
            "percentile_99_5": percentile(channel, 99.5),
            "percentile_00_5": percentile(channel, 0.5),
        }
    return {
        "spacings": [list(g.spacing) for g in geometry],
        "shapes_after_crop": [list(g.shape) for g in geometry],
        "foreground_intensity_properties_per_channel": intensities,
        "median_relative_size_after_cropping": float(np.median(sizes)),
    }


def to_json(fingerprint: Fingerprint) -> str:
    """The fingerprint as JSON (`fingerprint.json`); the exact sums in hexadecimal, as most readers round large numbers."""
    table = asdict(fingerprint)
    for channel in table["channels"]:
        channel["keys"], channel["masses"] = channel["keys"].tolist(), channel["masses"].tolist()
        channel["mean_sum"], channel["square_sum"] = hex(channel["mean_sum"]), hex(channel["square_sum"])
        for bound in ("minimum", "maximum"):
            channel[bound] = channel[bound] if math.isfinite(channel[bound]) else None
    return json.dumps(table, allow_nan=False)


def from_json(text: str) -> Fingerprint:
    """The fingerprint that `to_json` wrote, bit for bit.

    Raises:
        ContractError: it is no such text.
    """
    try:
        table = json.loads(text)
        channels = tuple(
            ChannelStatistics(
                mean_sum=int(c["mean_sum"], 16),
                square_sum=int(c["square_sum"], 16),
                minimum=math.inf if c["minimum"] is None else float(c["minimum"]),
                maximum=-math.inf if c["maximum"] is None else float(c["maximum"]),
                keys=torch.tensor(c["keys"], dtype=torch.int32),
                masses=torch.tensor(c["masses"], dtype=torch.int64),
            )
            for c in table.pop("channels")
        )
        geometry = tuple(Geometry(tuple(g["shape"]), tuple(g["spacing"]), g["count"]) for g in table.pop("geometry"))
        sizes = tuple(RelativeSize(**r) for r in table.pop("relative_sizes"))
        return Fingerprint(channels=channels, geometry=geometry, relative_sizes=sizes, **table)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise ContractError(f"A fingerprint cannot be read ({e!r}). Expected this version's. Make it again.") from e


# ------------------------------------------------------------------------------------------------------------ one case


def _channel(values: NDArray[Any]) -> ChannelStatistics:
    """Statistics of one channel's foreground voxels of one case, of mass `CASE_MASS` (or none)."""
    if values.size == 0:
        none = torch.zeros(0, dtype=torch.int32)
        return ChannelStatistics(0, 0, math.inf, -math.inf, none, none.to(torch.int64))
    values = values.astype(np.float32, copy=False)
    mean = _integer(float(values.mean(dtype=np.float64)))
    variance = _integer(float(values.var(dtype=np.float64)))
    keys, counts = _histogram(values)
    return ChannelStatistics(
        mean_sum=mean,
        square_sum=variance + (mean * mean >> _UNIT),  # from the variance: squares of large intensities would cancel
        minimum=float(values.min()),
        maximum=float(values.max()),
        keys=torch.from_numpy(keys.astype(np.int32)),
        masses=torch.from_numpy(_scaled(counts)),
    )


def _integer(x: float) -> int:
    """The float64 in units of 2**-1074, exactly."""
    numerator, denominator = x.as_integer_ratio()
    return numerator * ((1 << _UNIT) // denominator)


def _histogram(values: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ascending keys and their counts. A key sorts like the value: its sign times its float32 bits without the last 13."""
    bits = np.ascontiguousarray(values).view(np.int32)
    rounded = ((bits & 0x7FFFFFFF) + 0x1000) >> 13
    keys = np.where(bits < 0, -rounded, rounded)
    lowest = int(keys.min())
    counts = np.bincount(keys - lowest)
    (filled,) = np.nonzero(counts)
    return filled + lowest, counts[filled]


def _values(keys: NDArray[np.int32]) -> NDArray[np.float64]:
    magnitude = (np.abs(keys) << 13).astype(np.int32).view(np.float32).astype(np.float64)
    return np.where(keys < 0, -magnitude, magnitude)


def _scaled(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The counts scaled to `CASE_MASS` by largest remainder; of equal remainders the lower key gets more."""
    n = int(counts.sum())
    products = [int(count) * CASE_MASS for count in counts]  # beyond int64 for huge cases
    masses = np.array([p // n for p in products], dtype=np.int64)
    order = sorted(range(len(products)), key=lambda i: -(products[i] % n))
    masses[order[: CASE_MASS - int(masses.sum())]] += 1
    return masses


def _significant(n: int) -> int:
    """The whole number rounded to `SHAPE_BITS` significant bits, half to even (half up would shift medians)."""
    step = 1 << max(n.bit_length() - SHAPE_BITS, 0)
    return round(n / step) * step


def _rounded(x: float) -> float:
    """The number rounded to `SPACING_BITS` mantissa bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(mantissa, SPACING_BITS + 1)), exponent - SPACING_BITS - 1)


def _need_foreground(n: int) -> None:
    if n == 0:
        raise DataError("No case has foreground. At least one must. Check the label maps.", code="no_foreground")


# ---------------------------------------------------------------------------------------------------------- all cases


def _merge(parts: Sequence[Fingerprint]) -> Fingerprint:
    first = parts[0]
    for part in parts:
        if len(part.channels) != len(first.channels):
            numbers = f"{len(first.channels)} and {len(part.channels)}"
            raise ContractError(f"Fingerprints have {numbers} channels. All need the same. Correct channel_names.")
        if part.exact_geometry is not first.exact_geometry:
            raise ContractError("Exact and binned geometry do not add up. All must be alike. Ask every site the same.")
    geometry: Counter[tuple[tuple[int, ...], tuple[float, ...]]] = Counter()
    sizes: Counter[int] = Counter()
    for g in (g for part in parts for g in part.geometry):
        geometry[g.shape, g.spacing] += g.count
    for r in (r for part in parts for r in part.relative_sizes):
        sizes[r.share] += r.count
    return Fingerprint(
        n_cases=sum(p.n_cases for p in parts),
        n_foreground=sum(p.n_foreground for p in parts),
        channels=tuple(_sum([p.channels[i] for p in parts]) for i in range(len(first.channels))),
        geometry=tuple(Geometry(shape, spacing, n) for (shape, spacing), n in sorted(geometry.items())),
        relative_sizes=tuple(RelativeSize(share, n) for share, n in sorted(sizes.items())),
        exact_geometry=first.exact_geometry,
    )


def _sum(channels: Sequence[ChannelStatistics]) -> ChannelStatistics:
    keys, places = np.unique(np.concatenate([c.keys.numpy() for c in channels]), return_inverse=True)
    masses = np.zeros(len(keys), dtype=np.int64)
    np.add.at(masses, places, np.concatenate([c.masses.numpy() for c in channels]))
    return ChannelStatistics(
        mean_sum=sum(c.mean_sum for c in channels),
        square_sum=sum(c.square_sum for c in channels),
        minimum=min(c.minimum for c in channels),
        maximum=max(c.maximum for c in channels),
        keys=torch.from_numpy(keys.astype(np.int32)),
        masses=torch.from_numpy(masses),
    )
