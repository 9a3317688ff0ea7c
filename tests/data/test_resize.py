"""Every image at one size: what the network sees, the way back, and what a study may say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate, one_hot

from concilium.data._resize import _linear, _scaled
from concilium.data.dataset import Dataset, open_dataset, read_case
from concilium.data.fingerprint import fingerprint_of_case, merge
from concilium.data.plan import Plan, make_plans, open_plan
from concilium.data.preprocess import prepare, prepared_key, preprocess, restore
from concilium.errors import StudyError
from concilium.line import run
from concilium.study import parse_study

Site = tuple[Dataset, Callable[..., Plan]]


@pytest.fixture(params=["volumes", "pictures"])
def site(request: pytest.FixtureRequest) -> Site:
    """A data set, and `plan(size=..., intensity=...)` for it by the planner."""
    dataset = open_dataset(request.getfixturevalue(request.param))
    flat = request.param == "pictures"
    fingerprints = []
    for case in dataset.cases:
        image, label, properties = read_case(case, dataset)
        assert label is not None
        fingerprints.append(fingerprint_of_case(image, label, properties["spacing"], exact_geometry=True))

    def plan(*, size: tuple[int, ...] = (32, 24) if flat else (16, 32, 24), intensity: Any = "zscore") -> Plan:
        name = "2d" if len(size) == 2 else "3d_fullres"
        text = make_plans(
            merge(fingerprints), channels=dataset.channels, labels=dataset.labels, file_ending=dataset.file_ending,
            configuration=name, resize={"size": size, "intensity": intensity},
        )  # fmt: skip
        return open_plan(text, name)

    return dataset, plan


def test_every_image_has_the_size_and_is_one_patch(site: Site, tmp_path: Path) -> None:
    dataset, make = site
    plan = make()
    for case in dataset.cases:
        prepared = prepare(case, dataset, plan, tmp_path)
        original = read_case(case, dataset)[1]
        assert original is not None
        assert prepared.image.shape[1:][-len(plan.patch_size) :] == plan.patch_size
        assert prepared.label.shape[1:] == prepared.image.shape[1:]
        nearest = interpolate(torch.from_numpy(original)[None], prepared.label.shape[1:], mode="nearest-exact")[0]
        np.testing.assert_array_equal(prepared.label, nearest)
        assert prepared.image.mean(axis=(1, 2, 3)) == pytest.approx(0, abs=1e-5)
        assert prepared.image.std(axis=(1, 2, 3)) == pytest.approx(1, abs=1e-5)
        for value, places in prepared.locations.items():
            assert (prepared.label[tuple(places.T)] == value).all()
        image, _ = preprocess(case, dataset, plan)
        np.testing.assert_array_equal(image, prepared.image)
    assert all(n % s == 0 for n, s in zip(plan.patch_size, np.prod(plan.strides, axis=0), strict=True))


def test_volumes_can_be_resized_slice_by_slice(volumes: Path, tmp_path: Path) -> None:
    dataset = open_dataset(volumes)
    image, label, properties = read_case(dataset.cases[0], dataset)
    assert label is not None
    text = make_plans(
        fingerprint_of_case(image, label, properties["spacing"], exact_geometry=True), channels=dataset.channels,
        labels=dataset.labels, file_ending=dataset.file_ending, configuration="2d",
        resize={"size": (32, 24), "intensity": "0-1"},
    )  # fmt: skip
    prepared = prepare(dataset.cases[0], dataset, open_plan(text, "2d"), tmp_path)
    assert prepared.image.shape == (2, image.shape[1], 32, 24)


def test_the_way_back_ends_at_the_original_size(site: Site) -> None:
    """The resized label map as logits comes back as the label map, but for voxels on its surface."""
    dataset, make = site
    plan = make()
    case = dataset.cases[0]
    _, label, _ = read_case(case, dataset)
    assert label is not None
    _, properties = preprocess(case, dataset, plan)
    shape = (*label.shape[1:][: 3 - len(plan.patch_size)], *plan.patch_size)
    small = interpolate(torch.from_numpy(label)[None], shape, mode="nearest-exact")[0, 0].long()
    logits = 8.0 * one_hot(small, len(dataset.labels)).movedim(-1, 0)
    back = restore(logits.half(), plan, dataset.labels, properties)
    assert back.shape == label.shape[1:]
    for value in np.unique(label)[1:]:
        a, b = back == value, label[0] == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85


@pytest.mark.parametrize(("n", "kind"), [(256, np.uint8), (300, np.uint16)])
def test_ids_above_255_do_not_wrap(site: Site, n: int, kind: type) -> None:
    _, make = site
    labels = {"background": 0} | {f"part {i}": i for i in range(1, n)}
    highest = one_hot(torch.full((1, 2, 3), n - 1), n).movedim(-1, 0).float()
    back = restore(highest, make(), labels, {"shape_before_cropping": [1, 4, 6]})
    assert back.dtype == kind
    assert (back == n - 1).all()


def test_at_the_original_size_nothing_is_lost(site: Site, tmp_path: Path) -> None:
    dataset, make = site
    case = dataset.cases[0]
    image, label, _ = read_case(case, dataset)
    assert label is not None
    plan = make(intensity=[0.0, 1e6])
    size = label.shape[1:] if len(plan.patch_size) == 3 else label.shape[2:]
    plan.configuration.configuration["resize"]["size"] = list(size)
    prepared = prepare(case, dataset, plan, tmp_path)
    np.testing.assert_array_equal(prepared.label, label)
    np.testing.assert_allclose(prepared.image * 1e6, np.clip(image, 0, None), rtol=1e-5)
    logits = one_hot(torch.from_numpy(label[0]).long(), len(dataset.labels)).movedim(-1, 0)
    np.testing.assert_array_equal(restore(logits, plan, dataset.labels, prepared.properties), label[0])


def test_axis_by_axis_is_the_plane_at_once() -> None:
    plane = torch.rand(3, 1, 50, 37)
    expected = interpolate(plane[:, 0][None], (16, 60), mode="bilinear", antialias=True, align_corners=False)[0]
    torch.testing.assert_close(_linear(plane, (1, 16, 60))[:, 0], expected)


def test_shrinking_averages_and_does_not_pick() -> None:
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert _linear(noise, (1, 8, 8)).std() < 0.2  # two neighbours along each axis alone would leave a half


def test_intensities_are_scaled_as_asked() -> None:
    channel = np.array([-1000.0, 0.0, 100.0, 3000.0], np.float32)
    np.testing.assert_allclose(_scaled(channel, [-100, 300]), [0, 0.25, 0.5, 1])
    np.testing.assert_allclose(_scaled(channel, "0-1"), [0, 0.25, 0.275, 1])
    np.testing.assert_allclose(_scaled(channel, "zscore"), (channel - 525) / channel.std())
    assert not _scaled(np.full(3, 7, np.float32), "zscore").any()
    assert not _scaled(np.full(3, 7, np.float32), "0-1").any()


def test_another_size_or_intensity_is_another_prepared_case(site: Site) -> None:
    dataset, make = site
    plans = [make(), make(intensity="0-1"), make(size=(32, 32) if len(make().patch_size) == 2 else (16, 32, 32))]
    assert len({prepared_key(dataset.cases[0], dataset, plan) for plan in plans}) == 3
    assert prepared_key(dataset.cases[0], dataset, make()) == prepared_key(dataset.cases[0], dataset, plans[0])


def study(folder: Path = Path("/studies"), *, check_data: bool = False, **tables: dict[str, Any]) -> Any:
    raw: dict[str, Any] = {
        "study": {"name": "x"},
        "sites": {name: {"data": name} for name in ("north", "south", "west")},
        "protocol": {"rounds": 1, "steps": 1},
    }
    return parse_study(raw | tables, folder=folder, check_data=check_data)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"preprocessing": {"name": "nnunet", "size": [8, 8]}}, "size = (8, 8) is not used by name = 'nnunet'"),
        ({"preprocessing": {"name": "resize"}}, "size = None is not allowed. Allowed with configuration '3d_fullres': 3"),
        ({"preprocessing": {"name": "resize", "size": [64, 64]}}, "size = [64, 64] is not allowed. Allowed with conf"),
        ({"preprocessing": {"name": "resize", "size": [64, 64, 4]}}, "size = [64, 64, 4] is not allowed."),
        (
            {"preprocessing": {"name": "resize", "size": [64, 64, 64], "intensity": [1, 1]}},
            "intensity = [1.0, 1.0] is not allowed. Allowed: 'zscore', '0-1' or [low, high].",
        ),
        (
            {"preprocessing": {"name": "resize", "size": [64, 64, 64]}, "training": {"patch_size": [8, 8, 8]}},
            "patch_size = [8, 8, 8] is not allowed with resize.",
        ),
        (
            {"preprocessing": {"name": "resize", "size": [64, 64, 64]}, "plan": {"configuration": "3d_lowres"}},
            "configuration = '3d_lowres' is not allowed with resize. Allowed: '2d', '3d_fullres'.",
        ),
    ],
)  # fmt: skip
def test_what_a_study_may_not_say(tables: dict[str, Any], expected: str) -> None:
    with pytest.raises(StudyError) as e:
        study(**tables)
    assert "has 1 error:" in str(e.value)
    assert expected in str(e.value)


def test_a_federation_trains_and_scores_at_one_size(phantom: Path, tmp_path: Path) -> None:
    made = study(
        phantom,
        check_data=True,
        preprocessing={"name": "resize", "size": [16, 24, 24], "intensity": "0-1"},
        network={"base_features": 4},
        training={"batch_size": 2, "mirror": False},
        engine={"threads": 1, "device": "cpu"},
    )
    outcome = run(made, tmp_path / "run")
    assert outcome.exit_code == 0
    configuration = json.loads((outcome.folder / "plans.json").read_text())["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [16, 24, 24]
    assert configuration["resize"] == {"size": [16, 24, 24], "intensity": "0-1"}
    assert all(c["status"] for c in outcome.results["cases"])
