"""onnxruntime computes what PyTorch computes, and the exported script finds what `concilium predict` finds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import REAL, make_run, two_images, two_members, write_volumes

from concilium.errors import StudyError
from concilium.exports import export_run
from concilium.exports import onnx as exports_onnx
from concilium.finished import open_finished

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

Predicted = Callable[[Path, Path], Path]
Same = Callable[..., None]
SHARE = 1e-4


def segment(folder: Path, images: Path, out: Path, script: str = "predict.py") -> None:
    """Run the exported script; -I: nothing of this environment's paths, so Concilium cannot come in."""
    command = [sys.executable, "-I", str(folder / script), str(images), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(picture_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(picture_run, tmp_path_factory.mktemp("onnx") / "out", format="onnx")[0]


def test_the_script_gives_the_same_label_maps(
    run_and_data: tuple[Path, Path], predicted: Predicted, same_label_maps: Same, tmp_path: Path
) -> None:
    run, data = run_and_data
    folder, after = export_run(run, tmp_path / "out", format="onnx")
    assert after == f"python {folder}/predict.py IMAGES SEGMENTATIONS"
    assert not (folder / "plain.py").exists()
    segment(folder, data / "imagesTr", tmp_path / "found")
    same_label_maps(predicted(run, data), tmp_path / "found", share=SHARE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose model the plain script can follow, and its data."""

    def other_spacing(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"].update(
            spacing=[2.2, 1.0, 0.9],
            normalization_schemes=["CTNormalization", "ZScoreNormalization"],
            use_mask_for_norm=[False, True],
        )

    data = write_volumes(tmp_path_factory.mktemp("even"), spacing=(0.8, 1.1, 2.0))
    return make_run(tmp_path_factory.mktemp("run") / "plain", data, patch=[24, 24, 24], edit=other_spacing), data


@pytest.mark.slow
def test_the_plain_script_gives_the_same_label_maps_too(
    plain: tuple[Path, Path], predicted: Predicted, same_label_maps: Same, tmp_path: Path
) -> None:
    run, data = plain
    folder, _ = export_run(run, tmp_path / "out", format="onnx")
    segment(folder, data / "imagesTr", tmp_path / "found", script="plain.py")
    same_label_maps(predicted(run, data), tmp_path / "found", share=SHARE)


def test_the_plain_script_stops_at_images_that_it_would_resample_otherwise(
    plain: tuple[Path, Path], volumes: Path, tmp_path: Path
) -> None:
    folder, _ = export_run(plain[0], tmp_path / "out", format="onnx")
    command = [sys.executable, str(folder / "plain.py"), str(volumes / "imagesTr"), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Use predict.py" in done.stderr
    assert list((tmp_path / "found").iterdir()) == []


def test_logits_are_those_of_torch_at_any_batch_and_size(exported: Path, picture_run: Path) -> None:
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    (network,) = open_finished(picture_run).networks()
    for size in ((1, 3, 48, 48), (3, 3, 80, 64)):
        image = torch.randn(size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = network(image)[0].numpy()
        (found,) = session.run(None, {"image": image.numpy()})
        assert found.shape == expected.shape
        assert np.abs(expected).max() > 1
        assert np.abs(found - expected).max() < 1e-4


@pytest.mark.slow
def test_members_are_files_whose_logits_the_script_averages(picture_run: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    exports_onnx.export(two_members(picture_run), tmp_path / "out", card="", intended_use="")
    about = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert about["models"] == ["model_0.onnx", "model_1.onnx"]
    found = {}
    for name, models in {
        "both": about["models"],
        "first": about["models"][:1],
        "twice": about["models"][:1] * 2,
    }.items():
        (tmp_path / "out" / "preprocessing.json").write_text(json.dumps({**about, "models": models}))
        segment(tmp_path / "out", pictures / "imagesTr", tmp_path / name)
        found[name] = [p.read_bytes() for p in sorted((tmp_path / name).iterdir())]
    assert found["first"] == found["twice"] != found["both"]


def test_a_network_that_is_not_nnunets(pictures: Path, tmp_path: Path) -> None:
    network = {"name": "unet", "base_features": 4, "levels": 2}
    run = make_run(tmp_path / "run", pictures, configuration="2d", patch=[32, 32], network=network)
    folder, _ = export_run(run, tmp_path / "out", format="onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (whole,) = open_finished(run).networks()
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert np.abs(session.run(None, {"image": image.numpy()})[0] - whole(image)[0].numpy()).max() < 1e-4


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("normalization_schemes", ["Own", "NoNormalization", "NoNormalization"], "normalises by Own"),
        (
            "resampling_fn_data",
            "resample_torch_fornnunet",
            "resamples by resample_data_or_seg_to_shape, resample_torch",
        ),
    ],
)
def test_what_the_sidecar_cannot_say_is_refused(
    key: str, value: Any, words: str, pictures: Path, tmp_path: Path
) -> None:
    def edit(plans: dict[str, Any]) -> None:
        plans["configurations"]["2d"][key] = value

    run = make_run(tmp_path / "run", pictures, configuration="2d", patch=[32, 32], edit=edit)
    with pytest.raises(StudyError, match=words):
        export_run(run, tmp_path / "out", format="onnx")


def test_without_its_packages_it_says_how_to_install_them(
    picture_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports_onnx, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"onnx and onnxruntime, not installed.*pip install 'concilium\[onnx\]'"):
        export_run(picture_run, tmp_path / "out", format="onnx")


class Deciding(torch.nn.Module):
    """Decides by the values of its input, which tracing takes for a constant."""

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [image * (2.0 if image.max() > 0 else 3.0)]


def test_a_network_that_tracing_gets_wrong_is_refused(picture_run: Path, tmp_path: Path) -> None:
    finished = open_finished(picture_run)
    with pytest.raises(StudyError, match="gives other logits as ONNX"):
        exports_onnx._write(Deciding(), finished, tmp_path / "model.onnx")


class Refusing(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        raise ValueError("no")


def test_a_network_that_cannot_be_traced_is_refused(picture_run: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"cannot write network 'nnunet' as ONNX \(ValueError\)"):
        exports_onnx._write(Refusing(), open_finished(picture_run), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("federation_name", "configuration", "resize"), REAL)
def test_the_script_on_real_cases(
    federation_name: str,
    configuration: str,
    resize: dict[str, Any] | None,
    federation: Callable[[str], Path],
    predicted: Predicted,
    same_label_maps: Same,
    tmp_path: Path,
) -> None:
    data = federation(federation_name) / "test"
    run = make_run(tmp_path / "run", data, configuration=configuration, n_cases=2, resize=resize)
    two = two_images(data, tmp_path / "data")
    folder, _ = export_run(run, tmp_path / "out", format="onnx")
    assert (folder / "plain.py").exists() == (configuration == "3d_fullres")
    for script in ("predict.py", "plain.py") if configuration == "3d_fullres" else ("predict.py",):
        segment(folder, two / "imagesTr", tmp_path / script, script=script)
        same_label_maps(predicted(run, two), tmp_path / script, share=SHARE)


@pytest.mark.parametrize(
    "network",
    [
        {"name": "sam", "size": "vit_t", "width": 16, "depth": 2, "patch": 8, "image_size": 48, "decoder_features": 16},
        {"name": "swin_unet", "base_features": 8, "blocks": [2, 2], "head_features": 4, "window": 7},
    ],
    ids=["sam", "swin_unet"],
)
def test_what_differs_from_size_to_size_is_written_for_the_patch_alone(
    network: dict[str, Any], pictures: Path, predicted: Predicted, same_label_maps: Same, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", pictures, configuration="2d", patch=[48, 48], network=network)
    folder, _ = export_run(run, tmp_path / "out", format="onnx")
    assert json.loads((folder / "preprocessing.json").read_text())["any_size"] is False
    segment(folder, pictures / "imagesTr", tmp_path / "found")
    same_label_maps(predicted(run, pictures), tmp_path / "found", share=SHARE)
