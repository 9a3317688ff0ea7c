"""What a report says of sites with few patients, of sites that keep scores of cases back, and of undefined scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pages import Page, page_of

from concilium._withheld import with_averages
from concilium.answers.evaluate import average
from concilium.messages import Score
from concilium.reports._cases import View
from concilium.reports._found import SCALES, find
from concilium.reports._guarded import guarded
from concilium.reports.html import write_report
from concilium.statistics import compare, spread, summarize

Make = Callable[..., Path]


def written(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The results of a run whose cases were changed so; all that follows from them is made anew."""
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text())
    results["cases"] = [case for case in map(dict, results["cases"]) if change(case) is not False]
    summary = summarize(results["cases"], SCALES)
    results |= {"summary": summary, "sites": spread(summary, SCALES), "comparisons": compare(results["cases"], SCALES)}
    path.write_text(json.dumps(results))
    return results


def keep_back(folder: Path, *sites: str) -> dict[str, Any]:
    """The results of a run in which these sites told averages."""
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text())
    averages = []
    for site in sites:
        own = [c for c in results["cases"] if c["site"] == site]
        for model, subset in dict.fromkeys((c["model"], c["subset"]) for c in own):
            rows = [c for c in own if (c["model"], c["subset"]) == (model, subset)]
            numbers = {c["case"]: i for i, c in enumerate(rows)}
            scores = [
                Score(numbers[c["case"]], numbers[c["case"]], c["label"], "ok", "mm", {m: c[m] for m in SCALES}, 1, 1, 0, 0, 0)
                for c in rows
            ]  # fmt: skip
            place = {"model": model, "seed": 1, "fold": 0, "site": site, "subset": subset}
            averages += [place | asdict(a) for a in average(scores)]
    cases = [c for c in results["cases"] if c["site"] not in sites]
    summary = with_averages(summarize(cases, SCALES), averages, SCALES)
    results |= {
        "cases": cases,
        "summary": summary,
        "sites": spread(summary, SCALES),
        "comparisons": compare(cases, SCALES),
    }
    path.write_text(json.dumps(results))
    return results


def mean(results: dict[str, Any], site: str, model: str = "federated") -> float:
    """Dice over the labels, validation cases."""
    wanted = {"model": model, "site": site, "subset": "validation", "label": "foreground_mean", "metric": "dice"}
    (row,) = (s for s in results["summary"] if wanted.items() <= s.items())
    return float(row["mean"])


# ---------------------------------------------------------------------------------------------------------- worst site


def test_a_site_of_few_patients_is_not_named_the_worst(run_folder: Make) -> None:
    """The statistics demand six patients of a site; whoever is worse with three is not."""
    page = page_of(run_folder(n_tiny=3))[1]
    assert "worst (" not in page.words
    assert "the worst (tiny" not in page.words


def test_worst_and_best_site_are_those_of_the_results(run_folder: Make) -> None:
    folder = run_folder(n_tiny=6)
    results = changed(folder, lambda c: c.update(dice=0.25) if c["site"] == "tiny" else None)
    page = page_of(folder)[1]
    assert (
        f"{mean(results, 'north') - 0.25:.3f} Dice between the best site (north, {mean(results, 'north'):.3f}) and the worst "
        "(tiny, 0.250) of those with 6 patients or more"
    ) in page.words


# --------------------------------------------------------------------------------------------------------- subtraction


def test_what_is_hidden_does_not_follow_from_the_mean_over_all_sites(run_folder: Make) -> None:
    """Three patients are hidden: 11 times the mean of all, less 8 times that of the others, would be their sum."""
    folder = run_folder(engine="flare")
    results = changed(
        folder, lambda c: None if c["site"] != "test" else False
    )  # so that comparisons are over all sites
    assert {c["n"] for c in results["comparisons"]} == {11}
    page = written(folder)
    assert "tiny n < 5" in page.words
    assert "all sites not shown not shown" in page.words
    assert f"{mean(results, 'north'):.3f}" in page.words
    for model in ("federated", "local"):
        assert f"{mean(results, 'all', model):.3f}" not in page.words
    assert "n = 11" not in page.words
    assert "minus" not in page.words.partition("Volumes")[0]
    assert "would follow from them" in page.words
    figures = [row for row in guarded(results)["summary"] if row["mean"] is not None]
    assert {row["site"] for row in figures} == {"north"}


