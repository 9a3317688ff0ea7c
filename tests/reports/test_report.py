"""The report: what stands in it, what must not, and that it is one whole page."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import Page, page_of

from concilium.errors import StudyError
from concilium.reports import _sections
from concilium.reports._cases import View
from concilium.reports._found import SCALES, find
from concilium.reports.html import write_report
from concilium.statistics import summarize

PNG = b"\x89PNG\r\n\x1a\n picture of "
Make = Callable[..., Path]


def pictured(text: str) -> list[str]:
    """Whose pictures a page holds, in its order."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [base64.b64decode(f).removeprefix(PNG).decode() for f in found]


# --------------------------------------------------------------------------------------------------------- a whole page


def test_it_is_one_page_that_needs_nothing_else(run_folder: Make) -> None:
    path = write_report(run_folder())
    assert path.name == "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert "script" not in page.tags
    links = [a[1:] for a in page.addresses if a.startswith("#")]
    assert links
    assert all(f'id="{link}"' in text for link in links)


def test_it_says_what_came_out(run_folder: Make) -> None:
    folder = run_folder()
    _, page = page_of(folder)
    summary = json.loads((folder / "results.json").read_text())["summary"]
    one = {"model": "federated", "site": "test", "label": "foreground_mean", "metric": "dice"}
    (row,) = [s for s in summary if one.items() <= s.items()]
    assert f"{row['mean']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" in page.words
    assert "federated minus local" in page.words
    assert "+0.012 [+0.004, +0.020] < 0.001 8 federated is better" in page.words
    assert "2.5 MB" in page.words
    assert "tiny-case-9999" in page.words
    assert "Complete. Everything ran as asked." in page.words
    assert "Seed 1; threads per site: 1" in page.words
    assert "torch 2.13" in page.words


def test_every_site_reports_its_lesions(run_folder: Make) -> None:
    """2 found and 1 missed in each of 8 cases: 16 and 8, two thirds."""
    _, page = page_of(run_folder())
    assert "liver test set federated 16 8 0 0.67 0.00" in page.words


def test_volumes_are_compared(run_folder: Make) -> None:
    """Reference 10, 11, ..., 16 and 10 again: mean 12.625; prediction 11 each."""
    _, page = page_of(run_folder())
    assert "liver test set 12.6 11.0 −1.62" in page.words


def test_what_is_not_as_asked_comes_first(run_folder: Make) -> None:
    _, page = page_of(run_folder(complete=False, problems=["federated, round 2: tiny: lost"]))
    assert (
        page.words.index("NOT AS ASKED")
        < page.words.index("federated, round 2: tiny: lost")
        < page.words.index("Results")
    )
    assert "Everything ran" not in page.words


def test_paths_of_the_study_are_left_out(run_folder: Make) -> None:
    folder = run_folder()
    with (folder / "study.toml").open("a") as file:
        file.write('[network]\nweights = "/secret/run"\n[partition]\nfile = "/secret/sites.csv"\n')
    text, _ = page_of(folder)
    assert 'data = "..."' in text.replace("&quot;", '"')
    assert "secret" not in text


def test_names_are_text(run_folder: Make) -> None:
    """Whatever a name, a label, a warning or a value holds, it makes no element and no attribute."""
    evil = '<script>alert(1)</script>"onload="x" \x00&amp;'
    names = {"labels": (evil, "b"), "name": "evil", "warnings": [evil], "problems": [evil], "study": evil}
    excluded = [{"site": evil, "case": evil, "reason": evil, "text": evil}]
    folder = run_folder(**names, excluded=excluded, complete=False)
    results = json.loads((folder / "results.json").read_text())
    one = {"case": evil * 2, "patient": evil, "site": evil, "label": evil, "dice": 0.5}
    results["cases"].append(results["cases"][0] | one)
    results["comparisons"][0] |= {"p_holm": None, "ci_low": None, "a": evil, "site": evil}
    (folder / "results.json").write_text(json.dumps(results))
    text, page = page_of(folder)
    assert "script" not in page.tags
    assert page.handlers == []
    assert "\x00" not in text
    assert "<script>alert(1)</script>" in page.words


