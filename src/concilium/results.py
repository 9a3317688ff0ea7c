"""results.json: what a run found, in the form that scripts and papers depend on (schema: results.schema.json)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from concilium._set_aside import added_up
from concilium._withheld import with_averages
from concilium.messages import Evaluated, Score
from concilium.metrics import dice, hd95, iou, nsd
from concilium.record import Record
from concilium.schedule import POOL, Model
from concilium.statistics import Scale, compare, spread, summarize
from concilium.study import Study

METRICS = ("dice", "iou", "hd95", "nsd")
SCALES = {
    name: Scale(metric.HIGHER_IS_BETTER, 1.0 if metric.UNIT == "1" else math.inf)
    for name, metric in zip(METRICS, (dice, iou, hd95, nsd), strict=True)
}
VERSION = 1
"""Of the schema; goes up when a field changes its meaning or disappears."""


def score_rows(
    about: Mapping[str, Any], site: str, subset: str, evaluated: Evaluated, names: Mapping[int, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """A site's scores as they stand in results.json.

    `about`: model, seed and fold. `names` (private number -> case and patient) is empty unless the site is simulated.
    """
    rows = []
    for s in evaluated.scores:
        row: dict[str, Any] = {**about, "site": "test" if subset == "test" else site, "subset": subset}
        row |= names.get(s.case, {"case": str(s.case), "patient": str(s.patient)})
        rows.append(row | score_row(s))
    return rows


def score_row(score: Score) -> dict[str, Any]:
    """What is said of one label in one case."""
    row: dict[str, Any] = {"label": score.label, "status": score.status, "unit": score.unit}
    row |= {metric: score.values.get(metric) for metric in METRICS}
    told = ("reference_volume", "prediction_volume", "lesions_found", "lesions_missed", "lesions_false")
    return row | {name: getattr(score, name) for name in told}


def account(
    model: Model,
    rounds: Sequence[Mapping[str, Any]],
    *,
    batch_size: Callable[[str], int],
    selected: Mapping[str, int] | None = None,
    besides: Sequence[Mapping[str, Sequence[int]]] = (),
) -> dict[str, Any]:
    """What training a model took: `updates` in sequence, `patches` in all, seconds, and bytes to and from each site.

    Args:
        batch_size: of a site's plan.
        selected: the round whose weights it ended with, where that is not the last: of `POOL`, or of each site that has its own.
        besides: bytes to and from each site outside of rounds, once for each time that it was given and scored.
    """
    took = {site: _took(site, rounds) | _besides(site, besides) for site in model.steps}
    best = dict(selected or {})
    if own := model.each_own:
        took = {site: t | {"selected_round": best.get(site, len(rounds))} for site, t in took.items()}
    if model.is_finetuned:  # at the sites, without a byte
        for told in took.values():
            told |= {key: told[key] + (model.setting.study.personalize.steps or 0) for key in ("n_steps", "n_asked")}
    n_steps = [t["n_steps"] for t in took.values()]
    seen = [n * batch_size(site) for n, site in zip(n_steps, took, strict=True)]
    return {
        "name": model.name,
        "seed": model.seed,
        "fold": model.fold,
        "protocol": model.protocol,
        "rounds": len(rounds),
        "selected_round": None if own else best.get(POOL, len(rounds)),
        "updates": max(n_steps),
        "patches": max(seen) if model.protocol == "vertical" else sum(seen),  # parties see the same ones
        "batch_size": max(batch_size(site) for site in took),
        "seconds": round(sum(line["seconds"] for line in rounds), 3),
        **_at_server(rounds),
        "sites": took,
    }


def _besides(site: str, counted: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, int]:
    down, up = (sum(of[site][i] for of in counted if site in of) for i in (0, 1))
    return {"besides_down": down, "besides_up": up}


def _at_server(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of computing at the server, of a network that is split."""
    seconds = [line["server_seconds"] for line in rounds if "server_seconds" in line]
    return {"server_seconds": round(sum(seconds), 3)} if seconds else {}


def _took(site: str, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all rounds took at a site, of those that it answered."""
    lines = [line["sites"][site] for line in rounds if site in line["sites"]]
    took = {key: sum(line[key] for line in lines) for key in ("n_steps", "seconds", "bytes_down", "bytes_up")}
    took |= {"memory": most} if (most := max((line.get("memory", 0) for line in lines), default=0)) else {}
    took |= {"privacy": lines[-1]["privacy"]} if lines and "privacy" in lines[-1] else {}
    return took | {
        "n_asked": sum(line.get("n_asked", line["n_steps"]) for line in lines)
    }  # not in runs of earlier versions


def short_of_steps(model: str, rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each site that took fewer steps than it was asked for."""
    sites = sorted({site for line in rounds for site in line["sites"]})
    took = {site: _took(site, rounds) for site in sites}
    return [
        f"{model}: {site} took {t['n_steps']} of {t['n_asked']} steps in the time of its rounds, and counted for so much less. "
        "A batch in which nothing is annotated is no step."
        for site, t in took.items()
        if t["n_steps"] < t["n_asked"]
    ]


def write_results(
    study: Study,
    record: Record,
    finished: Sequence[Mapping[str, Any]],
    *,
    warnings: Sequence[str],
    problems: Sequence[str],
    excluded: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write results.json from the models that are finished; it is complete if nothing went wrong on the way.

    Args:
        excluded: what sites elsewhere told of cases that they set aside, before they scored any.
    """
    cases = [case for f in finished for case in f["cases"]]
    problems = [*problems, *(text for f in finished for text in f["problems"])]
    warnings = list(dict.fromkeys([*warnings, *(text for f in finished for text in f["warnings"])]))
    if study.test is None:
        folds = "the folds that each model did not train on" if study.validation.fold == "all" else "one fold"
        warnings.append(f"No test set: all figures are on the validation cases of {folds}.")
    averages = [row for f in finished for row in f.get("averages", ())]
    unscored = [row for f in finished for row in f.get("excluded", ())]
    withheld = sorted({row["site"] for row in averages})
    if withheld:
        warnings.append(
            f"Scores of single cases are kept back at {', '.join(withheld)}: comparisons are on the other patients, and pools "
            "have no interval."
        )
    summary = with_averages(summarize(cases, SCALES, seed=study.study.seed), averages, SCALES)
    results = {
        "version": VERSION,
        "study": study.study.name,
        "seed": study.study.seed,
        "complete": not problems,
        "models": [f["model"] for f in finished if f["model"]],
        "cases": cases,
        "summary": summary,
        "sites": spread(summary, SCALES),
        "comparisons": compare(cases, SCALES, seed=study.study.seed),
        "excluded": record.excluded([*study.sites, "test"]) + added_up([*excluded, *unscored]),
        "warnings": warnings,
        "problems": problems,
    }
    record.write_json("results.json", results)
    return results