def test_the_mean_over_all_sites_is_shown_where_enough_are_hidden(run_folder: Make) -> None:
    """Two sites of three patients each: what remains is the mean of six."""
    folder = run_folder(engine="flare")
    more = [
        c | {"site": "small", "case": f"small{c['case']}", "model": c["model"].replace("tiny", "small")}
        for c in json.loads((folder / "results.json").read_text())["cases"]
        if c["site"] == "tiny"
    ]
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"cases": results["cases"] + more}))
    results = changed(folder, lambda c: None)
    page = written(folder)
    assert "small n < 5" in page.words
    assert f"all sites n = 14 {mean(results, 'all'):.3f}" in page.words
    assert "would follow from them" not in page.words


def test_where_all_have_patients_enough_all_is_shown(run_folder: Make) -> None:
    folder = run_folder(engine="flare", n_tiny=5)
    results = json.loads((folder / "results.json").read_text())
    assert f"all sites n = 13 {mean(results, 'all'):.3f}" in written(folder).words
    assert [row for row in guarded(results)["summary"] if "hidden" in row] == []


def test_a_metric_that_few_have_is_hidden_by_itself(run_folder: Make) -> None:
    """Dice of 8 and 6 patients, but a distance of only 2 of these 6."""
    folder = run_folder(engine="flare", n_tiny=6)
    results = changed(
        folder, lambda c: c.update(hd95=None) if "tiny" in c["site"] and c["case"] > "tiny-case-0001" else None
    )
    found = {
        (r["site"], r["metric"]): r.get("hidden") for r in guarded(results)["summary"] if r["subset"] == "validation"
    }
    assert found["tiny", "hd95"] == "n < 5"
    assert found["all", "hd95"] == "not shown"
    assert found["tiny", "dice"] is found["all", "dice"] is found["north", "hd95"] is None


@pytest.mark.parametrize("study", [None, "", '[study]\nname = "s"\n', '[engine]\nname = "flare"\n'])
def test_a_report_is_private_unless_a_simulation_is_stated(study: str | None, run_folder: Make) -> None:
    folder = run_folder(engine="simulation")
    assert not find(folder).is_shared
    (folder / "study.toml").unlink()
    if study is not None:
        (folder / "study.toml").write_text(study)
    assert find(folder).is_shared
    assert "tiny-case" not in write_report(folder).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- undefined


def test_undefined_scores_are_counted_in_their_cell(run_folder: Make) -> None:
    folder = run_folder(labels=("liver",))
    none = {"test-case-0000": None, "test-case-0001": None}
    changed(folder, lambda c: c.update(hd95=none.get(c["case"], c["hd95"])) if c["model"] == "federated" else None)
    page = written(folder)
    assert re.search(r"test set n = 6–8 \d\.\d \[\d\.\d, \d\.\d\] 2 undefined", page.words)
    assert page.words.count("2 undefined") == 1
    assert "Undefined: scores of single cases" in page.words


def test_a_cell_without_any_defined_score_says_so(run_folder: Make) -> None:
    folder = run_folder(labels=("liver",))
    changed(folder, lambda c: c.update(hd95=None))
    assert "test set 8 undefined 16 undefined" in written(folder).words  # local: two sites' models


def test_between_hospitals_few_undefined_scores_are_not_counted_out(run_folder: Make) -> None:
    folder = run_folder(engine="flare", labels=("liver",))
    changed(folder, lambda c: c.update(hd95=None) if c["case"] == "test-case-0000" else None)
    words = written(folder).words
    assert "fewer than 5 undefined" in words
    assert not re.search(r"\b[1-4] undefined", words)


# ------------------------------------------------------------------------------------------------------------ set aside


def test_counts_of_cases_set_aside_are_told(run_folder: Make) -> None:
    """Between hospitals a site tells how many; small numbers are not passed on."""
    row = {"case": None, "text": None}
    excluded = [
        row | {"site": "north", "reason": "unreadable", "count": 7},
        row | {"site": "tiny", "reason": "unreadable", "count": 2},
        row | {"site": "tiny", "reason": "missing_label", "count": 1},
    ]
    warnings = ["tiny: 2 cases set aside (unreadable).", "tiny: 1 case set aside (missing_label)."]
    page = written(run_folder(engine="flare", excluded=excluded, warnings=warnings))
    assert "north unreadable 7" in page.words
    assert "tiny missing_label fewer than 5 tiny unreadable fewer than 5" in page.words
    assert not re.search(r"\b[12] cases? set aside", page.words)
    assert page.words.count("fewer than 5 cases set aside") == 2
    assert "No case was set aside" not in page.words


