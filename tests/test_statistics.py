"""Figures across labels and patients, worked out by hand; intervals by how often they hold the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from concilium._resampling import RESAMPLES, Draws, _add, _seed_effects, interval
from concilium.statistics import ALL_SITES, FOREGROUND_MEAN, MIN_PATIENTS, Scale, spread, summarize

DICE = {"dice": Scale(highest=1.0)}
ALL = DICE | {"hd95": Scale(higher_is_better=False)}


def case(patient: str, dice: float | None, *, label: str = "liver", case: str = "", **more: Any) -> dict[str, Any]:
    about = {"model": "federated", "site": "north", "subset": "validation", "case": case or f"{patient}-1"}
    return about | {"patient": patient, "label": label, "dice": dice} | more


def rows(cases: list[dict[str, Any]], *metrics: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(label, metric) -> row, of one model at one site."""
    summary = summarize(cases, {name: ALL[name] for name in metrics or ("dice",)})
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


def test_models_of_sites_that_drew_one_label_each_keep_their_patients_in_the_foreground_mean() -> None:
    """North drew livers (0.2, 0.4), south tumours (0.9): the mean over the sites' own models is over three patients, 0.5."""
    own = [case(p, d, model="local:north") for p, d in (("A", 0.2), ("B", 0.4))]
    own.append(case("C", 0.9, label="tumour", model="local:south", site="south"))
    shared = [{**c, "model": "federated"} for c in own]
    found = {(r["model"], r["site"], r["label"]): r for r in summarize([*shared, *own], DICE)}
    for model in ("federated", "local"):
        row = found[model, ALL_SITES, FOREGROUND_MEAN]
        assert (row["mean"], row["n"], row["n_cases"]) == (pytest.approx(0.5), 3, 3), model
    assert found["local:north", "north", FOREGROUND_MEAN]["mean"] == pytest.approx(0.3)
    assert found["federated", "south", FOREGROUND_MEAN]["mean"] == pytest.approx(0.9)


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
    summary = summarize(cases, DICE)
    assert [(r["model"], r["site"], r["subset"], r["mean"]) for r in summary if r["site"] != ALL_SITES] == [
        ("federated", "north", "validation", 0.1),
        ("federated", "south", "validation", 0.3),
        ("local:north", "north", "validation", 0.2),
        ("federated", "test", "test", 0.4),
        ("local", "north", "validation", 0.2),  # of all its sites' models, which is one
    ]
    assert [(r["model"], r["mean"]) for r in summary if r["site"] == ALL_SITES] == [("federated", pytest.approx(0.2))]


def test_nothing_gives_nothing() -> None:
    assert summarize([], DICE) == []


# ---------------------------------------------------------------------------------------------------------- intervals


def test_fewer_than_six_patients_have_no_interval() -> None:
    """Six cases of five patients are five."""
    five = [case(p, 0.1 * i) for i, p in enumerate("ABCDE")] + [case("A", 0.9, case="A-2")]
    row = rows(five)["liver", "dice"]
    assert (row["n"], row["n_cases"], row["ci_low"], row["ci_high"]) == (5, 6, None, None)
    row = rows([*five, case("F", 0.5)])["liver", "dice"]
    assert row["n"] == MIN_PATIENTS == 6
    assert 0 <= row["ci_low"] < row["mean"] < row["ci_high"] <= 0.9


def bounds(values: Any, *, seed: int = 0, sites: list[str] | None = None) -> tuple[float, float]:
    """Interval of (patients,) or (patients, seeds) values."""
    scores = np.asarray(values, dtype=float)
    scores = scores[:, None] if scores.ndim == 1 else scores
    return interval(scores, sites or ["north"] * len(scores), Draws(seed))


def test_the_interval_is_reproducible_and_depends_on_the_seed() -> None:
    values = np.random.default_rng(0).random(20)
    assert bounds(values, seed=3) == bounds(values.copy(), seed=3)
    assert bounds(values, seed=3) != bounds(values, seed=4)


