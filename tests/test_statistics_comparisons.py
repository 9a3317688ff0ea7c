"""Two models on the same patients: worked out by hand, and beside scipy."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from scipy import stats

from concilium._resampling import Draws, sign_flip
from concilium.statistics import FOREGROUND_MEAN, Scale, compare, holm, non_inferior, summarize

METRICS = {"dice": Scale(highest=1.0)}


def case(model: str, patient: str, dice: float | None, **more: Any) -> dict[str, Any]:
    about = {"model": model, "site": "north", "subset": "validation", "case": patient, "patient": patient}
    return about | {"label": "liver", "dice": dice} | more


def only(cases: list[dict[str, Any]]) -> dict[str, Any]:
    (row,) = compare(cases, METRICS)
    return row


def pairs(differences: list[float | None], **more: Any) -> list[dict[str, Any]]:
    """Cases of models a and b that differ by so much."""
    cases = [case("a", f"p{i:02d}", None if d is None else 0.5 + d, **more) for i, d in enumerate(differences)]
    return cases + [case("b", f"p{i:02d}", 0.5, **more) for i in range(len(differences))]


def p_of(differences: Any) -> float:
    scores = np.asarray(differences, dtype=float)
    return sign_flip(scores[:, None] if scores.ndim == 1 else scores, Draws(0))


# --------------------------------------------------------------------------------------------------------------- tests


def test_six_patients_that_all_gain() -> None:
    """Of 2**6 sign patterns two are as far out as all plus: p = 2 / 64."""
    row = only(pairs([0.1, 0.2, 0.05, 0.1, 0.3, 0.15]))
    assert row["p"] == pytest.approx(2 / 64)
    assert row["difference"] == pytest.approx(0.15)
    assert (row["a"], row["b"], row["n"], row["n_undefined"]) == ("a", "b", 6, 0)


def test_models_trained_without_a_site_do_not_weaken_the_others() -> None:
    """They are no comparison of methods, and Holm would pay for each."""
    cases = pairs([0.1, 0.2, 0.05, 0.1, 0.3, 0.15])
    left = [case("a-without-north", c["case"], 0.4) for c in cases[:6]]
    assert compare(cases + left, METRICS) == compare(cases, METRICS)


def test_six_patients_of_whom_one_loses() -> None:
    """1 2 3 4 5 and -1: sum 14 of 16. Sums of 14 or 16: the signs of both ones are free but for both minus, 2 to 5 are plus.
    So 3 patterns, 6 with the mirrored ones: p = 6 / 64."""
    assert p_of([1, 2, 3, 4, 5, -1]) == pytest.approx(6 / 64)


def test_patients_without_a_difference_change_nothing() -> None:
    assert p_of([1, 2, 3, 4, 5, -1, 0, 0, 0]) == p_of([1, 2, 3, 4, 5, -1])
    assert p_of([0.0] * 8) == 1.0


@pytest.mark.parametrize(("n", "tolerance"), [(8, 1e-12), (30, 0.02)])
def test_p_is_that_of_scipy(n: int, tolerance: float) -> None:
    """scipy.stats.permutation_test exchanges the members of pairs; from 14 patients on both draw at random."""
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.01, 0.03, n), np.zeros(n)
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    )
    assert p_of(a) == pytest.approx(expected.pvalue, abs=tolerance)


def test_p_is_never_zero() -> None:
    assert p_of(np.linspace(0.1, 0.2, 200)) == pytest.approx(1e-4)


def test_seeds_that_disagree_raise_p() -> None:
    """Every patient gains under any seed, but by how much depends on the seed: training again might give a loss."""
    rng = np.random.default_rng(0)
    patients = rng.normal(0.02, 0.005, (40, 1))
    agree, disagree = (patients + np.array(shift) for shift in ([-0.001, 0.0, 0.001], [-0.03, 0.0, 0.03]))
    assert p_of(agree) < 0.01
    assert p_of(disagree) > 0.1


def test_false_positives_are_as_rare_as_they_should_be() -> None:
    """Ties and skewed scores at n = 12; and a seed's luck, which a test over patients alone takes for a difference."""
    rng = np.random.default_rng(1)
    tied = [p_of(np.where(rng.random(12) < 0.5, 0, rng.normal(0, 1, 12))) for _ in range(300)]
    lucky = [p_of(rng.normal(0, 1, (30, 1)) + rng.normal(0, 1, 3) + rng.normal(0, 0.5, (30, 3))) for _ in range(150)]
    assert np.mean(np.array(tied) <= 0.05) <= 0.08
    assert np.mean(np.array(lucky) <= 0.05) <= 0.09


# ---------------------------------------------------------------------------------------------------------------- Holm


def test_holm_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, then 0.04 x 1 would be below 0.03 x 2 = 0.06, and is raised to it."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_ends_at_one_and_leaves_out_what_was_not_tested() -> None:
    assert holm([0.9, None, 0.6]) == [1.0, None, 1.0]
    assert holm([0.01, None]) == [0.01, None]
    assert holm([]) == []


