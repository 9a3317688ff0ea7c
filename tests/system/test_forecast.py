"""What a study is forecast to send is what it sends."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from concilium.data.plan import open_plan
from concilium.errors import StudyError
from concilium.forecast import SplitBytes, split_bytes
from concilium.line import run
from concilium.networks import make_network
from concilium.study import Study

Make = Callable[..., Study]


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("nnunet", {"protocol__cut": "deep"}),
        ("nnunet", {"protocol__cut": ["down0", "up0"], "protocol__reveal_labels": True}),
        ("nnunet", {"training__precision": "bfloat16", "protocol__cut": "shallow"}),
        ("unet", {"protocol__cut": ["encode0", "decode1"], "protocol__variant": "v2"}),
        pytest.param("unet", {"protocol__cut": "deep", "protocol__transport": "float16"}, marks=pytest.mark.exhaustive),
        pytest.param(
            "nnunet", {"protocol__cut": "deep", "protocol__transport": "bfloat16"}, marks=pytest.mark.exhaustive
        ),
        ("segnet", {"protocol__cut": "shallow", "protocol__transport": "int8", "network__levels": 3}),
    ],
    ids=["deep", "heads on maps of the server", "bfloat16", "unet", "as float16", "as bfloat16", "as int8"],
)
def test_bytes_of_a_round_are_those_forecast(
    small_study: Make, tmp_path: Path, network: str, changes: dict[str, Any]
) -> None:
    study = small_study(
        protocol__name="splitfed", protocol__rounds=1, protocol__steps=3, network__name=network, test=False, **changes
    )
    out = run(study, tmp_path / "run").folder
    plan = open_plan((out / "plans.json").read_text(), "3d_fullres")
    build = partial(
        make_network, study.network, n_channels=1, n_labels=3, plan=plan.architecture, deep_supervision=True
    )
    cut = study.protocol.options["cut"]
    forecast = split_bytes(
        build,
        (cut,) if isinstance(cut, str) else cut,
        batch=(plan.batch_size, 1, *plan.patch_size),
        precision=study.training.precision,
        reveal_labels=study.protocol.options["reveal_labels"],
        transport=study.protocol.options["transport"],
    )
    up, down = forecast.round(3)
    line = json.loads((out / "rounds.jsonl").read_text().splitlines()[0])
    for sent in line["sites"].values():
        headers = 7 * 1200  # of seven messages each way, which do not grow with the maps
        assert up <= sent["bytes_up"] <= 1.02 * up + headers
        assert down <= sent["bytes_down"] <= 1.02 * down + headers


def test_the_forecast_is_arithmetic_on_shapes() -> None:
    """A U-Net of 4 features, cut after its first convolution and before its last: one map each way, and their gradients."""
    from concilium.networks.unet import build

    plan = {"architecture": {"arch_kwargs": {"strides": [[1, 1], [2, 2]]}}}
    unet = partial(build, n_channels=3, n_labels=2, plan=plan, base_features=4, levels=2)
    found = split_bytes(unet, ("shallow",), batch=(5, 3, 16, 8), precision="float32")
    one_map = 5 * 4 * 16 * 8 * 4
    front, tail = 3 * 4 * 9 + 2 * 4, 4 * 4 * 9 + 2 * 4 + 4 * 2 + 2
    assert found == SplitBytes(2 * one_map, 2 * one_map, 4 * (front + tail))
    assert found.round(10) == (20 * one_map + 4 * (front + tail),) * 2


def test_nothing_is_computed() -> None:
    """A network whose maps would fill any memory is forecast at once."""
    from concilium.networks.unet import build

    plan = {"architecture": {"arch_kwargs": {"strides": [[1] * 3, [2] * 3]}}}
    unet = partial(build, n_channels=1, n_labels=2, plan=plan, levels=2)
    found = split_bytes(unet, ("shallow",), batch=(1, 1, 4096, 4096, 4096), precision="bfloat16")
    assert found.step_up == 2 * 32 * 4096**3 * 2
    assert torch.empty(1).device.type == "cpu", "the forecast has left its mode"


def test_a_cut_that_is_not_possible_is_refused() -> None:
    from concilium.networks.unet import build

    plan = {"architecture": {"arch_kwargs": {"strides": [[1, 1], [2, 2]]}}}
    with pytest.raises(StudyError, match="not possible"):
        split_bytes(
            partial(build, n_channels=1, n_labels=2, plan=plan),
            ("up0", "down0"),
            batch=(1, 1, 8, 8),
            precision="float32",
        )