def test_the_order_of_the_rows_changes_no_bit() -> None:
    rng = np.random.default_rng(0)
    cases = [
        case(f"p{i}", float(rng.random()), case=f"p{i}-{j}", site=("north", "south")[i % 2], seed=seed, model=model)
        for i in range(20) for j in range(4) for seed in (1, 2) for model in ("federated", "local:north")
    ]  # fmt: skip
    shuffled = [cases[i] for i in rng.permutation(len(cases))]

    def by_key(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
        return sorted(tuple(map(repr, r.values())) for r in rows)

    assert by_key(summarize(cases, DICE, seed=1)) == by_key(summarize(shuffled, DICE, seed=1))


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bounds(np.full(8, 0.25)) == (0.25, 0.25)


def test_the_interval_of_many_normal_values_is_that_of_student() -> None:
    values = np.random.default_rng(1).normal(0.8, 0.1, 400)
    reach = stats.t.ppf(0.975, 399) * values.std(ddof=1) / 20
    assert bounds(values) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.05 * reach)


def test_the_interval_is_never_narrower_than_that_of_student() -> None:
    rng = np.random.default_rng(1)
    for n in (6, 12, 40):
        values = rng.beta(8, 2, n)
        reach = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5
        low, high = bounds(values)
        assert low <= values.mean() - reach + 1e-12
        assert high >= values.mean() + reach - 1e-12


def test_the_interval_reaches_further_where_the_rare_values_are() -> None:
    """Mostly good, a few misses: more misses would move the mean down, not up."""
    values = np.concatenate([np.linspace(0.85, 0.95, 27), [0.0, 0.1, 0.3]])
    low, high = bounds(values)
    assert values.mean() - low > 1.5 * (high - values.mean())


def test_the_interval_stays_on_the_scale() -> None:
    row = rows([case(str(i), v) for i, v in enumerate((1.0, 1.0, 1.0, 0.9, 1.0, 0.0))])["liver", "dice"]
    assert 0.0 <= row["ci_low"] < row["mean"]
    assert row["ci_high"] == 1.0


def test_patients_do_not_leave_their_site() -> None:
    """Sites that differ, patients of a site that do not: resampling within sites changes nothing, across them it would."""
    values, sites = [0.2] * 5 + [0.9] * 5, ["north"] * 5 + ["south"] * 5
    assert bounds(values, sites=sites) == pytest.approx((0.55, 0.55))
    low, high = bounds(values)
    assert high - low > 0.3


def test_a_site_with_one_patient_shares_a_stratum() -> None:
    """Alone, it would count as known without error."""
    values = [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9]
    low, high = bounds(values, sites=["north"] * 3 + ["south"] * 2 + ["west", "east"])
    assert high - low > 0.05
    low, high = bounds(values, sites=["north"] * 4 + ["south"] * 2 + ["west"])
    assert high - low > 0.05


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    patients = rng.normal(0.8, 0.02, 40)[:, None]
    agree = np.repeat(patients, 3, axis=1)
    disagree = agree + np.array([-0.05, 0.0, 0.05])
    one, same, other = (bounds(x) for x in (patients, agree, disagree))
    assert same == pytest.approx(one, abs=1e-3)
    assert other[1] - other[0] > 4 * (same[1] - same[0])


def test_what_a_seed_does_to_single_patients_does_not_count_twice() -> None:
    """Two patients, two seeds: 0.05 by seed, 0.03 by patient and seed. Residual mean square, by patients: 2 x 0.03**2;
    the seeds' means have a variance of 2 x 0.05**2: what is left of it is 1 - 0.36, of the effect 0.8."""
    assert _seed_effects(np.array([[-0.08, 0.08], [-0.02, 0.02]])) == pytest.approx([-0.04, 0.04])
    assert not _seed_effects(np.array([[-0.08, 0.08], [0.07, -0.07]])).any()


def test_resamples_scatter_as_much_as_means_do() -> None:
    """Of six values drawn with replacement the mean has 5/6 of the variance that it should have."""
    values = np.array([0.1, 0.2, 0.4, 0.7, 0.8, 0.9])
    shift, variance = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    _add(shift, variance, values, 1.0, Draws(0).counts("north", 6))
    assert shift.var() == pytest.approx(values.var(ddof=1) / 6, rel=0.05)
    assert variance.mean() == pytest.approx(values.var(ddof=0) / 6, rel=0.05)


