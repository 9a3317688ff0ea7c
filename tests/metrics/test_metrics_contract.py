"""The contract of the folder `metrics`, held for every file in it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import concilium.metrics
from concilium.metrics import Pair

NAMES = [m.name for m in pkgutil.iter_modules(concilium.metrics.__path__) if not m.name.startswith("_")]


@pytest.fixture(params=NAMES)
def plug_in(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"concilium.metrics.{request.param}")


def test_the_metrics_of_the_results_file_are_there() -> None:
    assert {"dice", "iou", "hd95", "nsd"} <= set(NAMES)


def test_says_what_it_is(plug_in: ModuleType) -> None:
    assert (plug_in.__doc__ or "").strip()
    assert (plug_in.metric.__doc__ or "").strip()
    assert plug_in.UNIT in ("1", "distance")
    assert isinstance(plug_in.HIGHER_IS_BETTER, bool)


def test_takes_a_pair_and_options_with_defaults(plug_in: ModuleType) -> None:
    pair, *options = inspect.signature(plug_in.metric).parameters.values()
    assert pair.name == "pair"
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty
        assert option.annotation != inspect.Parameter.empty


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("empty", ["", "p", "r", "pr"])
def test_pure_and_gives_a_float_or_none(
    plug_in: ModuleType, empty: str, dimensions: int, blobs: Callable[..., Any]
) -> None:
    prediction, reference, spacing = blobs(4, dimensions)
    if "p" in empty:
        prediction[...] = False
    if "r" in empty:
        reference[...] = False
    before = prediction.tobytes(), reference.tobytes()
    prediction.flags.writeable = reference.flags.writeable = False
    pair = Pair(prediction, reference, spacing)
    value = plug_in.metric(pair)
    assert (prediction.tobytes(), reference.tobytes()) == before
    assert value == plug_in.metric(pair) == plug_in.metric(Pair(prediction, reference, spacing))
    assert value is None if empty == "pr" else value is None or type(value) is float
    if empty == "":
        assert value is not None
        assert np.isfinite(value)
    if plug_in.UNIT == "1":
        assert value is None or 0.0 <= value <= 1.0


def test_direction_and_unit(plug_in: ModuleType) -> None:
    reference = np.zeros((12, 12, 12), bool)
    reference[2:8, 2:8, 2:8] = True
    near, far = (Pair(np.roll(reference, k, 0), reference, (1.5, 1.5, 1.5)) for k in (1, 4))
    good, bad = plug_in.metric(near), plug_in.metric(far)
    assert (good > bad) if plug_in.HIGHER_IS_BETTER else (good < bad)
    if plug_in.UNIT == "distance":
        assert plug_in.metric(Pair(far.prediction, reference, (3.0, 3.0, 3.0))) == pytest.approx(2 * bad)
