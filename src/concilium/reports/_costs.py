"""The part of a report that says what it took."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from xml.etree.ElementTree import Element

from concilium.reports._cases import View
from concilium.reports._elements import duration, e, size, table
from concilium.reports._found import Row
from concilium.reports._sections import section, shown_model


def costs(view: View) -> Element | None:
    """Steps, time and bytes of every model at every site: of one trained several times, the mean over seeds and folds."""
    groups: dict[str, list[Row]] = {}
    for m in view.found.results["models"]:
        if "sites" in m:
            groups.setdefault(m["name"], []).append(m)
    if not groups:
        return None
    total = [
        [shown_model(name), f"{_mean(of, 'rounds'):g}", f"{_mean(of, 'updates'):,.0f}", f"{_mean(of, 'patches'):,.0f}",
         duration(_mean(of, "seconds"))]
        for name, of in groups.items()
    ]  # fmt: skip
    rows = []
    for name, of in groups.items():
        for site in dict.fromkeys(site for m in of for site in m["sites"]):
            took = [m["sites"][site] for m in of if site in m["sites"]]
            times = [_steps(took), duration(_mean(took, "seconds"))]
            sizes = [size(_mean(took, key)) for key in ("bytes_down", "bytes_up")]
            rows.append([shown_model(name), site, *times, *sizes])
    slowest = max(view.found.rounds, key=lambda r: r.get("seconds", 0.0), default=None)
    note = "Updates: optimiser steps one after the other. Patches: seen by all sites together."
    n = max(map(len, groups.values()))
    if n > 1:
        note += f" Of a model that was trained several times (seeds and folds, up to {n} times), the mean."
    if slowest is not None and "seconds" in slowest:
        which = f"{shown_model(slowest['model'])}, round {slowest['round']}"
        note += f" The slowest round took {duration(slowest['seconds'])} ({which})."
    return section(
        "What it took",
        table(["model", "rounds", "updates", "patches", "time"], total, caption="Each model"),
        e("p", note, class_="note"),
        table(
            ["model", "site", "steps", "training", "received", "sent"],
            rows,
            caption="Each site, in training rounds",
            words=2,
        ),
    )


def _steps(took: Sequence[Row]) -> str:
    """Steps taken, and of how many where time was short."""
    asked = fmean(row.get("n_asked", row["n_steps"]) for row in took)
    steps = _mean(took, "n_steps")
    return f"{steps:,.0f}" if asked == steps else f"{steps:,.0f} of {asked:,.0f}"


def _mean(rows: Sequence[Row], key: str) -> float:
    return fmean(row[key] for row in rows)
