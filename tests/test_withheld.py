"""Sites that keep the scores of their cases back: what is told instead, and how it stands beside what others tell."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pytest

from concilium._withheld import with_averages
from concilium.answers.evaluate import average
from concilium.disclosure import MIN_CASES
from concilium.messages import Score
from concilium.results import METRICS, SCALES, score_row
from concilium.statistics import summarize

PATIENTS = {"north": 12, "south": 7, "west": MIN_CASES - 1}


def scores(site: str, *, seed: int = 0) -> list[Score]:
    """Two labels of some cases; the first patient has two of them, and one score is undefined."""
    draw = random.Random(f"{site}{seed}")
    found = []
    for case in range(PATIENTS[site] + 1):
        for label in ("anterior", "posterior"):
            values: dict[str, float | None] = {m: draw.uniform(0.5, 1) for m in METRICS}
            if case == 2 and label == "posterior":
                values["hd95"] = None
            found.append(Score(case, max(0, case - 1), label, "ok", "mm", values, 1.0, 1.0, 1, 0, 0))
    return found


def told(sites: Iterable[str], model: str = "federated", *, seed: int = 0) -> list[dict[str, Any]]:
    place = {"model": model, "seed": seed, "fold": 0, "subset": "validation"}
    return [
        {**place, "site": site, "case": f"{site}{s.case}", "patient": f"{site}{s.patient}"} | score_row(s)
        for site in sites
        for s in scores(site, seed=seed)
    ]


def averages(sites: Iterable[str], model: str = "federated", *, seed: int = 0) -> list[dict[str, Any]]:
    place = {"model": model, "seed": seed, "fold": 0, "subset": "validation"}
    return [{**place, "site": s} | asdict(a) for s in sites for a in average(scores(s, seed=seed))]


def by_place(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    return {(r["model"], r["site"], r["subset"], r["label"], r["metric"]): r for r in rows}


def test_averages_are_the_means_that_the_scores_have() -> None:
    every = by_place(summarize(told(["north", "south"]), SCALES))
    found = by_place(with_averages(summarize(told(["south"]), SCALES), averages(["north"]), SCALES))
    assert found.keys() == every.keys()
    for place, row in every.items():
        assert found[place]["mean"] == pytest.approx(row["mean"]), place
        for key in ("n", "n_cases", "n_undefined"):
            assert found[place][key] == row[key], (place, key)
    low, high = (found["federated", "north", "validation", "anterior", "dice"][k] for k in ("ci_low", "ci_high"))
    assert low < every["federated", "north", "validation", "anterior", "dice"]["mean"] < high
    assert found["federated", "all", "validation", "anterior", "dice"]["ci_low"] is None


def test_nothing_is_told_of_few_patients() -> None:
    assert {(a.mean, a.deviation) for a in average(scores("west"))} == {(None, None)}
    assert {a.n for a in average(scores("west")) if a.metric == "dice"} == {PATIENTS["west"]}
    found = by_place(with_averages([], averages(["north", "west"]), SCALES))
    assert found["federated", "west", "validation", "anterior", "dice"]["mean"] is None
    pool = found["federated", "all", "validation", "anterior", "dice"]
    assert pool["n"] == PATIENTS["north"]  # who has no mean is not in that of all


def test_models_that_stay_at_their_sites_have_one_pool() -> None:
    cases = told(["south"], "local:south")
    found = by_place(with_averages(summarize(cases, SCALES), averages(["north"], "local:north"), SCALES))
    every = by_place(summarize([*cases, *told(["north"], "local:north")], SCALES))
    place = ("local", "all", "validation", "foreground_mean", "dice")
    assert found.keys() == every.keys()
    assert found[place]["mean"] == pytest.approx(every[place]["mean"])


def test_seeds_are_averaged() -> None:
    both = with_averages([], averages(["north"], seed=0) + averages(["north"], seed=1), SCALES)
    every = by_place(summarize(told(["north"], seed=0) + told(["north"], seed=1), SCALES))
    for place, row in by_place(both).items():
        assert row["n_seeds"] == 2
        assert row["mean"] == pytest.approx(every[place]["mean"]), place


def test_folds_hold_other_patients() -> None:
    """Each fold validates on its own part: together they are the site's patients."""
    whole = scores("north")
    parts = [[s for s in whole if s.patient % 2 == fold] for fold in (0, 1)]
    place = {"model": "federated", "seed": 0, "site": "north", "subset": "validation"}
    rows = [{**place, "fold": fold} | asdict(a) for fold, part in enumerate(parts) for a in average(part)]
    both, at_once = by_place(with_averages([], rows, SCALES)), by_place(with_averages([], averages(["north"]), SCALES))
    row, same = (found["federated", "north", "validation", "anterior", "dice"] for found in (both, at_once))
    assert row == {k: pytest.approx(v) for k, v in same.items()}


def test_without_such_sites_the_summary_is_as_it_was() -> None:
    summary = summarize(told(["north", "south"]), SCALES)
    assert with_averages(summary, [], SCALES) == summary
