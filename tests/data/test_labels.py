"""Regions and voxels to be ignored, from the file to the label map: nnU-Net's own arrays, batches and predictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from concilium.answers.evaluate import score_labels
from concilium.data.dataset import open_dataset, read_case
from concilium.data.draws import seed_all
from concilium.data.fingerprint import fingerprint_of_case, merge
from concilium.data.fingerprint import to_nnunet as to_nnunet_fingerprint
from concilium.data.labels import foreground, from_nnunet, has_regions, ignored, n_heads, to_nnunet
from concilium.data.patches import Batches
from concilium.data.plan import PLANNERS, Plan, make_plans
from concilium.data.preprocess import Prepared, prepare, preprocess, restore
from concilium.messages import PlugIn

MakePlan = Callable[..., Plan]
WHOLE = {"background": 0, "whole": [1, 2], "posterior": 2}
SPACES: dict[str, dict[str, Any]] = {
    "regions": {"labels": WHOLE, "regions_class_order": [1, 2]},
    "other_order": {"labels": {"background": 0, "whole": [1, 2], "anterior": 1}, "regions_class_order": [2, 1]},
    "ignore": {"labels": {"background": 0, "anterior": 1, "posterior": 2, "ignore": 3}},
    "both": {"labels": {**WHOLE, "ignore": 3}, "regions_class_order": [1, 2]},
}
"""Name -> what `dataset.json` says."""
every_space = pytest.mark.parametrize("space", SPACES)


@pytest.fixture
def site(space: str, volumes: Path, tmp_path: Path) -> Path:
    """The volumes with these labels; where there is `ignore`, only four slices are annotated."""
    folder = tmp_path / "site"
    shutil.copytree(volumes, folder)
    path = folder / "dataset.json"
    about = json.loads(path.read_text()) | SPACES[space]
    path.write_text(json.dumps(about))
    for file in (folder / "labelsTr").iterdir() if "ignore" in about["labels"] else ():
        image = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(image)
        array[: len(array) // 2 - 2] = array[len(array) // 2 + 2 :] = 3
        changed = sitk.GetImageFromArray(array)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(file))
    return folder


def stock_case(folder: Path, name: str, plan: Plan) -> tuple[Any, Any, Any]:
    """The case as nnU-Net reads and preprocesses it, by the `dataset.json` as it lies there."""
    images = sorted(str(p) for p in (folder / "imagesTr").glob(f"{name}_*"))
    annotation = str(folder / "labelsTr" / f"{name}.nii.gz")
    about = str(folder / "dataset.json")
    return DefaultPreprocessor(verbose=False).run_case(images, annotation, plan.manager, plan.configuration, about)


def prepared(folder: Path, plan: Plan, cache: Path) -> dict[str, Prepared]:
    dataset = open_dataset(folder)
    return {c.name: prepare(c, dataset, plan, cache) for c in dataset.cases}


# ------------------------------------------------------------------------------------------------------- the mapping


@every_space
def test_what_labels_mean(space: str) -> None:
    labels = from_nnunet(SPACES[space])
    assert n_heads(labels) == (2 if "regions_class_order" in SPACES[space] else 3)
    assert has_regions(labels) is ("regions_class_order" in SPACES[space])
    assert ignored(labels) == SPACES[space]["labels"].get("ignore")
    assert list(foreground(labels)) == [n for n in SPACES[space]["labels"] if n not in ("background", "ignore")]
    assert to_nnunet(labels) == SPACES[space]
    assert from_nnunet(json.loads(json.dumps(to_nnunet(labels)))) == labels


def test_a_region_of_one_id_is_a_label() -> None:
    assert from_nnunet({"labels": {"background": 0, "b": [2], "a": [1]}}) == {"background": 0, "a": 1, "b": 2}
    mixed = from_nnunet({"labels": {"background": 0, "a": [1, 2], "b": [2]}, "regions_class_order": [1, 2]})
    assert mixed == {"background": 0, "a": (1, 2), "b": 2}


# ----------------------------------------------------------------------------------------------------- nnU-Net's own


@every_space
def test_prepared_cases_are_nnu_nets(site: Path, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(n_dims=3, n_channels=2)
    for name, case in prepared(site, plan, tmp_path / "cache").items():
        image, label, properties = stock_case(site, name, plan)
        assert np.array_equal(case.image, image)
        assert np.array_equal(case.label, label)
        locations = properties["class_locations"]
        assert list(case.locations) == list(locations)
        for key, voxels in locations.items():
            assert np.array_equal(case.locations[key], np.reshape(voxels, (-1, 4)))


@every_space
@pytest.mark.parametrize("augmentation", ["nnunet", "none"])
def test_batches_are_nnu_nets(site: Path, space: str, augmentation: str, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(n_dims=3, n_channels=2)
    cases = prepared(site, plan, tmp_path / "cache")
    rules = plan.manager.get_label_manager(json.loads((site / "dataset.json").read_text()))
    trainer = object.__new__(nnUNetTrainer)
    trainer.configuration_manager, trainer.enable_deep_supervision = plan.configuration, True
    trainer.print_to_log_file = lambda *_, **__: None
    rotation, flat, initial, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    scales = trainer._get_deep_supervision_scales()
    size = tuple(plan.configuration.patch_size)
    apart = {"regions": rules.foreground_regions if rules.has_regions else None, "ignore_label": rules.ignore_label}
    if augmentation == "nnunet":
        mask = plan.configuration.use_mask_for_norm
        transforms = trainer.get_training_transforms(
            size, rotation, scales, axes, flat, use_mask_for_norm=mask, **apart
        )
        for part in transforms.transforms:
            if isinstance(getattr(part, "transform", None), GaussianBlurTransform):
                part.transform.benchmark = False
    else:
        transforms, initial = trainer.get_validation_transforms(scales, **apart), size

    class InMemory:
        identifiers = sorted(cases)

        def load_case(self, name: str) -> tuple[Any, Any, None, dict[str, Any]]:
            image, label, properties = stock_case(site, name, plan)
            return image, label, None, properties

    theirs = nnUNetDataLoader(
        InMemory(), 3, initial, size, rules, oversample_foreground_percent=0.34, transforms=transforms
    )
    labels = open_dataset(site).labels
    ours = Batches(
        cases, plan=plan, labels=labels, batch_size=3, foreground=0.34, mirror=True, augmentation=augmentation,
        deep_supervision=True,
    )  # fmt: skip
    for step in range(3):
        image, targets, *_ = ours.draw(7, "north", 1, step)
        seed_all(7, "north", 1, step)
        expected = theirs.generate_train_batch()
        assert torch.equal(image, expected["data"])
        assert len(targets) == len(expected["target"])
        assert all(torch.equal(a, b) for a, b in zip(targets, expected["target"], strict=True))
        assert targets[0].shape[1] == {"regions": 2, "other_order": 2, "ignore": 1, "both": 3}[space]


@pytest.mark.parametrize("space", ["ignore", "both"])
def test_no_patch_is_drawn_where_nothing_is_annotated(
    site: Path, space: str, make_plan: MakePlan, tmp_path: Path
) -> None:
    """Of a volume of about 30 mm four slices are annotated: a patch of a few slices, anywhere, would miss them."""
    plan = make_plan(n_dims=3, n_channels=2, patch_size=[4, 8, 8], spacing=[2.5, 1.1, 0.8])
    batches = Batches(
        prepared(site, plan, tmp_path / "cache"), plan=plan, labels=open_dataset(site).labels, batch_size=2, foreground=0.0,
        mirror=False, augmentation="none", deep_supervision=False,
    )  # fmt: skip
    for step in range(20):
        _, (target,), *_ = batches.draw(step)
        unknown = target[:, -1] if space == "both" else target[:, 0] == 3
        assert all(not patch.all() for patch in unknown)


@every_space
def test_label_maps_are_those_of_nnu_nets_label_manager(site: Path, space: str, make_plan: MakePlan) -> None:
    plan, dataset = make_plan(n_dims=3, n_channels=2), open_dataset(site)
    image, properties = preprocess(dataset.cases[0], dataset, plan)
    logits = torch.randn(n_heads(dataset.labels), *image.shape[1:], generator=torch.Generator().manual_seed(0))
    expected = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.clone(), plan.manager, plan.configuration, plan.manager.get_label_manager(SPACES[space]), properties
    )
    label = restore(logits, plan, dataset.labels, properties)
    assert np.array_equal(label, expected)
    assert set(np.unique(label)) == {0, 1, 2}  # never the one to be ignored


@every_space
def test_the_fingerprint_counts_foreground_as_nnu_net_does(
    site: Path, space: str, pool: Callable[..., Any], tmp_path: Path
) -> None:
    """nnU-Net counts voxels to be ignored as foreground (it asks for ids above 0), and plans heads as its labels say."""
    dataset = open_dataset(site)
    read = [read_case(case, dataset) for case in dataset.cases]
    merged = merge([
        fingerprint_of_case(image, label, about["spacing"], exact_geometry=True)
        for image, label, about in read if label is not None
    ])  # fmt: skip
    pooled = pool([site])
    theirs = pooled.fingerprint(n_samples=300_000)["foreground_intensity_properties_per_channel"]
    for key, ours in to_nnunet_fingerprint(merged)["foreground_intensity_properties_per_channel"].items():
        assert (ours["min"], ours["max"]) == (theirs[key]["min"], theirs[key]["max"])
        assert ours["mean"] == pytest.approx(theirs[key]["mean"], abs=0.01 * theirs[key]["std"])
    plans = make_plans(
        merged, channels=dataset.channels, labels=dataset.labels, file_ending=".nii.gz", configuration="3d_fullres"
    )
    expected = pooled.plans(PLANNERS["default"])["configurations"]
    assert json.loads(plans)["configurations"] == expected


# --------------------------------------------------------------------------------------------------------------- scores


def test_regions_are_scored_as_unions_and_ignored_voxels_not_at_all() -> None:
    reference = np.array([[[0, 1, 1, 2, 2, 3, 3, 0]]])
    prediction = np.array([[[0, 1, 2, 2, 1, 1, 2, 1]]])
    metrics = [PlugIn("dice"), PlugIn("iou")]
    labels = from_nnunet(SPACES["both"])
    whole, posterior = score_labels(prediction, reference, (1.0, 1.0, 1.0), labels, metrics, case=0, patient=0)
    assert (whole.label, posterior.label) == ("whole", "posterior")
    # whole: 4 voxels of 4 found, one more at the end; posterior: 1 of 2 found, one too many
    assert whole.values == {"dice": pytest.approx(2 * 4 / 9), "iou": pytest.approx(4 / 5)}
    assert posterior.values == {"dice": pytest.approx(2 * 1 / 4), "iou": pytest.approx(1 / 3)}
    assert (whole.reference_volume, whole.prediction_volume) == (pytest.approx(0.004), pytest.approx(0.005))
    with_id = from_nnunet(SPACES["ignore"])
    anterior, _ = score_labels(prediction, reference, None, with_id, metrics, case=0, patient=0)
    assert anterior.values["dice"] == pytest.approx(2 * 1 / 5)  # 2 there, 3 said, 1 of them right
