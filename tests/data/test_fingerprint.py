"""Fingerprints that add up, against nnU-Net's own extractor on the pooled data and against sums worked out here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concilium import wire
from concilium.data.dataset import open_dataset, read_case
from concilium.data.fingerprint import (
    CASE_MASS,
    fingerprint_of_case,
    from_json,
    mean_std,
    merge,
    percentile,
    to_json,
    to_nnunet,
)
from concilium.errors import ContractError, DataError
from concilium.messages import Fingerprint

STD = 20.0
MEANS = {"north": 100.0, "south": 160.0, "west": 220.0}  # three standard deviations apart


def draw(rng: np.random.Generator, mean: float, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two channels of whole numbers (the second spread wider, below 0) with a margin of zeros, and a block of foreground."""
    first = np.round(rng.normal(mean, STD, shape))
    image = np.stack([first, np.round(rng.normal(-3 * mean, 4 * STD, shape))]).astype(np.float32)
    image[:, :2] = 0
    label = np.zeros(shape, np.uint8)
    label[4:-2, 3:-3, 3:-3] = 1
    label[-3, 3:-3, 3:-3] = 2
    return image, label


def sites_of(folder: Path, write_site: Callable[..., Path]) -> list[Path]:
    """Three sites of 5, 4 and 2 cases; one case of the first has no foreground."""
    rng = np.random.default_rng(3)
    found = []
    for (name, mean), n, spacing in zip(
        MEANS.items(), (5, 4, 2), ((1.0, 0.7, 0.7), (1.2, 0.71, 0.7), (3.0, 0.5, 0.5)), strict=True
    ):
        cases = {f"{name}{i}": draw(rng, mean, (20 + i, 18, 17 + i)) for i in range(n)}
        if name == "north":
            cases["north0"][1][:] = 0
        labels = {"background": 0, "a": 1, "b": 2}
        found.append(write_site(folder / name, cases, spacing=spacing, channels=("T1", "T2"), labels=labels))
    return found


def of_site(folder: Path, *, exact_geometry: bool = True) -> list[Fingerprint]:
    dataset = open_dataset(folder)
    read = [read_case(case, dataset) for case in dataset.cases]
    return [
        fingerprint_of_case(image, label, about["spacing"], exact_geometry=exact_geometry)
        for image, label, about in read
        if label is not None
    ]


def single(values: list[float], **changes: Any) -> Fingerprint:
    """The fingerprint of a case whose foreground has these values."""
    image = np.array(values, np.float32).reshape(1, 1, 1, -1)
    made = fingerprint_of_case(image, np.ones_like(image), (1.0, 1.0, 1.0), exact_geometry=True)
    return replace(made, **changes)


def same(a: Fingerprint, b: Fingerprint) -> bool:
    return to_json(a) == to_json(b)


def naive_std(sites: list[list[Fingerprint]], channel: int) -> float:
    """The published rule: standard deviations of the sites, weighted by their numbers of cases."""
    merged = [merge(site) for site in sites]
    stds = [mean_std(f.channels[channel], f.n_foreground)[1] for f in merged]
    return float(np.average(stds, weights=[f.n_cases for f in merged]))


# ------------------------------------------------------------------------------------------------- against nnU-Net (N1)


def compare(ours: dict[str, Any], theirs: dict[str, Any], *, bins: float) -> None:
    """N1 of the acceptance experiments; `bins` is how many bins a percentile may be off."""
    for key in ("spacings", "shapes_after_crop"):
        assert sorted(ours[key]) == sorted(theirs[key])
    assert ours["median_relative_size_after_cropping"] == pytest.approx(
        theirs["median_relative_size_after_cropping"], abs=1 / 1024
    )
    assert (
        ours["foreground_intensity_properties_per_channel"].keys()
        == theirs["foreground_intensity_properties_per_channel"].keys()
    )
    for key, b in theirs["foreground_intensity_properties_per_channel"].items():
        a = ours["foreground_intensity_properties_per_channel"][key]
        assert a.keys() == b.keys()
        assert (a["min"], a["max"]) == (b["min"], b["max"])
        assert abs(a["mean"] - b["mean"]) < 0.005 * b["std"]
        assert a["std"] == pytest.approx(b["std"], rel=0.01)
        for name in ("percentile_00_5", "median", "percentile_99_5"):
            width = max(1.0, 2.0 ** (math.floor(math.log2(abs(b[name]) or 1)) - 10))  # whole numbers: 1 up to 2048
            assert abs(a[name] - b[name]) <= bins * width, name


def test_three_shifted_sites_give_the_fingerprint_of_the_pooled_data(
    tmp_path: Path, write_site: Callable[..., Path], pool: Callable[..., Any]
) -> None:
    folders = sites_of(tmp_path, write_site)
    sites = [of_site(folder) for folder in folders]
    theirs = pool(folders).fingerprint(n_samples=5_000_000)
    merged = merge(merge(site) for site in sites)
    assert (merged.n_cases, merged.n_foreground) == (11, 10)
    compare(to_nnunet(merged), theirs, bins=1)
    for channel in range(2):
        pooled = theirs["foreground_intensity_properties_per_channel"][str(channel)]["std"]
        assert abs(naive_std(sites, channel) / pooled - 1) > 0.3


