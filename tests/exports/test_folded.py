"""Low-rank updates folded into the weights that they change: the same network, without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made import make_run, write_pictures
from safetensors.torch import load_file

from concilium.errors import StudyError
from concilium.exports import export_run
from concilium.finished import open_finished
from concilium.wire import read_tensors

SAM = {
    "name": "sam", "width": 16, "depth": 2, "heads": 2, "patch": 8, "image_size": 32, "decoder_features": 16,
}  # fmt: skip
Command = Callable[..., str]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")


def run_of(pictures: Path, folder: Path, **network: str) -> Path:
    return make_run(folder, pictures, configuration="2d", network={**SAM, **network}, patch=[32, 32], n_cases=2)


def test_it_is_the_same_network_without_what_was_added(pictures: Path, tmp_path: Path) -> None:
    run = run_of(pictures, tmp_path / "run", adapt="lora")
    folder, _ = export_run(run, tmp_path / "out", format="safetensors", fold=True)
    weights, header = read_tensors(folder / "model.safetensors")
    (added,) = open_finished(run).networks()
    assert not any("lora" in name for name in weights)
    assert any("lora" in name for name in added.state_dict())
    assert json.loads(header["concilium"])["network"]["adapt"] == "none"
    assert 'adapt = "none"' in (folder / "study.toml").read_text()
    (plain,) = open_finished(run).folded().networks()
    assert plain.state_dict().keys() == weights.keys()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        (expected,), (found,) = added(image), plain(image)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    plain_run = load_file(export_run(run, tmp_path / "as-is", format="safetensors")[0] / "model.safetensors")
    changed = [n for n in weights if not torch.equal(weights[n], plain_run[n])]
    assert changed
    assert all(name.endswith("inputs.weight") for name in changed)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"adapt": "adapters"}, r"adapt = 'adapters' cannot be folded into the other weights. Allowed: 'lora'"),
        ({"name": "nnunet"}, r"name = 'nnunet' has nothing that could be folded"),
    ],
)
def test_what_cannot_be_folded_is_refused(
    network: dict[str, str], message: str, pictures: Path, tmp_path: Path
) -> None:
    if network.get("name") == "nnunet":
        run = make_run(tmp_path / "run", pictures, configuration="2d", patch=[32, 32], n_cases=2)
    else:
        run = run_of(pictures, tmp_path / "run", **network)
    with pytest.raises(StudyError, match=message):
        export_run(run, tmp_path / "out", format="safetensors", fold=True)
    assert not (tmp_path / "out").exists()
