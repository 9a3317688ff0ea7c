"""A finished run on the phantom that an audit can look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from concilium.data.phantom import write_phantom
from concilium.leakage.along import run_and_keep
from concilium.study import Study, parse_study

Make = Callable[..., Study]


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all its cases, at half size: of few patients, some private updates would be of none."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, n_test=3, scale=0.5)
    return folder


@pytest.fixture(scope="session")
def small(phantom: Path) -> Make:
    """`small("splitfed", transport="int8", ...)`: a study of two sites whose images are one patch; options of the protocol."""

    def make(protocol: str = "splitfed", **options: object) -> Study:
        raw = {
            "study": {"name": "small", "seed": 3},
            "sites": {name: {"data": str(phantom / name)} for name in ("north", "south")},
            "test": {"data": str(phantom / "test")},
            "protocol": {"name": protocol, "rounds": 2, "steps": 2} | options,
            "preprocessing": {"name": "resize", "size": [16, 16, 16]},
            "network": {"name": "unet", "levels": 3, "base_features": 4},
            "training": {"optimizer": "sgd", "batch_size": 2, "mirror": False, "augmentation": "none"},
            "engine": {"threads": 1, "device": "cpu", "pictures": False},
        }
        return parse_study(raw, folder=phantom)

    return make


@pytest.fixture(scope="session")
def split_run(small: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of splitfed, with the weights after round 1 kept. Read only."""
    return run_and_keep(small("splitfed", cut="shallow"), tmp_path_factory.mktemp("audited") / "run", [1])


@pytest.fixture(scope="session")
def federated_run(small: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of federated training. Read only."""
    return run_and_keep(small("federated"), tmp_path_factory.mktemp("audited") / "run", [])