@pytest.mark.parametrize(
    "changes",
    [
        {"cases": [], "summary": [], "models": [], "comparisons": [], "excluded": []},
        {"cases": [], "summary": [], "excluded": [], "problems": ["The run was stopped."], "complete": False},
    ],
)
def test_a_run_that_came_to_nothing_has_a_report(changes: dict[str, Any], run_folder: Make) -> None:
    folder = run_folder(pictures=False)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | changes))
    for name in ("rounds.jsonl", "plans.json", "environment.json", "fingerprint.json"):
        (folder / name).unlink()
    _, page = page_of(folder)
    assert "Results" in page.words


def test_undefined_scores_count_nowhere(run_folder: Make) -> None:
    folder = run_folder(pictures=False)
    results = json.loads((folder / "results.json").read_text())
    results["cases"] = [
        c | {"dice": None, "hd95": None, "status": "both_empty", "reference_volume": 0.0} for c in results["cases"]
    ]
    (folder / "results.json").write_text(json.dumps(results))
    _, page = page_of(folder)
    assert "The worst cases" not in page.words


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="nothing to report"):
        write_report(tmp_path)


def test_damaged_results_are_an_error_with_a_sentence(run_folder: Make) -> None:
    folder = run_folder()
    (folder / "results.json").write_text("[1]")
    with pytest.raises(StudyError, match="cannot be reported"):
        write_report(folder)


# --------------------------------------------------------------------------------------------------- pictures, reasons


def test_worst_median_and_best_are_shown(run_folder: Make) -> None:
    folder = run_folder()
    scores = json.loads((folder / "results.json").read_text())["cases"]
    own = [c for c in scores if (c["model"], c["site"]) == ("federated", "test")]
    means = {c["case"]: [d["dice"] for d in own if d["case"] == c["case"]] for c in own}
    order = sorted(means, key=lambda case: sum(means[case]))
    text, _ = page_of(folder)
    assert pictured(text)[:3] == [order[0], order[4], order[-1]]


def test_a_picture_outside_the_folder_is_not_taken(run_folder: Make) -> None:
    folder = run_folder()
    (folder.parent / "other.png").write_bytes(PNG + b"elsewhere")
    table = folder / "sites" / "test" / "scores" / "federated.test.json"
    read = json.loads(table.read_text())
    for row in read["cases"]:
        row["picture"] = "../../../other.png"
    table.write_text(json.dumps(read))
    text, _ = page_of(folder)
    assert "elsewhere" not in pictured(text)
    assert pictured(text)


def test_reasons_are_told(run_folder: Make) -> None:
    """Among 25 references of 10 ml or more, one of 1 ml is small; the limit is the 5th percentile of all 25."""
    folder = run_folder(n=25, labels=("liver",))
    path = folder / "results.json"
    results = json.loads(path.read_text())
    found = {c["case"]: c for c in results["cases"] if c["model"] == "federated"}
    found["test-case-0000"] |= {"dice": 0.01, "reference_volume": 1.0}
    found["test-case-0001"] |= {"dice": 0.0, "status": "empty_prediction"}
    found["test-case-0002"] |= {"dice": 0.0, "status": "empty_reference", "reference_volume": 0.0}
    found["test-case-0003"] |= {"dice": 0.02}
    found["test-case-0004"] |= {"dice": 0.03}
    path.write_text(json.dumps(results))
    table = folder / "sites" / "test" / "scores" / "federated.test.json"
    read = json.loads(table.read_text())
    read["cases"][3]["spacing"] = [1.0, 1.0, 3.2]
    read["cases"][4]["foreground_median"] = [150.0]
    table.write_text(json.dumps(read))
    _, page = page_of(folder)
    for told in (
        "liver: small (1.00 ml; one in twenty at this site is below",
        "liver: nothing was predicted",
        "liver: predicted, but not in the reference",
        "spacing 1.00 × 1.00 × 3.20 mm is outside the federation's",
        "intensity (channel 0: median 150) is outside 99 % of the federation's",
    ):
        assert page.words.count(told) == 1, told
    assert "no reason known" in page.words
    assert "spacing outside the federation's, and intensity outside the federation's." in page.words


# -------------------------------------------------------------------------------------------------------------- private


