"""MONAI accepts the bundle, and running it gives the label maps of `concilium predict`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import REAL, make_run, two_images, two_members

from concilium.exports import export_run, monai
from concilium.finished import open_finished

pytest.importorskip("ignite")
bundle = pytest.importorskip("monai.bundle")

TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array"},
        "channel_def": {"type": "object"},
    },
}
TENSORS = {"type": "object", "additionalProperties": TENSOR}
SCHEMA = {
    "type": "object",
    "required": [
        "schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task",
        "description", "authors", "copyright", "network_data_format",
    ],
    "properties": {
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
        "required_packages_version": {"type": "object"},
        "intended_use": {"type": "string"},
    },
}  # fmt: skip
"""What MONAI's schema of 2024-07-25 demands; the schema itself is fetched from where `metadata.json` says, by its users."""


@pytest.fixture
def run_bundle(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a bundle in this process, as `python -m monai.bundle run` does from the bundle's folder."""

    def run(folder: Path, images: Path, out: Path) -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "scripts"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(folder)
        bundle.run(
            config_file=str(folder / "configs" / "inference.json"),
            bundle_root=str(folder),
            dataset_dir=str(images),
            output_dir=str(out),
        )
        for name in [n for n in sys.modules if n.partition(".")[0] == "scripts"]:
            monkeypatch.delitem(sys.modules, name)

    return run


def test_the_bundle_gives_the_same_label_maps(
    run_and_data: tuple[Path, Path],
    run_bundle: Callable[..., None],
    predicted: Callable[[Path, Path], Path],
    same_label_maps: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    run, data = run_and_data
    folder, _ = export_run(run, tmp_path / "out", format="monai")
    run_bundle(folder, data / "imagesTr", tmp_path / "found")
    same_label_maps(predicted(run, data), tmp_path / "found")


def test_metadata_pass_monais_check(picture_run: Path, tmp_path: Path) -> None:
    folder, _ = export_run(picture_run, tmp_path / "out", format="monai", intended_use="Teaching.")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))  # where it is there, MONAI downloads nothing
    metadata = folder / "configs" / "metadata.json"
    bundle.verify_metadata(meta_file=str(metadata), filepath=str(schema))
    about = json.loads(metadata.read_text())
    assert about["intended_use"] == "Teaching."
    assert about["network_data_format"]["inputs"]["image"]["channel_def"] == {"0": "R", "1": "G", "2": "B"}
    assert about["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "polyp"}
    metadata.write_text(json.dumps({k: v for k, v in about.items() if k != "network_data_format"}))
    with pytest.raises(ValueError, match="Failed validating"):
        bundle.verify_metadata(meta_file=str(metadata), filepath=str(schema))


@pytest.mark.slow
def test_the_network_of_the_bundle_needs_neither_concilium_nor_nnunet(picture_run: Path, tmp_path: Path) -> None:
    folder, _ = export_run(picture_run, tmp_path / "out", format="monai")
    code = """
import sys, torch
from monai.bundle import ConfigParser
parser = ConfigParser()
parser.read_config("configs/inference.json")
network = parser.get_parsed_content("network_def")
network.load_state_dict(torch.load("models/model.pt", weights_only=True))
sys.exit(", ".join({"concilium", "nnunetv2"} & set(sys.modules)) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_members_are_one_network_with_the_mean_of_their_logits(
    picture_run: Path, pictures: Path, run_bundle: Callable[..., None], tmp_path: Path
) -> None:
    finished = two_members(picture_run)
    (tmp_path / "out").mkdir()
    monai.export(finished, tmp_path / "out", card="", intended_use="")
    run_bundle(tmp_path / "out", pictures / "imagesTr", tmp_path / "found")
    assert len(list((tmp_path / "found").iterdir())) == 2
    from concilium.exports._monai_transforms import Members

    image = torch.randn(1, 3, 48, 48)
    with torch.inference_mode():
        each: list[Any] = [n(image)[0] for n in finished.networks()]
        first = lambda n: type("First", (torch.nn.Module,), {"forward": lambda self, x: n(x)[0]})()  # noqa: E731
        found = Members([first(n) for n in finished.networks()])(image)
    assert np.allclose(found, (each[0] + each[1]) / 2, atol=1e-5)
    state = torch.load(tmp_path / "out" / "models" / "model.pt", weights_only=True)
    assert {name.split(".")[1] for name in state} == {"0", "1"}
    assert len(open_finished(picture_run).files) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("federation_name", "configuration", "resize"), REAL)
def test_the_command_on_real_cases(
    federation_name: str,
    configuration: str,
    resize: dict[str, Any] | None,
    federation: Callable[[str], Path],
    predicted: Callable[[Path, Path], Path],
    same_label_maps: Callable[..., None],
    tmp_path: Path,
) -> None:
    data = federation(federation_name) / "test"
    run = make_run(tmp_path / "run", data, configuration=configuration, n_cases=2, resize=resize)
    two = two_images(data, tmp_path / "data")
    _, after = export_run(run, tmp_path / "out", format="monai")
    command = after.replace("IMAGES", str(two / "imagesTr")).replace("SEGMENTATIONS", str(tmp_path / "found"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    share = 1e-4 if resize else 0.0  # PyTorch's sums of weighted pixels may differ in the last bit
    same_label_maps(predicted(run, two), tmp_path / "found", share=share)
