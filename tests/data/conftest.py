"""Two small sites on disk (anisotropic volumes to be cropped and resampled; colour pictures) and plans for them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from skimage import io

from concilium.data.plan import Plan, open_plan

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import `check_sites`

LABELS = {"background": 0, "anterior": 1, "posterior": 2}


def write_description(folder: Path, channels: list[str], labels: dict[str, int], n: int, file_ending: str) -> None:
    about = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels,
        "numTraining": n,
        "file_ending": file_ending,
    }
    (folder / "dataset.json").write_text(json.dumps(about))


def volume(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two touching boxes in noise, with a margin of zeros that nnU-Net crops away."""
    image = rng.normal(100, 10, shape).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    z, y, x = (n // 2 for n in shape)
    label[z - 5 : z + 5, y - 6 : y + 6, x - 3 : x] = 1
    label[z - 5 : z + 5, y - 6 : y + 6, x : x + 3] = 2
    image += 40.0 * label
    image[:2], image[:, :3], image[:, :, -4:], image[6:9, 6:9, 2:4] = 0, 0, 0, 0
    image[:, :8, :4] = 0  # a corner stays in the box, so that the mask of the non-zero region matters
    return image, label


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases, two channels, 1.1 x 0.8 x 2.5 mm (z, y, x), oblique, away from the origin; the third has no label 2."""
    folder = tmp_path_factory.mktemp("volumes")
    (folder / "imagesTr").mkdir()
    (folder / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(30, 40, 18), (34, 36, 19), (28, 44, 17)]):
        image, label = volume(rng, shape)
        second = np.where(image == 0, 0, rng.normal(-3, 1, shape)).astype(np.float32)
        if i == 2:
            label[label == 2] = 0
        for array, name in (
            (image, f"imagesTr/c{i}_0000.nii.gz"),
            (second, f"imagesTr/c{i}_0001.nii.gz"),
            (label, f"labelsTr/c{i}.nii.gz"),
        ):
            written = sitk.GetImageFromArray(array)
            written.SetSpacing((2.5, 0.8, 1.1))
            written.SetOrigin((-7.0, 3.5, 11.0))
            written.SetDirection((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
            sitk.WriteImage(written, str(folder / name))
    write_description(folder, ["T1", "T2"], LABELS, 3, ".nii.gz")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two colour pictures with one label."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "imagesTr").mkdir()
    (folder / "labelsTr").mkdir()
    rng = np.random.default_rng(1)
    for i in range(2):
        image = rng.integers(1, 200, (50 + 4 * i, 44, 3), dtype=np.uint8)
        label = np.zeros(image.shape[:2], np.uint8)
        label[10:30, 12:25] = 1
        image[label > 0] += 50
        image[:4], image[:, -3:], image[:10, :8] = 0, 0, 0
        io.imsave(folder / f"imagesTr/p{i}_0000.png", image, check_contrast=False)
        io.imsave(folder / f"labelsTr/p{i}.png", label, check_contrast=False)
    write_description(folder, ["red", "green", "blue"], {"background": 0, "lesion": 1}, 2, ".png")
    return folder


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """`make_plan(n_dims=3, n_channels=2, spacing=[...])`: a plan, with values of its configuration replaced."""

    def make(*, n_dims: int, n_channels: int, **changes: Any) -> Plan:
        return open_plan(plans_of(n_dims=n_dims, n_channels=n_channels, **changes), "test")

    return make


def plans_of(*, n_dims: int, n_channels: int, **changes: Any) -> str:
    """Plans in nnU-Net's format; `changes` replace values of its single configuration, `test`, or its strides or axes."""
    sampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    conv = f"torch.nn.modules.conv.Conv{n_dims}d"
    norm = f"torch.nn.modules.instancenorm.InstanceNorm{n_dims}d"
    patch, spacing = ([8, 24, 16], [2.0, 1.0, 1.0]) if n_dims == 3 else ([32, 24], [1.0, 1.0])
    strides = changes.pop("strides", [[1] * n_dims, [1, 2, 2][-n_dims:], [2] * n_dims])
    configuration = {
        "data_identifier": "test",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": [float(n) for n in patch],
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"] * n_channels,
        "use_mask_for_norm": [True, False, False][:n_channels],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": sampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**sampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**sampling, "order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 16],
                "conv_op": conv,
                "kernel_sizes": [[3] * n_dims] * 3,
                "strides": strides,
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": norm,
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    numbers = {"mean": 100.0, "median": 99.0, "std": 20.0, "min": 0.0, "max": 200.0}
    forward, backward = ([2, 0, 1], [1, 2, 0]) if n_dims == 3 else ([0, 1, 2], [0, 1, 2])
    plans = {
        "dataset_name": "Dataset001_test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.5, 1.1, 0.8],
        "original_median_shape_after_transp": [14, 26, 36],
        "image_reader_writer": "SimpleITKIO" if n_dims == 3 else "NaturalImage2DIO",
        "transpose_forward": changes.pop("transpose_forward", forward),
        "transpose_backward": changes.pop("transpose_backward", backward),
        "configurations": {"test": {**configuration, **changes}},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(c): {**numbers, "percentile_00_5": 60.0, "percentile_99_5": 160.0} for c in range(n_channels)
        },
    }
    return json.dumps(plans)


