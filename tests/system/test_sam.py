"""Segment-Anything in a run: volumes by slice, regions, adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from concilium.answers import train
from concilium.answers.features import Features
from concilium.finished import open_finished
from concilium.line import run
from concilium.predict import predict
from concilium.study import Study

SITES = ("north", "south")


@pytest.mark.slow
def test_regions_of_volumes_are_learnt_by_sites_server_and_prediction_alike(
    small_study: Callable[..., Study], phantom: Path, tmp_path: Path
) -> None:
    """Two regions have two logits, where one label and the background have one that is learnt: all must know which."""
    data = tmp_path / "data"
    for name in SITES:
        shutil.copytree(phantom / name, data / name)
        place = data / name / "dataset.json"
        labels = {"labels": {"background": 0, "whole": [1, 2], "lesion": 2}, "regions_class_order": [1, 2]}
        place.write_text(json.dumps(json.loads(place.read_text()) | labels))
    options = {
        "name": "sam", "base_features": None, "width": 16, "depth": 2, "heads": 2, "patch": 8, "image_size": 16,
        "decoder_features": 16, "adapt": "adapters", "through_plane": True, "checkpointing": True,
    }  # fmt: skip
    changes = {f"network__{name}": value for name, value in options.items()}
    outcome = run(small_study(sites=SITES, data=data, test=False, protocol__rounds=1, **changes), tmp_path / "run")
    assert outcome.exit_code == 0
    (network,) = open_finished(outcome.folder, "federated").networks()
    assert tuple(network.state_dict()["head0.labels.weight"].shape) == (2, 4, 1, 1)
    assert predict(outcome.folder, data / "south" / "imagesTr", tmp_path / "out") == []
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == len(list((data / "south" / "labelsTr").iterdir()))


def small(small_study: Callable[..., Study], phantom: Path, **changes: Any) -> Study:
    options = {
        "name": "sam", "base_features": None, "width": 32, "depth": 3, "heads": 2, "patch": 8, "image_size": 16,
        "decoder_features": 16,
    }  # fmt: skip
    given: dict[str, Any] = {f"network__{name}": value for name, value in options.items()}
    return small_study(sites=SITES, data=phantom, test=False, **given, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("adapt", ["adapters", "lora"])
def test_adapters_and_the_decoder_train_and_travel_and_nothing_else(
    small_study: Callable[..., Study], phantom: Path, tmp_path: Path, adapt: str
) -> None:
    """FedMSA, and the same with low rank: the bytes of a round are those of what trains."""
    outcome = run(small(small_study, phantom, network__adapt=adapt), tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    weights = load_file(outcome.folder / "weights/federated.safetensors")
    own = sum(t.numel() for n, t in weights.items() if ".adapter" in n or ".lora" in n)
    decoder = sum(t.numel() for n, t in weights.items() if n.startswith(("decoder", "head0")) and "prompts" not in n)
    (model, *_) = outcome.results["models"]
    assert own > 0
    assert (model["parameters"], model["trained"]) == (sum(t.numel() for t in weights.values()), own + decoder)
    for line in map(json.loads, (outcome.folder / "rounds.jsonl").read_text().splitlines()):
        for site in line["sites"].values() if line["model"] == "federated" else ():
            for key in ("bytes_up", "bytes_down"):
                assert 4 * model["trained"] <= site[key] <= 1.02 * 4 * model["trained"] + 20_000


def test_what_a_frozen_encoder_makes_of_views_is_kept_and_changes_nothing(
    small_study: Callable[..., Study], phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder alone trains. Without what is kept the same weights to 1e-5; while it trains files lie at the sites."""
    made: list[str] = []
    logits = Features.logits
    monkeypatch.setattr(Features, "logits", lambda self, *given: made.append(self._folder.name) or logits(self, *given))
    decoder = ["decoder.layers.*", "decoder.enlarge.*", "head0.*"]
    changes = {"training__tensors": decoder, "training__views": 2, "training__precision": "float32"}
    study = small(small_study, phantom, **changes)
    kept = run(study, tmp_path / "kept")
    assert len(made) == 2 * study.protocol.rounds * (study.protocol.steps or 0)
    assert len(set(made)) == 1, "sites with the same weights name it alike, and every round goes on with it"
    assert not list(kept.folder.glob("sites/*/features/*")), "it goes with the model"
    monkeypatch.setattr(train, "features_of", lambda *_: None)
    plain = run(study, tmp_path / "plain")
    assert len(made) == 2 * study.protocol.rounds * (study.protocol.steps or 0), "what was kept was used all the same"
    one, other = (load_file(r.folder / "weights/federated.safetensors") for r in (kept, plain))
    assert max(float((one[n] - other[n]).abs().max()) for n in one) <= 1e-5
    assert one.keys() == other.keys()