def test_between_hospitals_no_case_is_told(run_folder: Make) -> None:
    """Neither picture nor case nor patient; and no figure of the site with three patients, all of whose are 4 and 2."""
    folder = run_folder(engine="flare")
    path = folder / "results.json"
    results = json.loads(path.read_text())
    for row in (r for r in results["cases"] if r["site"] == "tiny"):
        row |= {
            "dice": 0.42424,
            "hd95": 42.42,
            "reference_volume": 4242.0,
            "prediction_volume": 4242.0,
            "lesions_found": 4242,
        }
    for row in (r for r in results["summary"] if r["site"] == "tiny"):
        row |= {"mean": 0.42424, "ci_low": 0.42424, "ci_high": 0.42424}
    results["comparisons"].append(results["comparisons"][0] | {"site": "tiny", "n": 3, "difference": 0.42424})
    path.write_text(json.dumps(results))
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert "img" not in page.tags
    assert "circle" not in page.tags
    for case in results["cases"]:
        assert case["case"] not in text
        assert case["patient"] not in text
    assert "tiny-case" not in text
    assert not re.search(r"0\.42|42\.4|4\W?242", page.words)
    assert "tiny n < 5" in page.words
    losses = [line for line in text.split("<polyline") if "<title>tiny</title>" in line]
    assert losses == []
    assert "fewer than 5 of the cases" in page.words
    assert "1 of 4 cases" not in page.words
    assert "Not shown here" in page.words
    assert "spacing 1.00" not in page.words


def test_the_smallest_number_that_may_be_told_can_be_set(run_folder: Make) -> None:
    folder = run_folder(engine="flare")
    _, strict = page_of(folder, private=True, min_cases=9)
    assert "test set n < 9 n < 9" in strict.words
    assert "federated is better" not in strict.words
    _, loose = page_of(folder, private=True, min_cases=3)
    assert "n < 3" not in re.sub("“n < 3”", "", loose.words)


# --------------------------------------------------------------------------------------------------------- at a site


def test_a_site_has_a_report_of_its_own(run_folder: Make) -> None:
    folder = run_folder(engine="flare") / "sites" / "north"
    (folder / "log.jsonl").write_text(
        json.dumps({"event": "trained", "model": "federated", "round": 1, "loss": 0.5}) + "\n"
    )
    (folder / "excluded.json").write_text(json.dumps({"north/broken": ["unreadable", "broken cannot be read."]}))
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert "Site north" in page.words
    assert "It is for the site alone." in page.words
    assert set(pictured(text)) <= {f"north-case-{i:04d}" for i in range(8)}
    assert len(pictured(text)) >= 8
    assert "broken cannot be read." in page.words
    assert "tiny" not in page.words
    assert "Learning" in page.words


def test_a_site_looks_for_reasons_in_the_plan_that_it_was_sent(run_folder: Make) -> None:
    """The plan holds the federation's intensities, not its spacings; without a plan neither was looked for."""
    folder = run_folder(engine="flare") / "sites" / "north"
    table = json.loads((folder / "scores" / "federated.validation.json").read_text())
    for row in table["cases"]:
        row |= {"spacing": [1.0, 1.0, 9.0], "foreground_median": [150.0]}
    (folder / "scores" / "federated.validation.json").write_text(json.dumps(table))
    words = Page(write_report(folder).read_text(encoding="utf-8")).words
    assert "has 20 or more)." in words
    assert "outside the federation" not in words
    channel = {"percentile_00_5": 0.0, "percentile_99_5": 100.0}
    plan = {"foreground_intensity_properties_per_channel": {"0": channel}}
    (folder / "plan.json").write_text(json.dumps(plan))
    words = Page(write_report(folder).read_text(encoding="utf-8")).words
    assert "intensity (channel 0: median 150) is outside 99 % of the federation's" in words
    assert "and intensity outside the federation's." in words
    assert "spacing" not in words.partition("The worst cases")[2].partition("Volumes")[0]


