"""`concilium table`: which figure stands where, and text that can be pasted."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import concilium
from concilium.errors import StudyError
from concilium.reports.table import build, read_runs, to_text
from concilium.results import SCALES
from concilium.statistics import FOREGROUND_MEAN, compare, spread, summarize

MODELS = {"federated": 0.02, "local": 0.0, "centralized_long": 0.03}


def results(
    *,
    study: str = "liver_50%",
    labels: tuple[str, ...] = ("liver", "tumour_1"),
    n: int = 8,
    test: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """As a run writes them: the models differ by what `MODELS` says, and a little by patient."""
    about = {"status": "ok", "unit": "mm", "reference_volume": 1.0, "prediction_volume": 1.0, "seed": 1, "fold": 0}
    sets = [(site, "validation") for site in ("north", "south")] + ([("test", "test")] if test else [])
    cases = []
    for site, subset in sets:
        for model, gain in MODELS.items():
            named = (
                [f"local:{s}" for s in ("north", "south") if s == site or subset == "test"]
                if model == "local"
                else [model]
            )
            for i in range(n):
                dice = 0.7 + gain + 0.01 * i + (0.002 * (i % 3) if model == "federated" else 0)
                scores = {
                    "dice": dice,
                    "iou": dice / 2,
                    "hd95": None if i == 0 and gain else 10 - 100 * gain,
                    "nsd": dice,
                    "lesions_found": 1,
                    "lesions_missed": 0,
                    "lesions_false": 0,
                }
                cases += [
                    about | scores
                    | {"model": m, "site": site, "subset": subset, "case": f"{site}{i}", "patient": f"p{i}", "label": x}
                    for m in named for x in labels
                ]  # fmt: skip
    summary = summarize(cases, SCALES)
    model = {"protocol": "federated", "parameters": 1, "rounds": 1, "updates": 1, "patches": 1, "batch_size": 1}
    return {
        "version": 1, "study": study, "seed": 1, "complete": True,
        "models": [{"name": m, "seed": 1, "fold": 0, "selected_round": 3, "seconds": 1.0, "sites": {}} | model for m in MODELS],
        "cases": cases, "summary": summary, "sites": spread(summary, SCALES), "comparisons": compare(cases, SCALES),
        "excluded": [], "warnings": [], "problems": [],
    } | more  # fmt: skip


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def markdown(*runs: dict[str, Any], **options: Any) -> list[list[str]]:
    """Cells of the table's lines; the caption as the last."""
    text = to_text(build(runs, **options), "markdown")
    lines, _, caption = text.partition("\n\n")
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines.splitlines()] + [[caption]]


def test_results_fit_their_schema() -> None:
    """`additionalProperties` is false throughout: what is new must be in the schema."""
    schema = json.loads((Path(concilium.__file__).parent / "results.schema.json").read_text())
    found = results()
    Draft202012Validator(schema).validate(found)
    assert found["comparisons"]
    assert found["sites"]
    Draft202012Validator(schema).validate(results(n=3))  # no interval, no p
    counted = {"site": "north", "case": None, "reason": "unreadable", "text": None, "count": 3}
    named = {"site": "north", "case": "c1", "reason": "unreadable", "text": "c1 is cut off."}
    for row in (counted, named | {"count": 1}, named):  # the last as earlier versions wrote it
        Draft202012Validator(schema).validate(results(excluded=[row]))


def test_csv_holds_every_figure_in_full() -> None:
    run = results()
    found = [r for r in rows(to_text(build([run]), "csv")) if not r["site"]]
    by_key = {(r["label"], r["metric"], r["model"], r["minus"]): r for r in found}
    assert len(by_key) == len(found) == 3 * 2 * (3 + 2)
    for s in run["summary"]:
        if s["site"] == "test" and ":" not in s["model"] and s["metric"] in ("dice", "hd95"):
            row = by_key[s["label"], s["metric"], s["model"], ""]
            assert (float(row["value"]), float(row["ci_low"]), int(row["n"])) == (s["mean"], s["ci_low"], s["n"])
    (c,) = (
        c
        for c in run["comparisons"]
        if (c["a"], c["b"], c["label"], c["metric"]) == ("federated", "local", "liver", "dice")
    )
    row = by_key["liver", "dice", "federated", "local"]
    assert (float(row["value"]), float(row["p_holm"])) == (c["difference"], c["p_holm"])
    assert {r["unit"] for r in found} == {"1", "mm"}