@pytest.mark.parametrize("name", ["hippocampus", "vessels"])
def test_real_sites_give_the_fingerprint_of_the_pooled_data(
    name: str, federation: Callable[[str], Path], pool: Callable[..., Any]
) -> None:
    folders = [f for f in sorted(federation(name).iterdir()) if not f.name.startswith("test")]
    merged = merge(f for folder in folders for f in of_site(folder))
    compare(to_nnunet(merged), pool(folders).fingerprint(n_samples=3_000_000), bins=1)


def test_statistics_are_those_of_the_voxels_with_equal_mass_per_case() -> None:
    """Against NumPy on the values themselves, with unequal numbers of voxels; percentiles within one bin (2**-10)."""
    rng = np.random.default_rng(0)
    cases = [rng.normal(m, s, n) for m, s, n in ((50, 3, 400), (-20, 9, 3000), (1e4, 1, 50))]
    merged = merge(single(list(c)) for c in cases)
    values = np.concatenate(cases).astype(np.float32).astype(np.float64)
    mass = np.concatenate([np.full(len(c), 1 / len(c)) for c in cases])
    mean, std = mean_std(merged.channels[0], 3)
    assert mean == pytest.approx(np.average(values, weights=mass), rel=1e-12)
    assert std == pytest.approx(
        math.sqrt(np.average((values - np.average(values, weights=mass)) ** 2, weights=mass)), rel=1e-12
    )
    order = np.argsort(values)
    for q in (0, 0.507, 10.01, 33.01, 50.01, 70.03, 99.47, 100):
        exact = values[order][min(np.searchsorted(np.cumsum(mass[order]) / 3, q / 100), len(values) - 1)]
        assert percentile(merged.channels[0], q) == pytest.approx(exact, rel=2**-10)


def test_a_small_spread_around_a_large_mean_is_kept() -> None:
    _, std = mean_std(single([1e6, 1e6 + 1]).channels[0], 1)
    assert std == 0.5


# -------------------------------------------------------------------------------------------------------------- merging


def test_order_and_grouping_do_not_change_a_bit(tmp_path: Path, write_site: Callable[..., Path]) -> None:
    first, *others = ([f for site in sites_of(tmp_path, write_site) for f in of_site(site)])[:5]
    parts = [first, *others]
    whole = merge(parts)
    for order in itertools.permutations(parts):
        assert same(merge(order), whole)
        assert same(merge([merge(order[:2]), merge([merge(order[2:3]), merge(order[3:])])]), whole)
    packed = {wire.pack(merge(order)) for order in itertools.islice(itertools.permutations(parts), 20)}
    assert len(packed) == 1


def test_many_cases_are_merged_as_few_are() -> None:
    rng = np.random.default_rng(1)
    parts = [single(list(rng.normal(i, 1, 20))) for i in range(200)]
    halves = merge([merge(parts[:3]), merge(parts[3:150]), merge(parts[150:])])
    assert same(merge(reversed(parts)), halves)
    assert halves.n_cases == 200
    assert mean_std(halves.channels[0], 200)[0] == pytest.approx(99.5, abs=0.1)


def test_every_case_has_the_same_mass() -> None:
    for values in ([1.0], [1.0, 2.0, 3.0], list(range(1, 1001)), [5.0] * 7 + [6.0]):
        assert int(single(values).channels[0].masses.sum()) == CASE_MASS
    thirds = single([1.0, 2.0, 3.0]).channels[0].masses.tolist()
    assert thirds == [1431655766, 1431655765, 1431655765]  # 2**32 / 3 = 1431655765 1/3: the lowest key gets the rest
    two = merge([single([1.0]), single([2.0] * 999)])
    assert two.channels[0].masses.tolist() == [CASE_MASS, CASE_MASS]


def test_keys_sort_like_values_and_keep_ten_bits() -> None:
    made = single([-2048.0, -1000.5, -1e-30, 0.0, -0.0, 1e-30, 3.0, 2047.0, 2049.0, 3e38]).channels[0]
    assert made.keys.dtype is torch.int32
    assert made.keys.tolist() == sorted(set(made.keys.tolist()))
    assert (int(made.keys[0]), int(made.keys[3]), int(made.keys[-3])) == (-(0x45000000 >> 13), 0, 0x44FFE000 >> 13)
    assert [percentile(made, q) for q in (5, 15, 65, 75, 85, 100)] == [
        -2048.0,
        -1000.5,
        3.0,
        2047.0,
        2050.0,  # half way: away from 0
        pytest.approx(3e38, rel=2**-10),
    ]
    assert percentile(single([float(np.finfo(np.float32).max)]).channels[0], 50) == float(np.finfo(np.float32).max)