# ------------------------------------------------------------------------- raw folders, and nnU-Net itself on them


@pytest.fixture
def write_site() -> Callable[..., Path]:
    """`write_site(folder, {case: (image (C, Z, Y, X), label (Z, Y, X) or None)}, spacing=..., ...)`: a NIfTI raw folder."""

    def write(
        folder: Path,
        cases: dict[str, tuple[np.ndarray, np.ndarray | None]],
        *,
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        channels: tuple[str, ...] = ("MRI",),
        labels: dict[str, int] | None = None,
        **more: Any,
    ) -> Path:
        (folder / "imagesTr").mkdir(parents=True)
        (folder / "labelsTr").mkdir()
        for name, (image, label) in cases.items():
            files = {f"imagesTr/{name}_{i:04d}.nii.gz": channel for i, channel in enumerate(image)}
            files |= {} if label is None else {f"labelsTr/{name}.nii.gz": label}
            for path, array in files.items():
                written = sitk.GetImageFromArray(array)
                written.SetSpacing(spacing[::-1])
                sitk.WriteImage(written, str(folder / path))
        write_description(folder, list(channels), labels or {"background": 0, "tumour": 1}, len(cases), ".nii.gz")
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        return folder

    return write


class Pooled:
    """The oracle: nnU-Net's own extractor and planners on the cases of several sites in one folder."""

    name = "Dataset500_Pooled"

    def __init__(self, root: Path, sites: list[Path], patch: pytest.MonkeyPatch) -> None:
        (root / "raw" / self.name).mkdir(parents=True)
        (root / "preprocessed" / self.name).mkdir(parents=True)
        about = json.loads((sites[0] / "dataset.json").read_text())
        ending = about["file_ending"]
        about["dataset"] = {
            f"{site.name}_{label.name}": {
                "images": [str(p) for p in sorted((site / "imagesTr").glob(f"{label.name[: -len(ending)]}_*{ending}"))],
                "label": str(label),
            }
            for site in sites
            for label in sorted((site / "labelsTr").glob(f"*{ending}"))
        }
        about["numTraining"] = len(about["dataset"])
        (root / "raw" / self.name / "dataset.json").write_text(json.dumps(about))
        for module in (default_experiment_planner, fingerprint_extractor):
            patch.setattr(module, "nnUNet_raw", str(root / "raw"))
            patch.setattr(module, "nnUNet_preprocessed", str(root / "preprocessed"))
        # The extractor starts processes, each of which imports PyTorch; threads run the same code.
        context = SimpleNamespace(Pool=ThreadPool)
        patch.setattr(fingerprint_extractor.multiprocessing, "get_context", lambda _: context)
        self.root = root

    def fingerprint(self, *, n_samples: int) -> dict[str, Any]:
        """As nnU-Net writes it, from `n_samples` voxels of all cases together."""
        extractor = fingerprint_extractor.DatasetFingerprintExtractor(self.name, num_processes=1)
        extractor.num_foreground_voxels_for_intensitystats, extractor.show_progress_bar = n_samples, False
        extractor.run(overwrite_existing=True)
        return json.loads((self.root / "preprocessed" / self.name / "dataset_fingerprint.json").read_text())

    def plans(self, planner: Any, **options: Any) -> dict[str, Any]:
        """As nnU-Net writes them."""
        planner(self.name, **options).plan_experiment()
        (written,) = (self.root / "preprocessed" / self.name).glob("nnUNet*Plans.json")
        plans: dict[str, Any] = json.loads(written.read_text())
        written.unlink()
        return plans


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Path]], Pooled]:
    """`pool([site, ...])`: nnU-Net on the sites' cases in one folder."""
    return lambda sites: Pooled(tmp_path / "pooled", sites, monkeypatch)