def test_markdown_is_aligned_and_says_what_it_shows() -> None:
    text = to_text(build([results()], metrics=["dice"], labels=["liver"]), "markdown")
    lines, _, caption = text.partition("\n\n")
    assert len({len(line) for line in lines.splitlines()}) == 1
    cells = markdown(results(), metrics=["dice"], labels=["liver"])
    assert [c[0] for c in cells[2:-1]] == [
        "**liver**", "federated", "local", "centralized\\_long",
        "**liver, difference**", "federated − local", "federated − centralized\\_long",
        "**liver, worst site**", "federated", "local", "centralized\\_long",
    ]  # fmt: skip
    # federated: 0.72 + 0.01 x 3.5 + 0.002 x 7 / 8
    assert re.fullmatch(r"0\.757 \[0\.7\d\d, 0\.7\d\d\]", cells[3][1])
    assert re.fullmatch(
        r"\+0\.022 \[\+0\.0\d\d, \+0\.0\d\d\], p = 0\.023", cells[7][1]
    )  # 2 of 2**8 patterns, times 3 pairs
    assert re.fullmatch(r"−0\.008 \[−0\.0\d\d, −0\.0\d\d\], p = 0\.023", cells[8][1]), (
        "where federation loses, it says so"
    )
    assert "test set, 8 patients, one seed" in caption
    assert "Holm" in caption


def test_differences_are_the_first_models_whatever_the_order() -> None:
    run = results()
    turned = run | {"models": run["models"][::-1]}
    there, back = (
        next(f for f in build([r]).figures if f["minus"] == other and f["label"] == "liver" and f["metric"] == "dice")
        for r, other in ((run, "centralized_long"), (turned, "federated"))
    )
    assert [back[k] for k in ("value", "ci_low", "ci_high", "p_holm")] == [
        -there["value"], -there["ci_high"], -there["ci_low"], there["p_holm"]
    ]  # fmt: skip


def test_patients_that_do_not_count_are_told_in_the_cell() -> None:
    """And the scores that are undefined, which is why."""
    cells = {c[0]: c for c in markdown(results(), metrics=["dice", "hd95"], labels=["liver"])[:5]}
    assert cells["federated"][2].endswith("(n = 7, 1 undefined)")
    assert "(n" not in cells["local"][2]
    assert "(n" not in cells["federated"][1]


def test_without_patients_enough_there_is_the_mean_alone() -> None:
    cells = {c[0]: c for c in markdown(results(n=3), metrics=["dice"], labels=["liver"])}
    assert re.fullmatch(r"0\.\d{3}", cells["federated"][1])
    assert re.fullmatch(r"\+0\.\d{3}", cells["federated − local"][1])
    assert "No interval and no p below 6 patients." in markdown(results(n=3))[-1][0]


def test_validation_cases_of_all_sites_where_there_is_no_test_set() -> None:
    cells = markdown(results(test=False), metrics=["dice"], labels=["liver"])
    assert "validation set, 16 patients of 2 sites" in cells[-1][0]
    assert markdown(results(), subset="validation", metrics=["dice"])[-1][0].count("16 patients") == 1


def test_several_runs_are_groups_of_columns() -> None:
    """A label that one run lacks is a dash there; its one label is also its mean over the labels."""
    two = [results(), results(study="polyps", labels=("polyp",), n=6)]
    heads = markdown(*two, metrics=["dice", "iou"])[0]
    assert heads == ["", "liver\\_50%: Dice", "liver\\_50%: IoU", "polyps: Dice", "polyps: IoU"]
    assert build(two).labels == (FOREGROUND_MEAN,)
    cells = {c[0]: c for c in markdown(*two, metrics=["dice"], labels=["polyp", FOREGROUND_MEAN])}
    assert cells["federated"][2] != "–"
    first = next(c for c in markdown(*two, metrics=["dice"], labels=["polyp"]) if c[0] == "federated")
    assert first[1] == "–"
    assert first[2].startswith("0.7")