def test_seeds_are_averaged_within_patients() -> None:
    """A: (0.2 + 0.4) / 2; B: only under seed 2, 0.9. Mean 0.6."""
    row = rows([case("A", 0.2, seed=1), case("A", 0.4, seed=2), case("B", None, seed=1), case("B", 0.9, seed=2)])
    assert row["liver", "dice"]["mean"] == pytest.approx(0.6)
    assert [row["liver", "dice"][k] for k in ("n", "n_cases", "n_undefined", "n_seeds")] == [2, 2, 1, 2]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """95 % by name, at n = 8 as at n = 30. The percentile bootstrap would have 85 % at n = 8."""
    rng = np.random.default_rng(2)
    for n in (8, 30):
        held = [low <= 0.8 <= high for seed in range(200) for low, high in [bounds(rng.beta(8, 2, n), seed=seed)]]
        assert 0.91 <= np.mean(held) <= 1.0


# ------------------------------------------------------------------------------------------- sites together, and apart


def test_all_sites_together_count_each_patient_once() -> None:
    """North 0.2 0.4 0.6, south 0.9: mean 0.525 over patients, not 0.65 over sites."""
    cases = [case(p, v, site="north") for p, v in zip("ABC", (0.2, 0.4, 0.6), strict=True)]
    cases.append(case("A", 0.9, site="south"))  # another patient of the same name
    (row,) = [r for r in summarize(cases, DICE) if r["site"] == ALL_SITES]
    assert (row["mean"], row["n"], row["n_cases"]) == (pytest.approx(0.525), 4, 4)


def test_models_of_single_sites_count_as_one() -> None:
    """On validation cases each patient has its own site's model; on the test set the mean over the models."""
    cases = [
        case("A", 0.2, model="local:north", site="north"),
        case("B", 0.6, model="local:south", site="south"),
        *(case(p, v, model="local:north", site="test", subset="test") for p, v in (("T", 0.5), ("U", None))),
        *(case(p, v, model="local:south", site="test", subset="test") for p, v in (("T", 0.9), ("U", 0.3))),
    ]
    together = {(r["site"], r["subset"]): r for r in summarize(cases, DICE) if r["model"] == "local"}
    assert {k: (r["mean"], r["n"]) for k, r in together.items()} == {
        (ALL_SITES, "validation"): (pytest.approx(0.4), 2),
        ("test", "test"): (pytest.approx(0.5), 2),  # T: 0.7, U: 0.3
    }


def test_the_worst_site_and_the_gap() -> None:
    """Six patients a site count, five do not; of a distance the largest is the worst."""
    cases = [
        case(f"{site}{i}", dice, model=model, site=site, hd95=hd95)
        for site, n, dice, hd95 in (("north", 6, 0.9, 2.0), ("south", 6, 0.7, 5.0), ("west", 5, 0.1, 50.0))
        for i in range(n) for model in ("federated", f"local:{site}")
    ]  # fmt: skip
    found = {(r["model"], r["metric"]): r for r in spread(summarize(cases, ALL), ALL)}
    assert set(found) == {(m, k) for m in ("federated", "local") for k in ("dice", "hd95")}
    for model in ("federated", "local"):
        dice, hd95 = found[model, "dice"], found[model, "hd95"]
        assert (dice["worst"], dice["best"], dice["gap"]) == ("south", "north", pytest.approx(0.2))
        assert (hd95["worst"], hd95["best"], hd95["gap"]) == ("south", "north", pytest.approx(3.0))


def test_a_site_that_tells_no_mean_is_neither_worst_nor_best() -> None:
    """It keeps scores back, and has too few patients in each fold, though enough together."""
    cases = [case(f"{s}{i}", v, site=s) for s, v in (("north", 0.9), ("south", 0.7), ("west", 0.8)) for i in range(6)]
    summary = [row | ({"mean": None} if row["site"] == "west" else {}) for row in summarize(cases, DICE)]
    (found,) = spread(summary, DICE)
    assert (found["worst"], found["best"]) == ("south", "north")
