"""The card says what the record says, and no more."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from concilium.exports import export_run
from concilium.results import SCALES
from concilium.statistics import summarize


@pytest.fixture
def card(picture_run: Path, tmp_path: Path) -> Callable[..., str]:
    """`card(results={...}, intended_use=...)`: the card of a run whose results are changed so."""

    def write(results: dict[str, Any] | None = None, **options: Any) -> str:
        run = tmp_path / "run"
        shutil.copytree(picture_run, run)
        path = run / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (results or {})))
        folder, _ = export_run(run, tmp_path / "out", format="safetensors", **options)
        return (folder / "MODEL_CARD.md").read_text()

    return write


def test_figures_with_interval_and_number_of_patients(card: Callable[..., str]) -> None:
    text = card()
    (line,) = [row for row in text.splitlines() if row.startswith("| north (validation) | polyp")]
    _, _, _, n, dice, iou, hd95, _, _ = (cell.strip() for cell in line.split("|"))
    assert n == "7"  # eight cases, one patient with two
    assert dice.startswith("0.400 [0.1")  # (0.1 + ... + 0.6 + 0.7) / 7
    assert iou == "–"
    assert hd95 == "2.00 [2.00, 2.00]"
    assert "| north | 17 | – | 8 | 7 |" in text


def test_it_tells_of_these_weights_and_of_no_others(picture_run: Path, tmp_path: Path) -> None:
    """Of a run with several seeds each has a card of its own; who took no part was not trained on."""
    run = tmp_path / "run"
    shutil.copytree(picture_run, run)
    results = json.loads((run / "results.json").read_text())
    own = [c for c in results["cases"] if c["model"] == "federated"]
    better = [c | {"seed": 2, "dice": 0.9} for c in own]
    left_out = [c | {"model": "federated-without-north", "subset": "unseen", "dice": 0.3} for c in own]
    results["cases"] = [c | {"seed": 1} for c in own] + better + left_out
    results["summary"] = summarize(results["cases"], SCALES)
    (run / "results.json").write_text(json.dumps(results))
    for key in ("federated.s2", "federated-without-north"):
        shutil.copy(run / "weights/federated.safetensors", run / f"weights/{key}.safetensors")
    lines = {}
    for model in ("federated", "federated.s2", "federated-without-north"):
        folder, _ = export_run(run, tmp_path / model, format="safetensors", model=model)
        lines[model] = (folder / "MODEL_CARD.md").read_text()
    assert "| polyp | 7 | 0.400 [" in lines["federated"]
    assert "| polyp | 7 | 0.900 [" in lines["federated.s2"]
    assert "seed 2." in lines["federated.s2"]
    assert "| north (unseen) | polyp | 7 | 0.300" in lines["federated-without-north"]
    assert "north took no part" in lines["federated-without-north"]
    assert "| north | " not in lines["federated-without-north"]


def test_what_is_not_known_is_said(card: Callable[..., str]) -> None:
    text = card()
    assert "## Intended use\n\nNot stated.\n" in text
    assert "not a medical device" in text
    assert "no privacy is claimed" in text
    assert "not complete" not in text
    assert text.startswith("---\nlicense: other\n")
    assert "torch 2.13.0" in text


def test_a_run_that_is_not_complete_says_so_at_the_top(card: Callable[..., str]) -> None:
    problems = [
        "north: FileNotFoundError: /data/alice/secret_3_0000.png is gone",
        "C:\\x\\y.png",
        *(f"p{i}" for i in range(30)),
    ]
    excluded = [
        {"site": "north", "case": "other_7", "reason": "unreadable", "text": "Case other_7: /data/x cannot be read"}
    ]
    warnings = ["north: case other_7 was slow"]
    text = card({"complete": False, "problems": problems, "excluded": excluded, "warnings": warnings})
    assert text.index("This run is not complete") < text.index("## Intended use")
    assert "> - north: FileNotFoundError: [path] is gone" in text
    assert "> - north: case [case] was slow" in text
    assert "> - and 12 more" in text
    assert "1 (north: 1)" in text
    for private in ("alice", "secret", "other_7", "C:\\"):
        assert private not in text


def test_the_intended_use_may_be_a_file(card: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "use.md").write_text("Teaching students.\n")
    assert "## Intended use\n\nTeaching students.\n\n##" in card(intended_use=str(tmp_path / "use.md"))


def test_the_intended_use_may_be_a_long_text(card: Callable[..., str]) -> None:
    assert "a " * 4000 in card(intended_use="a " * 4000 + "b")


# ------------------------------------------------------------------------------------------------------ between hospitals


@pytest.fixture
def hospitals(picture_run: Path, tmp_path: Path) -> Callable[..., str]:
    """`hospitals(summary=..., ready=..., **changes of results)`: the card of a run between hospitals."""

    def write(*, ready: dict[str, Any] | None = None, finished: dict[str, Any] | None = None, **changes: Any) -> str:
        run = tmp_path / "run"
        shutil.copytree(picture_run, run)
        study = (run / "study.toml").read_text()
        (run / "study.toml").write_text(study.replace('name = "simulation"', 'name = "flare"'))
        results = json.loads((run / "results.json").read_text())
        results["cases"] = [c | {"case": str(i), "patient": str(i // 2)} for i, c in enumerate(results["cases"])]
        results |= {"summary": summarize(results["cases"], SCALES)} | changes
        (run / "results.json").write_text(json.dumps(results))
        for name, content in (("federated.json", ready), ("federated/finished.json", finished)):
            (run / "checkpoints" / name).parent.mkdir(parents=True, exist_ok=True)
            (run / "checkpoints" / name).write_text(json.dumps(content or {}))
        folder, _ = export_run(run, tmp_path / "out", format="safetensors")
        return (folder / "MODEL_CARD.md").read_text()

    return write


def test_patients_trained_on_are_those_that_a_site_told_of(hospitals: Callable[..., str]) -> None:
    """17 patients in 5 folds: the first holds out 4."""
    text = hospitals(ready={"cases": {"north": 17}, "patients": {"north": 17}})
    assert "| north | 17 | 13 | 8 | fewer than 5 |" in text
    assert "    concilium serve KIT study.toml\n" in text
    assert "concilium run" not in text


def test_counts_of_cases_set_aside_are_added(hospitals: Callable[..., str]) -> None:
    row = {"site": "north", "case": None, "text": None}
    many = [row | {"reason": "unreadable", "count": 5}, row | {"reason": "missing_label", "count": 2}]
    text = hospitals(excluded=many, warnings=["None of them is new."])
    assert "could not be used: 7 (north: 7)." in text
    assert "> - None of them is new." in text, "a case without a name takes no word out"


def test_few_patients_are_not_told(hospitals: Callable[..., str]) -> None:
    """Four patients scored, two of their cases set aside: neither figures nor numbers."""
    row = {"site": "north", "case": None, "text": None, "reason": "unreadable", "count": 2}
    text = hospitals(excluded=[row], warnings=["north: 2 cases set aside (unreadable)."])
    assert "| north (validation) | polyp | – | n < 5 |" in text
    assert "could not be used: north: fewer than 5." in text
    assert "> - north: fewer than 5 cases set aside (unreadable)." in text
    assert not re.search(r"0\.[1-8]\d\d", text.partition("## Figures")[2].partition("## Privacy")[0])


def test_a_site_that_keeps_scores_back_is_in_the_figures(hospitals: Callable[..., str]) -> None:
    place = {"model": "federated", "site": "north", "subset": "validation", "label": "polyp"}
    row = place | {"mean": 0.7123, "ci_low": 0.6, "ci_high": 0.8, "n": 7, "n_cases": 8, "n_undefined": 0, "n_seeds": 1}
    summary = [row | {"metric": "dice"}]
    text = hospitals(cases=[], summary=summary)
    assert "| north | 17 | – | 8 | 7 |" in text
    assert "| north (validation) | polyp | 7 | 0.712 [0.600, 0.800] |" in text
    assert "kept back at north" in text
    assert "Distances in px;" in text


def test_of_several_seeds_a_site_that_keeps_scores_back_tells_of_each(hospitals: Callable[..., str]) -> None:
    """results.json has the mean over the seeds; what it told of one is in the record of that model."""
    place = {"model": "federated", "site": "north", "subset": "validation", "label": "polyp", "metric": "dice"}
    row = place | {"mean": 0.6, "ci_low": None, "ci_high": None, "n": 7, "n_cases": 8, "n_undefined": 0, "n_seeds": 2}
    told = place | {"seed": 1, "fold": 0, "n": 7, "n_cases": 8, "n_undefined": 0, "mean": 0.7, "deviation": 0.1}
    model = {
        "name": "federated",
        "protocol": "federated",
        "fold": 0,
        "rounds": 2,
        "updates": 4,
        "patches": 8,
        "batch_size": 2,
    }
    models = [model | {"seed": seed, "parameters": 1234, "seconds": 1.0, "sites": {}} for seed in (1, 2)]
    text = hospitals(cases=[], summary=[row], models=models, finished={"averages": [told]})
    assert "| north (validation) | polyp | 7 | 0.700 [0.6" in text