def test_latex_is_ready_to_paste() -> None:
    text = to_text(build([results(), results(study="b&c")], metrics=["dice", "hd95"]), "latex")
    body = text[text.index("\\toprule") : text.index("\\bottomrule")]
    columns = [re.sub(r"\\multicolumn\{(\d)\}", lambda m: "& " * (int(m[1]) - 1), line) for line in body.splitlines()]
    assert {line.replace(r"\&", "").count("&") for line in columns if line.endswith(r"\\")} == {4}
    assert r"\begin{tabular}{lrrrr}" in text
    assert r"liver\_50\%" in text
    assert r"b\&c" in text
    assert r"centralized\_long" in text
    assert not re.search(r"(?<!\\)[%&_#](?!\s)(?![^\n]*\\usepackage)", re.sub(r" & ", " ", body)), "all escaped"
    assert text.count("{") == text.count("}")
    assert text.isascii()
    assert re.findall(r"usepackage\{(\w+)\}", text) == ["booktabs"]


def test_non_inferiority_is_judged_by_the_lower_end() -> None:
    cells = {c[0]: c for c in markdown(results(), metrics=["dice", "hd95"], labels=["liver"], margin=0.02)}
    assert cells["federated − local"][1].endswith(", non-inferior")
    assert cells["federated − centralized\\_long"][1].endswith(", equivalent")
    assert "equivalent" not in cells["federated − centralized\\_long"][2], "a margin in Dice is none in mm"
    cells = {c[0]: c for c in markdown(results(), metrics=["dice"], labels=["liver"], margin=0.001)}
    assert cells["federated − centralized\\_long"][1].endswith(", inferiority not excluded")
    assert cells["federated − local"][1].endswith(", non-inferior")


def test_equivalence_is_judged_by_both_ends() -> None:
    cells = {c[0]: c for c in markdown(results(), metrics=["dice"], labels=["liver"], margin=0.9)}
    assert cells["federated − local"][1].endswith(", equivalent")
    found = [r for r in rows(to_text(build([results()], margin=0.02, labels=["liver"]), "csv")) if r["non_inferior"]]
    assert {r["equivalent"] for r in found} <= {"True", "False"}
    assert all(r["equivalent"] == str(float(r["ci_low"]) > -0.02 and float(r["ci_high"]) < 0.02) for r in found)


def test_the_worst_site_of_each_model_stands_below() -> None:
    """On validation cases, also where the means are of the test set; in every format."""
    run = results()
    for row in (r for r in run["cases"] if (r["site"], r["model"]) == ("south", "federated")):
        row |= {"dice": 0.5, "hd95": 20.0}
    run["summary"] = summarize(run["cases"], SCALES)
    run["sites"] = spread(run["summary"], SCALES)
    table = build([run], metrics=["dice", "hd95"], labels=["liver"])
    text = to_text(table, "markdown")
    block = text.partition("**liver, worst site**")[2].splitlines()
    assert [c.strip() for c in block[1].split("|")[1:4]] == [
        "federated",
        "south 0.500; gap 0.257",
        "south 20.00; gap 12.00",
    ]
    assert "Worst site: of those with 6 patients or more, on validation cases" in text
    latex = to_text(table, "latex")
    assert r"\emph{liver, worst site}" in latex
    assert r"federated & south 0.500; gap 0.257 & south 20.00; gap 12.00 \\" in latex
    (row,) = (
        r
        for r in rows(to_text(table, "csv"))
        if r["site"] and (r["model"], r["label"], r["metric"]) == ("federated", "liver", "dice")
    )
    assert (row["subset"], row["site"], row["value"], row["n"]) == ("validation", "south", "0.5", "8")
    assert float(row["gap"]) == pytest.approx(0.25675)


def test_without_two_sites_of_patients_enough_none_is_the_worst() -> None:
    text = to_text(build([results(n=5)]), "markdown")
    assert "worst" not in text.lower()


def test_undefined_scores_are_counted(tmp_path: Path) -> None:
    found = rows(to_text(build([results()], metrics=["hd95"], labels=["liver"]), "csv"))
    assert {r["model"]: r["n_undefined"] for r in found if not r["site"] and not r["minus"]} == {
        "federated": "1", "local": "0", "centralized_long": "1",
    }  # fmt: skip
    assert "Undefined: scores of a case and label that are in no mean." in markdown(results())[-1][0]
    assert "ndefined" not in to_text(build([results()], metrics=["dice"]), "markdown")


