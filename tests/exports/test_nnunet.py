"""Stock nnU-Net runs what is exported, and finds the label maps that `concilium predict` finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from made import make_run, two_images, two_members
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from concilium.data.dataset import open_dataset, read_case
from concilium.data.preprocess import preprocess, restore
from concilium.data.windows import predict_logits
from concilium.errors import StudyError
from concilium.exports import export_run
from concilium.exports.nnunet import export

CPU = torch.device("cpu")


def stock(folder: Path, folds: tuple[int, ...]) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)  # mirrors where the folder allows it
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def test_stock_nnunet_gives_the_same_label_maps(
    volume_run: Path, volumes: Path, predicted: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    folder, after = export_run(volume_run, tmp_path / "out", format="nnunet")
    assert after.endswith(f"-m {folder} -f 0")
    predictor = stock(folder, (0,))
    for image in sorted((volumes / "imagesTr").glob("*_0000.nii.gz"))[:2]:
        files = [str(image), str(image).replace("_0000", "_0001")]
        found = predictor.predict_single_npy_array(*SimpleITKIO().read_images(files))
        name = image.name.replace("_0000", "")
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(predicted(volume_run, volumes) / name)))
        assert len(np.unique(expected)) > 1
        assert np.array_equal(found, expected)


def test_members_become_folds_whose_logits_are_averaged(picture_run: Path, pictures: Path, tmp_path: Path) -> None:
    finished = two_members(picture_run)
    assert export(finished, tmp_path, card="", intended_use="").endswith("-f 0 1")
    predictor = stock(tmp_path, (0, 1))
    dataset = open_dataset(pictures)
    image, properties = preprocess(dataset.cases[0], dataset, finished.plan)
    each = [
        predict_logits(n, image, finished.plan, labels=finished.labels, device=CPU, mirror=False, precision="float32")
        for n in finished.networks()
    ]
    raw, _, about = read_case(dataset.cases[0], dataset)
    found = predictor.predict_single_npy_array(raw, about)
    mean = restore((each[0] + each[1]) / 2, finished.plan, finished.labels, properties)
    assert np.array_equal(found, mean)
    for one in each:  # one member alone would not do
        assert not np.array_equal(found, restore(one, finished.plan, finished.labels, properties))


@pytest.mark.parametrize("mirror", [True, False], ids=["mirrored", "plain"])
def test_the_checkpoint_holds_what_nnunet_reads(mirror: bool, pictures: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pictures, configuration="2d", patch=[32, 32], mirror=mirror)
    folder, _ = export_run(run, tmp_path / "out", format="nnunet")
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["init_args"]["configuration"] == "2d"
    assert checkpoint["inference_allowed_mirroring_axes"] == ((0, 1) if mirror else None)
    weights = checkpoint["network_weights"]
    assert weights["encoder.stages.0.0.convs.0.conv.weight"].data_ptr() == (
        weights["decoder.encoder.stages.0.0.convs.0.all_modules.0.weight"].data_ptr()
    )
    assert json.loads((folder / "plans.json").read_text()) == json.loads((run / "plans.json").read_text())
    fingerprint = json.loads((folder / "dataset_fingerprint.json").read_text())
    assert len(fingerprint["shapes_after_crop"]) == 2
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2


def test_a_model_without_deep_supervision_loads_too(pictures: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pictures, configuration="2d", patch=[32, 32], deep_supervision=False)
    folder, _ = export_run(run, tmp_path / "out", format="nnunet")
    assert stock(folder, (0,)).network is not None  # its load_state_dict is strict


def test_another_network_is_refused_with_the_formats_that_can(pictures: Path, tmp_path: Path) -> None:
    network = {"name": "unet", "base_features": 4, "levels": 2}
    run = make_run(tmp_path / "run", pictures, configuration="2d", patch=[32, 32], network=network)
    for format in ("nnunet", "monai"):
        with pytest.raises(StudyError, match=r"'unet' cannot be exported as .* Export it as onnx or safetensors"):
            export_run(run, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("federation_name", "configuration"), [("hippocampus", "3d_fullres"), ("polyps", "2d")])
def test_the_stock_command_on_real_cases(
    federation_name: str,
    configuration: str,
    federation: Callable[[str], Path],
    predicted: Callable[[Path, Path], Path],
    same_label_maps: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    data = federation(federation_name) / "test"
    run = make_run(tmp_path / "run", data, configuration=configuration, n_cases=2)
    two = two_images(data, tmp_path / "data")
    folder, after = export_run(run, tmp_path / "out", format="nnunet")
    command = after.replace("IMAGES", str(two / "imagesTr")).replace("SEGMENTATIONS", str(tmp_path / "found")).split()
    program = str(Path(sys.executable).with_name(command[0]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [program, *command[1:], "-device", "cpu", "-npp", "1", "-nps", "1"],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(folder) in command
    same_label_maps(predicted(run, two), tmp_path / "found")
