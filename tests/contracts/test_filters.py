"""What every filter keeps to (see `concilium.filters`). Its signature: tests/test_catalog.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from concilium import catalog
from concilium.filters import Leaving, clip, filtered, gaussian
from concilium.messages import PlugIn

NEUTRAL: dict[str, dict[str, Any]] = {"clip": {"norm": 1e30}, "gaussian": {"deviation": 0.0}}
"""Settings with which each changes nothing."""
every = pytest.mark.parametrize("name", catalog.names("filters"))


def tensors(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 3, generator=g), "b": torch.randn(2, generator=g), "n": torch.tensor(seed)}


RECEIVED, TRAINED = tensors(1), tensors(2)
ABOUT = Leaving("m", 1, 5, 7, RECEIVED)


def length(weights: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((weights[n].double() - RECEIVED[n].double()).square().sum()) for n in ("a", "b")))


def test_each_has_settings_that_change_nothing() -> None:
    assert set(NEUTRAL) == set(catalog.names("filters"))


@every
def test_neutral_settings_leave_every_bit(name: str) -> None:
    made = filtered(TRAINED, ABOUT, [PlugIn(name, NEUTRAL[name])], ("k",))
    assert all(torch.equal(made[n], TRAINED[n]) for n in TRAINED)


@every
def test_what_leaves_has_the_same_names_shapes_and_types_and_nothing_is_changed_in_place(name: str) -> None:
    before = {n: t.clone() for n, t in (TRAINED | {f"r{n}": t for n, t in RECEIVED.items()}).items()}
    options = catalog.fill("filters", name, {}, "[[filters]]")[0]
    made, again, other = (filtered(TRAINED, ABOUT, [PlugIn(name, options)], key) for key in (("k",), ("k",), ("l",)))
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in TRAINED.items()}
    assert list(made) == list(TRAINED)
    assert made["n"] is TRAINED["n"]
    assert not torch.equal(made["a"], TRAINED["a"])
    assert all(torch.equal(made[n], again[n]) for n in made)
    assert torch.equal(made["a"], other["a"]) == (name != "gaussian")
    after = TRAINED | {f"r{n}": t for n, t in RECEIVED.items()}
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_clip_scales_the_change_as_a_whole_to_the_norm() -> None:
    made = filtered(TRAINED, ABOUT, [PlugIn("clip", {"norm": 0.5})], ("k",))
    assert length(TRAINED) > 2
    assert length(made) == pytest.approx(0.5, rel=1e-5)
    factor = 0.5 / length(TRAINED)
    for n in ("a", "b"):
        assert torch.allclose(made[n] - RECEIVED[n], factor * (TRAINED[n] - RECEIVED[n]), atol=1e-6)
    short = {"a": torch.full((4,), 0.1), "b": torch.zeros(2)}
    assert clip.filter(short, ABOUT, norm=0.5) is short


def test_noise_has_the_deviation_and_comes_after_the_clip_that_stands_first() -> None:
    update = {"w": torch.zeros(100_000, dtype=torch.float64)}
    torch.manual_seed(0)
    assert float(gaussian.filter(update, ABOUT, deviation=0.3)["w"].std()) == pytest.approx(0.3, rel=0.02)
    both = [PlugIn("clip", {"norm": 0.5}), PlugIn("gaussian", {"deviation": 5.0})]
    assert length(filtered(TRAINED, ABOUT, both, ("k",))) > 5
    assert length(filtered(TRAINED, ABOUT, both[::-1], ("k",))) == pytest.approx(0.5, rel=1e-5)
