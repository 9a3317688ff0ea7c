"""Prepared cases are nnU-Net's own, to the bit, from memory and from disk; and label maps come back in the file's geometry."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from concilium.data import preprocess as module
from concilium.data.dataset import Dataset, open_dataset
from concilium.data.plan import Plan
from concilium.data.preprocess import open_prepared, prepare, prepared_key, preprocess, restore
from concilium.errors import ContractError, DataError

MakePlan = Callable[..., Plan]
SITES = pytest.mark.parametrize(("site", "n_dims", "n_channels"), [("volumes", 3, 2), ("pictures", 2, 3)])


def stock(folder: Path, name: str, dataset: Dataset, plan: Plan, *, label: bool = True) -> tuple[Any, Any, Any]:
    """The case as nnU-Net reads and preprocesses it."""
    ending = dataset.file_ending
    images = sorted(str(p) for p in (folder / "imagesTr").glob(f"{name}_*{ending}"))
    labels = {"labels": dict(dataset.labels)}
    annotation = str(folder / "labelsTr" / f"{name}{ending}") if label else None
    return DefaultPreprocessor(verbose=False).run_case(images, annotation, plan.manager, plan.configuration, labels)


@contextmanager
def preprocessing_forbidden() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_run", lambda *_: pytest.fail("preprocessed again"))
        yield


@SITES
def test_equals_stock(
    site: str, n_dims: int, n_channels: int, make_plan: MakePlan, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, plan = request.getfixturevalue(site), make_plan(n_dims=n_dims, n_channels=n_channels)
    dataset = open_dataset(folder)
    for case in dataset.cases:
        image, label, properties = stock(folder, case.name, dataset, plan)
        prepared = prepare(case, dataset, plan, tmp_path)
        assert np.array_equal(prepared.image, image)
        assert np.array_equal(prepared.label, label)
        assert (prepared.image.dtype, prepared.label.dtype) == (np.float32, np.int16)
        assert -1 in label, "nothing lies outside the non-zero region: the test sees no mask"
        assert properties["shape_after_cropping_and_before_resampling"] != properties["shape_before_cropping"]
        locations = properties.pop("class_locations")
        assert list(prepared.locations) == list(locations)
        for key, voxels in locations.items():
            assert np.array_equal(prepared.locations[key], np.reshape(voxels, (-1, 4)))
            assert prepared.locations[key].dtype == np.int64
        assert_same_geometry(prepared.properties, properties)
        assert prepared.properties.keys() == properties.keys()


def test_volumes_are_resampled(volumes: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    dataset = open_dataset(volumes)
    prepared = prepare(dataset.cases[0], dataset, make_plan(n_dims=3, n_channels=2), tmp_path)
    # 30 x 40 x 18 voxels (z, y, x) lose 2, 3 and 4 of them, then turn to x, z, y: 14 x 28 x 37 of 2.5 x 1.1 x 0.8 mm
    assert prepared.properties["shape_before_cropping"] == (18, 30, 40)
    assert prepared.properties["shape_after_cropping_and_before_resampling"] == (14, 28, 37)
    assert prepared.image.shape == (2, round(14 * 2.5 / 2), round(28 * 1.1), round(37 * 0.8))


def assert_same_geometry(given: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same_geometry(given[name], value)
        else:
            assert np.array_equal(given[name], value), name


def test_missing_label_and_label_above_ten(volumes: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    dataset = open_dataset(volumes)
    many = replace(dataset, labels={"background": 0, **{f"l{i}": i for i in range(1, 12)}})
    locations = prepare(dataset.cases[2], many, make_plan(n_dims=3, n_channels=2), tmp_path).locations
    assert list(locations) == list(range(1, 12))
    assert len(locations[1]) > 0
    assert locations[2].shape == (0, 4)


def test_second_time_comes_from_disk(volumes: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    dataset, plan = open_dataset(volumes), make_plan(n_dims=3, n_channels=2)
    first = prepare(dataset.cases[0], dataset, plan, tmp_path)
    with preprocessing_forbidden():
        again = prepare(dataset.cases[0], dataset, plan, tmp_path)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)
    assert first.properties == again.properties
    assert [p.name for p in tmp_path.iterdir()] == [f"{prepared_key(dataset.cases[0], dataset, plan)}.safetensors"]


def test_arrays_are_mapped_and_read_only(volumes: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    dataset = open_dataset(volumes)
    prepared = prepare(dataset.cases[0], dataset, make_plan(n_dims=3, n_channels=2), tmp_path)
    for array in (prepared.image, prepared.label, *prepared.locations.values()):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable


def test_what_decides_the_key(volumes: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    folder = shutil.copytree(volumes, tmp_path / "site")
    dataset, case = open_dataset(folder), open_dataset(folder).cases[0]

    def key(**changes: Any) -> str:
        return prepared_key(case, dataset, make_plan(n_dims=3, n_channels=2, **changes))

    plain = key()
    assert key(batch_size=7, patch_size=[16, 16, 16], strides=[[1, 1, 1], [2, 2, 2]], batch_dice=True) == plain
    changed = [
        key(spacing=[2.0, 1.0, 1.1]),
        key(use_mask_for_norm=[False, False]),
        key(normalization_schemes=["CTNormalization", "ZScoreNormalization"]),
        key(resampling_fn_data_kwargs={"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}),
        key(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2]),
        prepared_key(dataset.cases[1], dataset, make_plan(n_dims=3, n_channels=2)),
    ]
    shutil.copy(folder / "imagesTr/c1_0001.nii.gz", folder / "imagesTr/c0_0001.nii.gz")
    changed.append(key())
    assert len({plain, *changed}) == 1 + len(changed)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "header", "length", "shape", "offset", "format", "other"])
def test_damaged_file_is_made_again(damage: str, volumes: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    dataset, plan = open_dataset(volumes), make_plan(n_dims=3, n_channels=2)
    first = prepare(dataset.cases[0], dataset, plan, tmp_path)
    good = first.path.read_bytes()
    damaged = {
        "cut": good[:-1],
        "longer": good + b"\0",
        "empty": b"",
        "header": good[:8] + b"[" + good[9:],
        "length": (1 << 62).to_bytes(8, "little") + good[8:],
        "shape": good.replace(b'"shape":[1,', b'"shape":[9,', 1),
        "offset": good.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
        "format": good.replace(b"concilium.prepared/1", b"concilium.prepared/0", 1),
        "other": good.replace(b'"image"', b'"imago"', 1),
    }[damage]
    assert damaged != good
    first.path.unlink()
    first.path.write_bytes(damaged)
    with pytest.raises(ContractError, match="Delete it"):
        open_prepared(first.path)
    again = prepare(dataset.cases[0], dataset, plan, tmp_path)
    assert again.path.read_bytes() == good


def test_interrupted_writing_leaves_nothing(
    volumes: Path, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", full)
    dataset = open_dataset(volumes)
    with pytest.raises(OSError, match="disk full"):
        prepare(dataset.cases[0], dataset, make_plan(n_dims=3, n_channels=2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_pickle(volumes: Path, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(f"pickle.{name}", lambda *_, **__: pytest.fail("pickle"))
    dataset, plan = open_dataset(volumes), make_plan(n_dims=3, n_channels=2)
    path = prepare(dataset.cases[0], dataset, plan, tmp_path).path
    open_prepared(path)
    assert b"\x80\x04\x95" not in path.read_bytes()[:4096]


def test_case_without_label_is_refused(volumes: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    dataset = open_dataset(volumes)
    case = replace(dataset.cases[0], label=None)
    with pytest.raises(DataError, match="c0 has no label map"):
        prepare(case, dataset, make_plan(n_dims=3, n_channels=2), tmp_path)


def test_unknown_preprocessor_is_refused(volumes: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    dataset = open_dataset(volumes)
    with pytest.raises(ContractError, match="preprocessor Other"):
        prepare(dataset.cases[0], dataset, make_plan(n_dims=3, n_channels=2, preprocessor_name="Other"), tmp_path)


@SITES
def test_prediction_sees_what_stock_sees(
    site: str,
    n_dims: int,
    n_channels: int,
    make_plan: MakePlan,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, plan = request.getfixturevalue(site), make_plan(n_dims=n_dims, n_channels=n_channels)
    dataset = open_dataset(folder)
    expected, _, _ = stock(folder, dataset.cases[0].name, dataset, plan, label=False)
    capsys.readouterr()
    image, properties = preprocess(dataset.cases[0], dataset, plan)
    assert np.array_equal(image, expected)
    assert "class_locations" not in properties
    assert capsys.readouterr().out == ""


def test_restored_into_the_file(volumes: Path, make_plan: MakePlan) -> None:
    """One voxel row per axis, marked in the preprocessed image, is found at its place [voxels] of the file."""
    plan = make_plan(n_dims=3, n_channels=2, spacing=[2.5, 1.1, 0.8])  # the files' own: nothing is resampled
    dataset = open_dataset(volumes)
    image, properties = preprocess(dataset.cases[0], dataset, plan)
    logits = torch.zeros(3, *image.shape[1:])
    logits[0] = 1
    logits[1, 5] = 2  # x = 5: cropping took none below it
    logits[2, :, 7, 9] = 3  # z = 7 + 2, y = 9 + 3
    label = restore(logits, plan, dataset.labels, properties)
    assert label.shape == (30, 40, 18)
    expected = np.zeros((30, 40, 18))
    expected[2:, 3:, 5] = 1
    expected[9, 12, :14] = 2
    assert np.array_equal(label, expected)