def test_a_family_is_all_pairs_of_one_label_and_metric() -> None:
    """Three models: three pairs each; of both labels' tests none counts for the other."""
    rng = np.random.default_rng(0)
    cases = [
        case(model, f"p{i}", float(np.clip(0.7 + gain + rng.normal(0, 0.02), 0, 1)), label=label)
        for model, gain in (("a", 0.02), ("b", 0.0), ("c", 0.0)) for i in range(12) for label in ("liver", "tumour")
    ]  # fmt: skip
    rows = compare(cases, METRICS)
    for label in ("liver", "tumour", FOREGROUND_MEAN):
        own = [r for r in rows if r["label"] == label]
        assert [(r["a"], r["b"]) for r in own] == [("a", "b"), ("a", "c"), ("b", "c")]
        assert [r["p_holm"] for r in own] == holm([r["p"] for r in own])


# --------------------------------------------------------------------------------------------------------------- pairs


def test_fewer_than_six_pairs_have_neither_interval_nor_p() -> None:
    row = only(pairs([0.1] * 5))
    assert [row[k] for k in ("ci_low", "ci_high", "p", "p_holm", "n")] == [None, None, None, None, 5]
    assert row["difference"] == pytest.approx(0.1)


def test_undefined_pairs_are_counted_and_left_out() -> None:
    """Also a patient on whom one of both models was not scored."""
    row = only([*pairs([0.1, None, 0.3, None]), case("b", "other", 0.9)])
    assert (row["difference"], row["n"], row["n_undefined"]) == (pytest.approx(0.2), 2, 3)


def test_the_interval_of_a_constant_difference_has_no_width() -> None:
    """However far the patients are apart: what they share cancels."""
    cases = [case(m, f"p{i}", 0.1 * i + gain) for i in range(8) for m, gain in (("a", 0.125), ("b", 0.0))]
    row = only(cases)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((0.125, 0.125))


def test_the_interval_is_turned_round_with_the_models() -> None:
    differences: list[float | None] = [0.1, 0.2, -0.1, 0.05, 0.3, 0.02, -0.04]
    there = only(pairs(differences))
    cases = pairs(differences)
    back = only([c for c in cases if c["model"] == "b"] + [c for c in cases if c["model"] == "a"])
    assert back["difference"] == pytest.approx(-there["difference"])
    assert (back["ci_low"], back["ci_high"]) == pytest.approx((-there["ci_high"], -there["ci_low"]))
    assert back["p"] == there["p"]


def test_the_test_set_decides_where_there_is_one() -> None:
    cases = pairs([0.1] * 6) + pairs([0.3] * 7, subset="test", site="test")
    row = only(cases)
    assert (row["subset"], row["n"], row["difference"]) == ("test", 7, pytest.approx(0.3))


def test_each_patient_is_paired_with_its_own_sites_model() -> None:
    cases = [
        case(model, f"{site}{i}", value, site=site)
        for site, own in (("north", 0.5), ("south", 0.7)) for i in range(4)
        for model, value in (("a", 0.8), (f"local:{site}", own))
    ]  # fmt: skip
    row = only(cases)
    assert (row["a"], row["b"], row["n"], row["difference"]) == ("a", "local", 8, pytest.approx(0.2))
    assert row["ci_high"] - row["ci_low"] < 1e-9, "sites that differ are not patients that differ"


def test_only_seeds_of_both_models_are_paired() -> None:
    """Seed 2 is a's alone."""
    cases = [case("a", f"p{i}", v, seed=s) for i in range(6) for s, v in ((1, 0.6), (2, 0.9))]
    row = only(cases + [case("b", f"p{i}", 0.5, seed=s) for i in range(6) for s in (1, 3)])
    assert (row["difference"], row["n_seeds"]) == (pytest.approx(0.1), 1)
    row = only([*cases, case("b", "p0", 0.5, seed=3)])
    assert (row["difference"], row["n"], row["n_seeds"]) == (None, 0, 0)


def test_one_model_has_no_comparison() -> None:
    assert compare([case("a", "p", 0.5)], METRICS) == []
    assert compare([], METRICS) == []


def test_non_inferiority_is_read_from_the_interval() -> None:
    """A better mean with too wide an interval is not enough."""
    assert non_inferior({"difference": 0.01, "ci_low": -0.03, "ci_high": 0.05}, 0.02) is False
    assert non_inferior({"difference": -0.01, "ci_low": -0.015, "ci_high": 0.0}, 0.02) is True
    assert non_inferior({"difference": 0.01, "ci_low": None, "ci_high": None}, 0.02) is None
    assert non_inferior({"ci_low": -9.0, "ci_high": 0.4}, 0.5, higher_is_better=False) is True
    assert non_inferior({"ci_low": -9.0, "ci_high": 0.6}, 0.5, higher_is_better=False) is False


@pytest.mark.slow
def test_a_large_study_takes_seconds() -> None:
    """1,000 cases, 6 models, 3 seeds, 3 labels, 4 metrics."""
    rng = np.random.default_rng(0)
    metrics = {f"m{i}": Scale() for i in range(4)}
    cases = [
        {"model": f"model{m}", "site": f"site{i % 5}", "subset": "validation", "case": str(i), "patient": str(i), "seed": s,
         "label": f"label{x}"} | {k: None if rng.random() < 0.02 else float(rng.random()) for k in metrics}
        for i in range(1000) for m in range(6) for s in range(3) for x in range(3)
    ]  # fmt: skip
    began = time.perf_counter()
    summarize(cases, metrics)
    compare(cases, metrics)
    assert time.perf_counter() - began < 60  # 20 on a quiet machine
