"""How much of a batch a site computes at a time, chosen from the memory that it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from concilium.answers import Settings, fitting
from concilium.answers.fitting import NOTE, fitted
from concilium.loads import whole_load
from concilium.messages import PlugIn, Prepare
from concilium.network_sizes import plan_for
from concilium.networks import make_network
from concilium.optimization import at_hand
from concilium.study.tables import TrainingTable

SIZE, BATCH = (32, 32), 6
SAM = {"width": 16, "depth": 4, "heads": 2, "patch": 8, "image_size": 32, "decoder_features": 16}
PLAN: Any = SimpleNamespace(batch_size=BATCH, patch_size=SIZE)


def network(name: str, **options: Any) -> Callable[..., Any]:
    plug_in, plan = PlugIn(name, options), plan_for(SIZE, base_features=8)
    return lambda deep_supervision=False: make_network(
        plug_in, n_channels=1, n_labels=2, plan=plan, deep_supervision=deep_supervision
    )


def ask(tmp_path: Path, build: Callable[..., Any], had: int, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Any:
    """What a site chooses that has so much: patches at a time, and whether blocks are computed again."""
    monkeypatch.setattr(fitting, "at_hand", lambda device: had)
    training: Any = TrainingTable(**{"optimizer": "adamw", "learning_rate": 1e-3, "deep_supervision": False} | how)
    object.__setattr__(training, "local_update", PlugIn("plain", {}))
    request = Prepare("{}", "2d", PlugIn(str(had), {}), training, 5, 0, 1, 0.1)
    folder = tmp_path / "site"
    folder.mkdir(exist_ok=True)
    settings = Settings("a", "site", {}, None, folder, tmp_path, 1, "cpu", micro_batch="auto")
    at_once, found = fitted(settings, request, PLAN, build, 1)
    again = any(getattr(stage, "again", False) for stage in found().modules())
    return at_once, again


def needs(build: Callable[..., Any], at_once: int) -> int:
    training: Any = TrainingTable(optimizer="adamw", learning_rate=1e-3, deep_supervision=False)
    return whole_load(build, (BATCH, 1, *SIZE), training, at_once=at_once).memory


def test_the_quickest_way_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sam, checkpointed = network("sam", **SAM), network("sam", **SAM, checkpointing=True)
    room = [round(1.01 * n / fitting.ROOM) for n in (needs(sam, BATCH), needs(checkpointed, BATCH), needs(sam, 3))]
    assert room[0] > room[1] > room[2]
    found = [ask(tmp_path, sam, had, monkeypatch) for had in (*room, 1000, 0)]
    assert found == [(6, False), (6, True), (3, False), (1, False), (6, False)]
    ways = list(json.loads((tmp_path / "site" / NOTE).read_text()).values())
    assert [(way["at_once"], way["again"]) for way in ways] == found
    assert [way["needs"] <= fitting.ROOM * way["had"] for way in ways] == [True, True, True, False, False]


def test_what_cannot_be_divided_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(tmp_path, network("unet", base_features=4), 1000, monkeypatch) == (1, False)
    assert ask(tmp_path, network("unet", base_features=4, norm="batch"), 1001, monkeypatch) == (BATCH, False)


def test_memory_at_hand_is_some_of_what_there_is() -> None:
    assert 1e6 < at_hand(torch.device("cpu")) < 1e14