def test_cases_without_foreground_are_counted_and_weigh_nothing() -> None:
    image = np.full((1, 3, 3, 3), 7, np.float32)
    empty = fingerprint_of_case(image, np.zeros_like(image), (1, 1, 1), exact_geometry=True)
    full = single([1.0, 3.0])
    both = merge([empty, full, empty])
    assert (both.n_cases, both.n_foreground) == (3, 1)
    assert (
        to_nnunet(both)["foreground_intensity_properties_per_channel"]
        == to_nnunet(full)["foreground_intensity_properties_per_channel"]
    )
    assert len(to_nnunet(both)["spacings"]) == 3
    assert same(from_json(to_json(empty)), empty)
    with pytest.raises(DataError, match="foreground"):
        to_nnunet(empty)


def test_what_does_not_belong_together_is_refused() -> None:
    exact = single([1.0])
    image = np.ones((2, 1, 1, 4), np.float32)
    two = fingerprint_of_case(image, image[:1], (1, 1, 1), exact_geometry=True)
    for other, word in ((replace(exact, exact_geometry=False), "geometry"), (two, "channels")):
        with pytest.raises(ContractError, match=word):
            merge([exact, other])
    with pytest.raises(ContractError, match="At least one"):
        merge([])
    with pytest.raises(ContractError, match="belong together"):
        fingerprint_of_case(image, image, (1, 1, 1), exact_geometry=True)
    with pytest.raises(ContractError, match="0 to 100"):
        percentile(exact.channels[0], 101)


# ------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("exact", "shape", "spacing"),
    [
        (True, (255, 257, 19), (0.7031, 1.0, 3.3)),
        (False, (255, 256, 19), (0.703125, 1.0, 3.30078125)),
    ],
)
def test_geometry_is_binned_unless_asked(exact: bool, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    image = np.ones((1, 255, 257, 19), np.float32)
    (made,) = fingerprint_of_case(image, image, (0.7031, 1.0, 3.3), exact_geometry=exact).geometry
    assert (made.shape, made.spacing, made.count) == (shape, spacing, 1)


def test_shape_and_size_are_those_of_the_non_zero_region_of_any_channel(tmp_path: Path) -> None:
    image = np.zeros((2, 10, 10, 10), np.float32)
    image[0, 2:5, 3:9, 3:9] = 1
    image[1, 4:6, 3:9, 3:9] = 1
    label = np.zeros((1, 10, 10, 10), np.uint8)
    label[0, :4, 5, 5] = 1  # half of it outside
    before = label.copy()
    made = fingerprint_of_case(image, label, (1, 1, 1), exact_geometry=True)
    assert made.geometry[0].shape == (4, 6, 6)
    assert made.relative_sizes[0].share == 1024 * 4 * 6 * 6 // 1000
    assert made.channels[0].minimum == 1  # not the zeros outside
    assert (label == before).all()


@pytest.mark.parametrize(("kept", "below"), [(7497, True), (7500, False)])
def test_whether_less_than_three_quarters_are_kept_survives_rounding(kept: int, below: bool) -> None:
    image = np.zeros((1, 1, 1, 10_000), np.float32)
    image[..., :kept] = 1
    made = to_nnunet(fingerprint_of_case(image, image, (1, 1, 1), exact_geometry=True))
    assert (made["median_relative_size_after_cropping"] < 0.75) is below


# -------------------------------------------------------------------------------------------------------------- privacy


def test_a_fingerprint_is_a_message_without_names_or_voxels(tmp_path: Path, write_site: Callable[..., Path]) -> None:
    """It crosses the wire bit for bit, holds no case's name or folder, and does not grow with the number of voxels."""
    folder = sites_of(tmp_path, write_site)[0]
    merged = merge(of_site(folder, exact_geometry=False))
    packed = wire.pack(merged)
    received = wire.unpack(packed)
    assert same(received, merged)
    assert same(from_json(to_json(merged)), merged)
    for text in (packed, to_json(merged).encode()):
        for secret in (b"north", str(tmp_path).encode(), b"nii"):
            assert secret not in text
    rng = np.random.default_rng(0)
    sizes = []
    for n in (20, 40):
        image = np.round(rng.normal(100, 5, (1, n, n, n))).astype(np.float32)
        made = fingerprint_of_case(image, np.ones_like(image), (1, 1, 1), exact_geometry=False)
        tensors = [v for c in asdict(made)["channels"] for v in c.values() if isinstance(v, torch.Tensor)]
        sizes.append(max(len(t) for t in tensors))
    assert sizes[1] < 2 * sizes[0] < 200  # eight times the voxels
    shuffled = image.reshape(-1)[rng.permutation(image.size)].reshape(image.shape)  # where a voxel lies is not told
    again = fingerprint_of_case(shuffled, np.ones_like(image), (1, 1, 1), exact_geometry=False)
    assert torch.equal(again.channels[0].keys, made.channels[0].keys)
    assert torch.equal(again.channels[0].masses, made.channels[0].masses)


@pytest.mark.parametrize("text", ["", "[]", '{"channels": []}', '{"channels": 3}'])
def test_what_is_no_fingerprint_is_refused(text: str) -> None:
    with pytest.raises(ContractError, match="cannot be read"):
        from_json(text)
