"""A run folder with made-up scores, small or large, with every table that a report shows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can share `pages`

from concilium.reports._found import SCALES
from concilium.statistics import spread, summarize

PNG = b"\x89PNG\r\n\x1a\n picture of "
STUDY = """
[study]
name = "{name}"
[sites.north]
data = "/secret/place/north"
[sites.tiny]
data = "/secret/place/tiny"
[protocol]
name = "federated"
rounds = 3
steps = 5
[plan]
configuration = "2d"
[engine]
name = "{engine}"
threads = 1
workers = 1
device = "cpu"
"""


def score(
    model: str, site: str, subset: str, number: int, label: str, dice: float | None, **more: Any
) -> dict[str, Any]:
    known = {"model": model, "site": site, "subset": subset, "case": f"{site}-case-{number:04d}", "label": label}
    values = {
        "patient": f"{site}-patient-{number:04d}",
        "status": "ok",
        "unit": "mm",
        "dice": dice,
        "iou": dice,
        "nsd": dice,
    }
    volumes = {
        "hd95": None if dice is None else 10 - 10 * dice,
        "reference_volume": 10.0 + number % 7,
        "prediction_volume": 11.0,
    }
    return known | values | volumes | more


def made_up(n: int, models: tuple[str, ...], labels: tuple[str, ...], *, n_tiny: int = 3) -> dict[str, Any]:
    """Scores of `n` cases on the test set, as many at north, and `n_tiny` at the site tiny."""
    draws = np.random.default_rng(0)
    cases = [
        score(f"local:{owner}" if model == "local" else model, site, subset, i, label, round(float(draws.uniform(0.5, 1)), 6),
              lesions_found=2, lesions_missed=1, lesions_false=0)
        for model in models
        for site, subset, count in (("test", "test", n), ("north", "validation", n), ("tiny", "validation", n_tiny))
        for owner in (("north", "tiny") if site == "test" and model == "local" else (site,))
        for i in range(count)
        for label in labels
    ]  # fmt: skip
    per_site = {"n_steps": 15, "seconds": 3.0, "bytes_down": 1000, "bytes_up": 2_500_000}
    about = {"rounds": 3, "updates": 15, "patches": 60, "batch_size": 2, "seconds": 9.0, "parameters": 1_000_000}
    comparison = {"a": models[0], "b": models[-1], "metric": "dice", "label": labels[0], "subset": "test"}
    summary = summarize(cases, SCALES)
    return {
        "version": 1, "study": "liver", "seed": 1, "complete": True, "cases": cases,
        "models": [{"name": m, "protocol": m, "sites": {"north": per_site, "tiny": per_site}} | about for m in models],
        "summary": summary, "sites": spread(summary, SCALES),
        "comparisons": [comparison | {"difference": 0.0123, "ci_low": 0.004, "ci_high": 0.02, "p_holm": 0.0004, "n": n}],
        "excluded": [{"site": "tiny", "case": "tiny-case-9999", "reason": "unreadable", "text": "tiny-case-9999 is cut off."}],
        "warnings": ["federated, validation at tiny: 1 of 4 cases not scored (unreadable)"],
        "problems": [],
    }  # fmt: skip


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """`run_folder(results=..., engine=..., **changes of results)`: a run that has ended."""

    def make(
        *, n: int = 8, models: tuple[str, ...] = ("federated", "local"), labels: tuple[str, ...] = ("liver", "tumour"),
        engine: str = "simulation", name: str = "liver", pictures: bool = True, n_tiny: int = 3, **changes: Any,
    ) -> Path:  # fmt: skip
        folder = tmp_path / "run"
        folder.mkdir()
        results = made_up(n, models, labels, n_tiny=n_tiny) | changes
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "study.toml").write_text(STUDY.format(engine=engine, name=name))
        session = {
            "started": "2026-11-21T05:00:00+0000",
            "concilium": "0.1",
            "python": "3.11",
            "packages": {"torch": "2.13"},
        }
        (folder / "environment.json").write_text(json.dumps({"run": "r", "sessions": [session]}))
        channel = {"percentile_00_5": 0.0, "percentile_99_5": 100.0}
        plan = {"spacing": [1.0, 1.0], "patch_size": [64, 64], "batch_size": 2}
        plans = {"configurations": {"2d": plan}, "foreground_intensity_properties_per_channel": {"0": channel}}
        (folder / "plans.json").write_text(json.dumps(plans))
        geometry = [{"shape": [9, 9, 9], "spacing": [1.0, 1.0, 3.0], "count": 4}]
        (folder / "fingerprint.json").write_text(json.dumps({"n_cases": 20, "geometry": geometry}))
        rounds = [
            {"model": m, "round": r, "seconds": 3.0, "failures": {},
             "sites": {"north": {"loss": 1 / r, "n_cases": 30}, "tiny": {"loss": 0.777, "n_cases": 3}}}
            for m in models for r in (1, 2, 3)
        ]  # fmt: skip
        (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds) + '{"model": "cut')
        if pictures:
            _draw(folder, results["cases"])
        return folder

    return make


def _draw(folder: Path, cases: list[dict[str, Any]]) -> None:
    """The tables and pictures of the sites, of the first model; a picture says whose it is."""
    for site in ("north", "test", "tiny"):
        subset = "test" if site == "test" else "validation"
        rows = [dict(c) for c in cases if (c["model"], c["site"]) == ("federated", site)]
        for i, row in enumerate(rows):
            path = Path("pictures", "federated", subset, f"{i}.png")
            (folder / "sites" / site / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "sites" / site / path).write_bytes(PNG + row["case"].encode())
            row |= {"picture": path.as_posix(), "spacing": [1.0, 1.0, 3.0], "foreground_median": [50.0]}
        if rows:
            (folder / "sites" / site / "scores").mkdir()
            colours = {label: ["#56b4e9", "#fae128"] for label in dict.fromkeys(r["label"] for r in rows)}
            table = {"model": "federated", "subset": subset, "site": site, "colours": colours, "cases": rows}
            (folder / "sites" / site / "scores" / f"federated.{subset}.json").write_text(json.dumps(table))