@pytest.mark.parametrize("engine", ["flare", None])
def test_between_hospitals_few_patients_are_not_shown(engine: str | None, tmp_path: Path) -> None:
    """Nor what gives their mean by subtraction: 8 patients at one site and 3 at the other, hidden with the mean over 11."""
    run = results(test=False)
    run["cases"] = [c for c in run["cases"] if c["site"] == "north" or c["patient"] in ("p1", "p2", "p3")]
    run["summary"] = summarize(run["cases"], SCALES)
    run["comparisons"], run["sites"] = compare(run["cases"], SCALES), spread(run["summary"], SCALES)
    (tmp_path / "results.json").write_text(json.dumps(run))
    if engine:
        (tmp_path / "study.toml").write_text(f'[engine]\nname = "{engine}"\n')
    text = to_text(build(read_runs([tmp_path]), metrics=["dice"], labels=["liver"]), "markdown")
    assert re.search(r"\| federated +\| +not shown \|", text)
    assert not re.search(r"\d\.\d{3}", text)
    assert "Not shown: figures of fewer than 5 patients" in text
    assert "11 patients" not in text
    assert {r["value"] for r in rows(to_text(build(read_runs([tmp_path])), "csv"))} == {""}
    (tmp_path / "study.toml").write_text('[engine]\nname = "simulation"\n')
    assert re.search(r"\d\.\d{3}", to_text(build(read_runs([tmp_path])), "markdown"))


def test_where_sites_keep_scores_back_there_is_a_table() -> None:
    """All of them: there is no case in the results, and the means are those of the summary."""
    run = results(test=False)
    for row in run["summary"]:
        row |= {"ci_low": None, "ci_high": None} if row["site"] == "all" else {}
    run |= {"cases": [], "comparisons": [], "file_ending": ".nii.gz"}
    text = to_text(build([run], metrics=["dice", "hd95"], labels=["liver"]), "markdown")
    assert re.search(r"\| federated +\| +0\.757 \|", text)
    assert "HD95 [mm]" in text
    assert "validation set, 16 patients of 2 sites" in text
    assert "kept back at north, south, so means with theirs have no resampled interval" in text


@pytest.mark.parametrize(
    ("units", "ending", "head"),
    [
        (("mm", "px"), "", "HD95 [mm or px]"),
        (("px",), "", "HD95 [px]"),
        ((), ".png", "HD95 [px]"),
        ((), ".tif", "HD95 [mm or px]"),
        ((), ".nrrd", "HD95 [mm]"),
    ],
)
def test_the_unit_of_distances_is_that_of_all_cases(units: tuple[str, ...], ending: str, head: str) -> None:
    run = results(file_ending=ending)
    for i, row in enumerate(run["cases"]):
        row["unit"] = units[i % len(units)] if units else ""
    run["cases"] = run["cases"] if units else []
    assert head in markdown(run)[0]


def test_unknown_patients_are_told() -> None:
    run = results(warnings=["north: Patients unknown (no table): cases count.", "south: something else"])
    assert "patients unknown at north," in markdown(run)[-1][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["dise"]}, r"no metric 'dise'.*dice.*--metric"),
        ({"labels": ["spleen"]}, r"no label 'spleen'.*liver.*--label"),
        ({"subset": "training"}, r"no training cases.*validation.*--subset"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        build([results()], **options)


def test_a_format_or_a_run_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no format 'html'.*latex.*--format"):
        to_text(build([results()]), "html")
    with pytest.raises(StudyError, match=r"no results\.json"):
        read_runs([tmp_path])
    (tmp_path / "results.json").write_text('{"comparisons": []}')
    with pytest.raises(StudyError, match="older version"):
        read_runs([tmp_path])


def test_the_command_writes_plain_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As narrow as the terminal is, no line is wrapped."""
    from concilium import cli

    (tmp_path / "results.json").write_text(json.dumps(results()))
    monkeypatch.setenv("COLUMNS", "40")

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["concilium", "table", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as e:
            cli.main()
        assert not e.value.code
        return capsys.readouterr().out

    expected: Callable[[str], str] = lambda form: to_text(build([results()], metrics=["dice"], margin=0.02), form)  # noqa: E731
    for form in ("latex", "csv", "markdown"):
        assert run("--format", form, "--metric", "dice", "--margin", "0.02") == expected(form)
    assert run("--format", "csv", "--metric", "dice", "--margin", "0.02", "-o", str(tmp_path / "t.csv")) == ""
    assert (tmp_path / "t.csv").read_text() == expected("csv")
