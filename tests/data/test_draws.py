"""Random numbers of a key: what a site's secret adds to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concilium.data import draws
from concilium.data.draws import Secret, drawn_from, seed_all
from concilium.filters import Leaving, filtered
from concilium.messages import PlugIn


@pytest.fixture
def same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key has the same seed, as every 2**32nd has for torch: whoever tries them all finds that of any key."""
    monkeypatch.setattr(draws, "digest", lambda *key: 5)


@pytest.mark.usefixtures("same_seed")
def test_a_seed_that_was_guessed_does_not_tell_what_was_drawn_from_a_secret() -> None:
    def seeded(*key: str | int) -> Tensor:
        seed_all(*key)
        return torch.randn(32)

    def within(*key: str | int) -> Tensor:
        with drawn_from(*key):
            return torch.randn(32)

    for draw in (seeded, within):
        assert torch.equal(draw("a"), draw("b")), "without a secret the seed is all"
        assert torch.equal(draw("a", Secret("s")), draw("a", Secret("s")))
        drawn = [draw("a"), draw("a", Secret("s")), draw("a", Secret("t")), draw("b", Secret("s"))]
        assert len({tuple(x.tolist()) for x in drawn}) == 4
        assert torch.equal(draw("a", Secret("")), draw("a")), "no secret: a simulation"


@pytest.mark.usefixtures("same_seed")
def test_filters_draw_from_all_of_the_secret() -> None:
    zero = {"w": torch.zeros(64)}
    noised = [
        filtered(zero, Leaving("m", 1, 1, 1, zero), [PlugIn("gaussian", {"deviation": 1.0})], ("m", Secret(secret)))[
            "w"
        ]
        for secret in ("s", "s", "t", "")
    ]
    assert torch.equal(noised[0], noised[1])
    assert not torch.equal(noised[0], noised[2])
    assert not torch.equal(noised[0], noised[3])
