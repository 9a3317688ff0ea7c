"""Segment-Anything in a run: volumes by slice, regions, adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from concilium.finished import open_finished
from concilium.line import run
from concilium.predict import predict
from concilium.study import Study

SITES = ("north", "south")


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