def test_paths_in_what_an_error_said_are_left_out(run_folder: Make) -> None:
    said = "[Errno 2] /data/secret place/images/c1.nii.gz is gone"
    excluded = [{"site": "north", "case": "c1", "reason": "unreadable", "text": said, "count": 1}]
    folder = run_folder(excluded=excluded, warnings=[said], problems=[f"north: {said}"], complete=False)
    page = written(folder)
    assert "c1 [Errno 2] [path] [path] is gone" in page.words
    assert "c1.nii.gz" not in page.words
    assert page.words.count("is gone") == 3


# ----------------------------------------------------------------------------------------------------------- kept back


def test_a_site_that_keeps_scores_back_stands_with_its_averages(run_folder: Make) -> None:
    folder = run_folder(engine="flare", n_tiny=7)
    before = json.loads((folder / "results.json").read_text())
    results = keep_back(folder, "tiny")
    page = written(folder)
    assert mean(results, "tiny") == pytest.approx(mean(before, "tiny"))
    assert re.search(rf"tiny n = 7 {mean(results, 'tiny'):.3f} \[0\.\d+, [01]\.\d+\]", page.words)
    assert re.search(rf"all sites n = 15 {mean(before, 'all'):.3f} 0\.\d+ A cell", page.words), "without intervals"
    assert "tiny: scores of single cases are kept back" in page.words
    assert "liver tiny kept back" in page.words
    assert "Not counted: scores of single cases are kept back at tiny." in page.words


def test_where_every_site_keeps_scores_back_there_is_a_report(run_folder: Make) -> None:
    folder = run_folder(engine="flare", n_tiny=7)
    results = keep_back(folder, "north", "tiny", "test")
    assert results["cases"] == []
    (folder / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    page = written(folder)
    assert f"north n = 8 {mean(results, 'north'):.3f}" in page.words
    assert "95 % Hausdorff distance [mm], mean over the labels" in page.words
    assert "kept back at test set, north, tiny." in page.words


def test_parts_about_cases_say_whose_are_missing(run_folder: Make) -> None:
    """No empty panel, and no worst case of who told none."""
    folder = run_folder(n_tiny=7)
    keep_back(folder, "tiny")
    text, page = page_of(folder)
    assert "tiny (0 cases)" not in page.words
    assert "Not in these figures: scores of single cases are kept back at tiny." in page.words
    assert "Not among these cases: scores of single cases are kept back at tiny." in page.words
    assert "tiny-case-0" not in text.partition("Volumes")[0].partition("The worst cases")[2]


def test_a_site_that_has_too_few_in_each_fold_has_told_nothing(run_folder: Make) -> None:
    """Its patients are enough together, but no fold's are: there is a number, and no mean."""
    folder = run_folder(engine="flare", n_tiny=7)
    path = folder / "results.json"
    results = keep_back(folder, "tiny")
    for row in results["summary"]:
        if row["site"] == "tiny":
            row |= {"mean": None, "ci_low": None, "ci_high": None}
    path.write_text(json.dumps(results | {"sites": spread(results["summary"], SCALES)}))
    assert "tiny not told not told" in written(folder).words


# --------------------------------------------------------------------------------------------------------------- units


def test_sites_with_and_without_spacing_are_labelled_apart(run_folder: Make) -> None:
    folder = run_folder()
    changed(folder, lambda c: c.update(unit="px") if c["site"] == "tiny" else None)
    page = written(folder)
    assert View(find(folder), False).unit == "mm or px"
    assert "95 % Hausdorff distance [mm or px], mean over the labels" in page.words
    assert "a mean over sites of both kinds has no unit" in page.words
    assert re.search(r"test set n = 8, mm .* tiny n = 3, px ", page.words)
    assert "tiny n = 3 0." in page.words, "Dice has no unit"
    assert "reference [ml or px]" in page.words
    assert "liver tiny [px]" in page.words
    assert "liver north [ml]" in page.words
