"""How a site judges another's update: soft Dice by hand, over which cases, and what is told."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from concilium.answers import Cancelled, Policy
from concilium.answers import judge as module
from concilium.answers.judge import judge, soft_dice
from concilium.errors import ContractError
from concilium.messages import Judge, Judged, Labels

TWO: Labels = {"background": 0, "a": 1, "b": 2}


def logits_of(*chances: list[float]) -> Tensor:
    """Logits (L, 1, 1, n) of these probabilities, label by label."""
    return torch.tensor(chances).log()[:, None, None]


def label_of(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int16)[None, None]


def test_soft_dice_by_hand() -> None:
    """a: 2 * 0.6 / (0.6 + 0.2 + 1) = 2/3; b: 2 * 0.5 / (0.1 + 0.5 + 1) = 5/8."""
    logits = logits_of([0.3, 0.3], [0.6, 0.2], [0.1, 0.5])
    assert soft_dice(logits, label_of(1, 2), TWO) == pytest.approx((2 / 3 + 5 / 8) / 2, rel=1e-6)


def test_a_label_that_a_case_has_not_does_not_count() -> None:
    logits = logits_of([0.3, 0.3], [0.6, 0.2], [0.1, 0.5])
    assert soft_dice(logits, label_of(1, 0), TWO) == pytest.approx(2 / 3)
    assert soft_dice(logits, label_of(0, -1), TWO) is None


def test_voxels_to_be_ignored_do_not_count() -> None:
    logits = logits_of([0.3, 0.3, 0.0], [0.6, 0.2, 1.0], [0.1, 0.5, 0.0]).clamp(min=-100)
    labels: Labels = {**TWO, "ignore": 3}
    assert soft_dice(logits, label_of(1, 2, 3), labels) == pytest.approx((2 / 3 + 5 / 8) / 2, rel=1e-6)


def test_regions_have_a_chance_each() -> None:
    """Logit 0 is a chance of one half: whole 2 * 1 / (1 + 2), core 2 * 0.5 / (1 + 1)."""
    labels: Labels = {"background": 0, "whole": (1, 2), "core": 2}
    assert soft_dice(torch.zeros(2, 1, 1, 2), label_of(1, 2), labels) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_it_is_1_where_all_is_right_and_sure_and_never_more() -> None:
    label = torch.randint(0, 3, (7, 9, 11), generator=torch.Generator().manual_seed(0)).short()
    logits = 200.0 * nn.functional.one_hot(label.long(), 3).permute(3, 0, 1, 2)
    assert soft_dice(logits, label, TWO) == 1.0
    assert soft_dice(logits.roll(1, 0).half(), label, TWO) == 0.0


def test_less_sure_is_worse_although_the_label_map_is_the_same() -> None:
    label = label_of(1, 2, 0, 0)
    logits = 5.0 * nn.functional.one_hot(label.long(), 3).permute(3, 0, 1, 2)
    sure, unsure = (soft_dice(scale * logits, label, TWO) or 0.0 for scale in (1.0, 0.3))
    assert unsure < sure - 0.1


# ----------------------------------------------------------------------------------------- which cases, and what is told


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that were looked at. The chance of `a` in case n is n tenths in its only voxel, which is `a`."""
    seen: list[str] = []

    def prepare(case: str, dataset: Any, plan: Any, folder: Path) -> Any:
        assert folder == Path("cache") / "north"
        seen.append(case)
        return SimpleNamespace(image=int(case), label=np.full((1, 1, 1, 1), 0 if case == "0" else 1, np.int16))

    def predict(network: nn.Module, image: int, plan: Any, **told: Any) -> Tensor:
        assert not network.training
        assert told["mirror"] is False
        return logits_of([1 - image / 10], [image / 10])

    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(module, "predict_logits", predict)
    return seen


def answer(cases: int, *, names: str = "123456789", patients: str = "", told: bool = True, **weights: Tensor) -> Judged:
    own = [
        SimpleNamespace(case=c, dataset=None, member="north", number=i, patient=p)
        for i, (c, p) in enumerate(zip(names, patients or names, strict=True))
    ]
    job: Any = SimpleNamespace(
        network=lambda: nn.Linear(1, 1, bias=False),
        entries={"validation": tuple(own), "training": ()},
        plan=None,
        labels={"background": 0, "a": 1},
        training=SimpleNamespace(precision="float32"),
    )
    settings: Any = SimpleNamespace(cache=Path("cache"), policy=Policy(case_scores=told))
    request = Judge("m", 1, weights or {"weight": torch.ones(1, 1)}, cases)
    return judge(settings, job, request, device=torch.device("cpu"), cancelled=lambda: names == "x")


def soft(*tenths: int) -> float:
    return math.fsum(2 * (n / 10) / (n / 10 + 1) for n in tenths) / len(tenths)


@pytest.mark.parametrize(("cases", "expected"), [(1, (1,)), (3, (1, 2, 3)), (20, tuple(range(1, 10)))])
def test_the_first_cases_are_judged_by_always(cases: int, expected: tuple[int, ...], asked: list[str]) -> None:
    for _ in range(2):
        judged = answer(cases)
        assert (judged.n_cases, judged.score) == (len(expected), pytest.approx(soft(*expected), rel=1e-5))
    assert asked == 2 * [str(n) for n in expected]


def test_a_case_without_any_label_does_not_count(asked: list[str]) -> None:
    assert answer(2, names="05") == Judged(pytest.approx(soft(5)), 1)


def test_a_site_without_validation_cases_says_so(asked: list[str]) -> None:
    assert answer(8, names="") == answer(8, names="0") == Judged(0.0, 0)


def test_a_site_that_keeps_scores_back_tells_no_average_of_fewer_than_five_patients(asked: list[str]) -> None:
    assert answer(8, names="1234567", patients="aabbccd", told=False) == Judged(0.0, 0)
    assert answer(8, names="1234567", patients="aabbcde", told=False).n_cases == 7
    assert answer(4, told=False) == Judged(0.0, 0)
    assert answer(1).n_cases == 1


def test_weights_of_another_network_are_refused(asked: list[str]) -> None:
    with pytest.raises(ContractError, match="lacks"):
        answer(1, bias=torch.ones(1))
    assert asked == []


def test_a_request_that_was_cancelled_is_given_up(asked: list[str]) -> None:
    with pytest.raises(Cancelled):
        answer(1, names="x")
    assert asked == []
