"""Figures across labels and patients, worked out by hand; intervals by how often they hold the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from concilium.statistics import FOREGROUND_MEAN, MIN_PATIENTS, bootstrap_interval, summarize


def case(patient: str, dice: float | None, *, label: str = "liver", case: str = "", **more: Any) -> dict[str, Any]:
    about = {"model": "federated", "site": "north", "subset": "validation", "case": case or f"{patient}-1"}
    return about | {"patient": patient, "label": label, "dice": dice} | more


def rows(cases: list[dict[str, Any]], *metrics: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(label, metric) -> row, of one model at one site."""
    summary = summarize(cases, metrics or ("dice",))
    assert len({(r["model"], r["site"], r["subset"]) for r in summary}) == 1
    return {(r["label"], r["metric"]): r for r in summary}


# -------------------------------------------------------------------------------------------------------------- means


def test_a_patients_cases_are_averaged_first() -> None:
    """Patient A: (0.2 + 0.4) / 2 = 0.3; B: 0.9. Mean over patients 0.6, over cases it would be 0.5."""
    row = rows([case("A", 0.2), case("A", 0.4, case="A-2"), case("B", 0.9)])["liver", "dice"]
    assert row["mean"] == pytest.approx(0.6)
    assert (row["n"], row["n_cases"], row["n_undefined"]) == (2, 3, 0)


def test_undefined_cases_are_counted_and_left_out() -> None:
    """A: only 0.4 is defined; B: nothing is, so B is no patient of the mean; C: 0.8."""
    cases = [case("A", None), case("A", 0.4, case="A-2"), case("B", None), case("C", 0.8)]
    row = rows(cases)["liver", "dice"]
    assert row["mean"] == pytest.approx(0.6)
    assert (row["n"], row["n_cases"], row["n_undefined"]) == (2, 4, 2)


def test_zero_is_a_value() -> None:
    row = rows([case("A", 0.0), case("B", 1.0)])["liver", "dice"]
    assert (row["mean"], row["n"], row["n_undefined"]) == (0.5, 2, 0)


def test_nothing_is_defined() -> None:
    row = rows([case("A", None), case("B", None)])["liver", "dice"]
    assert (row["mean"], row["ci_low"], row["ci_high"], row["n"], row["n_undefined"]) == (None, None, None, 0, 2)


def test_the_foreground_mean_is_taken_within_each_patient() -> None:
    """A: liver (0.2 + 0.4) / 2 = 0.3, tumour 0.7, mean 0.5. B: liver 0.9, tumour undefined, mean 0.9. Over both 0.7."""
    cases = [
        case("A", 0.2), case("A", 0.4, case="A-2"), case("A", 0.7, label="tumour"), case("A", None, label="tumour", case="A-2"),
        case("B", 0.9), case("B", None, label="tumour"),
    ]  # fmt: skip
    found = rows(cases)
    assert found["liver", "dice"]["mean"] == pytest.approx(0.6)
    assert found["tumour", "dice"]["mean"] == pytest.approx(0.7)
    foreground = found[FOREGROUND_MEAN, "dice"]
    assert foreground["mean"] == pytest.approx(0.7)
    assert (foreground["n"], foreground["n_cases"], foreground["n_undefined"]) == (2, 3, 2)
    assert found["tumour", "dice"]["n"] == 1


def test_one_label_has_no_foreground_mean() -> None:
    assert set(rows([case("A", 0.5)])) == {("liver", "dice")}


def test_metrics_are_summarised_on_their_own() -> None:
    found = rows([case("A", 0.5, hd95=3.0), case("B", 0.7, hd95=None)], "dice", "hd95")
    assert found["liver", "dice"]["mean"] == pytest.approx(0.6)
    assert found["liver", "hd95"]["mean"] == 3.0
    assert (found["liver", "hd95"]["n"], found["liver", "hd95"]["n_undefined"]) == (1, 1)


def test_models_sites_and_subsets_are_kept_apart() -> None:
    cases = [
        case("A", value, model=model, site=site, subset=subset)
        for value, model, site, subset in (
            (0.1, "federated", "north", "validation"),
            (0.2, "local:north", "north", "validation"),
            (0.3, "federated", "south", "validation"),
            (0.4, "federated", "test", "test"),
        )
    ]
    summary = summarize(cases, ["dice"])
    assert [(r["model"], r["site"], r["subset"], r["mean"]) for r in summary] == [
        ("federated", "north", "validation", 0.1),
        ("local:north", "north", "validation", 0.2),
        ("federated", "south", "validation", 0.3),
        ("federated", "test", "test", 0.4),
    ]


def test_nothing_gives_nothing() -> None:
    assert summarize([], ["dice"]) == []


# ---------------------------------------------------------------------------------------------------------- intervals


def test_fewer_than_six_patients_have_no_interval() -> None:
    """Six cases of five patients are five."""
    five = [case(p, 0.1 * i) for i, p in enumerate("ABCDE")] + [case("A", 0.9, case="A-2")]
    row = rows(five)["liver", "dice"]
    assert (row["n"], row["n_cases"], row["ci_low"], row["ci_high"]) == (5, 6, None, None)
    row = rows([*five, case("F", 0.5)])["liver", "dice"]
    assert row["n"] == MIN_PATIENTS == 6
    assert 0 <= row["ci_low"] < row["mean"] < row["ci_high"] <= 0.9


def test_the_interval_is_reproducible_and_depends_on_the_seed() -> None:
    values = np.random.default_rng(0).random(20)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values.copy(), seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    cases = [case(str(i), float(v)) for i, v in enumerate(values)]
    (a,), (b,) = summarize(cases, ["dice"], seed=3), summarize(cases, ["dice"], seed=3)
    assert a == b
    assert (a["ci_low"], a["ci_high"]) == bootstrap_interval(values, seed=3)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap_interval(np.full(8, 0.25), seed=0) == (0.25, 0.25)


def test_the_interval_narrows_with_the_number_of_patients() -> None:
    """As that of the mean does: by half for four times as many."""
    rng = np.random.default_rng(1)
    widths = []
    for n in (50, 200):
        low, high = bootstrap_interval(rng.normal(0.8, 0.1, n), seed=0)
        assert low is not None
        assert high is not None
        widths.append(high - low)
        assert high - low == pytest.approx(2 * 1.96 * 0.1 / np.sqrt(n), rel=0.25)
    assert widths[1] / widths[0] == pytest.approx(0.5, rel=0.3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """95 % by name; the percentile bootstrap is known to cover a little less for few patients."""
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(300):
        low, high = bootstrap_interval(rng.beta(8, 2, 25), seed=seed)
        assert low is not None
        assert high is not None
        covered += low <= 0.8 <= high
    assert 0.88 <= covered / 300 <= 0.98
