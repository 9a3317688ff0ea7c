"""A study on the phantom that runs in seconds, and faults to put into it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from concilium.protocols import Round
from concilium.study import Study, parse_study

sys.path.insert(0, str(Path(__file__).parent))  # so that studies can name `faults:...`

from sessions import Watched, quick, rounds_without_south, watch

Make = Callable[..., Study]


@pytest.fixture(scope="session")
def small_study(phantom: Path) -> Callable[..., Study]:
    """`small_study(rounds=2, ...)`: keyword arguments replace whole keys of tables, named table__key."""

    def make(
        *, sites: tuple[str, ...] = ("north", "south", "west"), data: Path = phantom, test: bool = True, **changes: Any
    ) -> Study:
        raw: dict[str, dict[str, Any]] = {
            "study": {"name": "small", "seed": 3},
            "sites": {name: {"data": str(data / name)} for name in sites},
            "protocol": {"rounds": 2, "steps": 2, "compare": []},
            "network": {"base_features": 4},
            "training": {"optimizer": "adamw", "batch_size": 2, "patch_size": [16, 16, 8], "mirror": False},
            "engine": {"threads": 1, "device": "cpu"},
        }
        if test:
            raw["test"] = {"data": str(phantom / "test")}
        for name, value in changes.items():
            table, key = name.split("__")
            raw.setdefault(table, {})[key] = value
            if value is None:
                del raw[table][key]
        return parse_study(raw, folder=phantom)

    return make


@pytest.fixture(scope="session")
def split_study(small_study: Callable[..., Study]) -> Callable[..., Study]:
    """As `small_study`, of splitfed with a plain U-Net of three levels and without a test set, unless told otherwise."""

    def make(**changes: Any) -> Study:
        network = {} if "network__name" in changes else {"network__name": "unet", "network__levels": 3}
        return small_study(**{"protocol__name": "splitfed", "test": False} | network | changes)

    return make


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """What the runs of a test show, watched from inside."""
    return watch(monkeypatch)


@pytest.fixture(scope="session")
def make(split_study: Make) -> Make:
    """As `split_study`, as quick as there is."""
    return partial(quick, split_study)


@pytest.fixture(scope="session")
def without_south(split_study: Make, tmp_path_factory: pytest.TempPathFactory) -> list[Round]:
    """Rounds of splitfed in which the south was out of the second."""
    return rounds_without_south(split_study, tmp_path_factory.mktemp("without") / "run")