def test_a_site_knows_seeds_folds_and_models_that_never_saw_it(run_folder: Make) -> None:
    """One model to whoever reads: its seeds and folds are not models of their own."""
    folder = run_folder(engine="flare") / "sites" / "north"
    table = json.loads((folder / "scores" / "federated.validation.json").read_text())
    for key, subset in (("federated.s2.f1", "validation"), ("federated-without-north", "all")):
        (folder / "scores" / f"{key}.{subset}.json").write_text(json.dumps(table | {"model": key, "subset": subset}))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "Model: federated." in page.words
    assert "north, unseen cases" in page.words
    assert "federated.s2" not in page.words


# ------------------------------------------------------------------------------------------------ seeds, folds, left out


def test_seeds_and_folds_are_one_model(run_folder: Make) -> None:
    """As many rows, panels and parts of captions as there are models, sites and labels; figures are means."""
    folder = run_folder()
    results = json.loads((folder / "results.json").read_text())
    first = results["models"]
    again = [m | {"seed": 2, "updates": 35} for m in first]
    cases = [c | {"seed": seed} for seed in (1, 2) for c in results["cases"]]
    changed = results | {"models": [*first, *again], "cases": cases, "summary": summarize(cases, SCALES)}
    (folder / "results.json").write_text(json.dumps(changed))
    with (folder / "rounds.jsonl").open("a") as file:
        line = {"model": "federated.s2", "round": 1, "seconds": 3.0, "sites": {"north": {"loss": 5.0, "n_cases": 30}}}
        file.write("\n" + json.dumps(line) + "\n")
    found = find(folder)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    costs = page.words.partition("What it took time")[0].rpartition("Each model")[2]
    assert costs.count("federated north") == 1
    assert "federated 3 25 60" in costs
    assert _sections._of_all(_sections.losses(View(found, False)))["federated"]["north"][0] == (1, 3.0)
    captions = re.findall(r"<span>(liver [^<]*)</span>", write_report(folder).read_text(encoding="utf-8"))
    assert captions
    assert all(c.count("liver") == 1 for c in captions)


def test_what_models_reach_on_sites_that_they_never_saw(run_folder: Make) -> None:
    """In the row of that site, in the column of the model; no column for each left-out site."""
    folder = run_folder(models=("federated", "federated-without-tiny"), labels=("liver",))
    results = json.loads((folder / "results.json").read_text())
    cases = [
        c | ({"subset": "unseen", "dice": 0.25} if c["site"] == "tiny" and "without" in c["model"] else {})
        for c in results["cases"]
    ]
    (folder / "results.json").write_text(json.dumps(results | {"cases": cases, "summary": summarize(cases, SCALES)}))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "Model: federated." in page.words
    assert "tiny, unseen cases n = 3 0.250" in page.words
    assert "without tiny" not in page.words.partition("Results")[2].partition("Learning")[0]


def test_all_sites_together_and_a_model_of_several_have_their_intervals(run_folder: Make) -> None:
    page = Page(write_report(run_folder()).read_text(encoding="utf-8"))
    assert re.search(r"all sites n = 11 0\.\d+ \[0\.\d+, 0\.\d+\] 0\.\d+ \[", page.words)
    assert re.search(r"test set n = 8 0\.\d+ \[0\.\d+, 0\.\d+\] 0\.\d+ \[", page.words)


def test_curves_say_whether_they_chose_the_weights(run_folder: Make) -> None:
    folder = run_folder()
    (folder / "curves.jsonl").write_text('{"model": "federated", "round": 2, "dice": {"north": 0.5, "all": 0.5}}\n')
    assert "never used to choose one" in Page(write_report(folder).read_text(encoding="utf-8")).words
    with (folder / "study.toml").open("a") as file:
        file.write('[validation]\nselect = "best"\n')
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "never used to choose one" not in page.words
    assert "the round that was best" in page.words


# ----------------------------------------------------------------------------------------------------------- large runs


@pytest.mark.slow
def test_a_thousand_cases_are_quick_and_small(run_folder: Make) -> None:
    models = ("federated", "local", "centralized", "centralized_long", "splitfed")
    folder = run_folder(n=500, models=models, labels=("a", "b", "c"))
    began = time.perf_counter()
    path = write_report(folder)
    assert time.perf_counter() - began < 10
    assert path.stat().st_size < 5_000_000
