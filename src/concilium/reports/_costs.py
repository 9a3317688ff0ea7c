"""The part of a report that says what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from xml.etree.ElementTree import Element

from concilium.reports._cases import View
from concilium.reports._elements import MISSING, duration, e, size, table
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
            sizes = [_size(took, key) for key in ("bytes_down", "bytes_up", "besides_down", "besides_up")]
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
            ["model", "site", "steps", "training", "received", "sent", "received besides", "sent besides"],
            rows,
            caption="Each site, in training rounds; and besides: validation, the finished model, scoring",
            words=2,
        ),
        *_privacy(groups),
        *_forecast(view, groups),
    )


def _privacy(groups: Mapping[str, Sequence[Row]]) -> tuple[Element, ...]:
    """What updates told of any one patient, where sites trained with differential privacy."""
    rows = []
    for name, of in groups.items():
        for site in dict.fromkeys(site for m in of for site in m["sites"]):
            told = [p for m in of if (p := m["sites"].get(site, {}).get("privacy"))]
            if told:
                worst = max(told, key=lambda p: p["epsilon"])
                all_in_all = max(p["epsilon_of_run"] for p in told)
                rows.append([
                    shown_model(name), site, f"{worst['epsilon']:.3g}", f"{all_in_all:.3g}", f"{worst['delta']:g}",
                    f"{worst['noise']:g}", f"{worst['rate']:g}", f"{worst['steps']:,}",
                ])  # fmt: skip
    if not rows:
        return ()
    note = (
        "By each site's own account, for adding or removing one of its patients, of the weights that it sent. Models of a run "
        "add up. Not accounted for: what sites told for the plan, scores, numbers of cases, settings chosen by their results."
    )
    header = ["model", "site", "ε", "ε of the run", "δ", "noise", "rate", "steps"]
    return table(header, rows, caption="Differential privacy of a patient", words=2), e("p", note, class_="note")


def _forecast(view: View, groups: Mapping[str, Sequence[Row]]) -> tuple[Element, ...]:
    """What was measured beside what was forecast for so many rounds."""
    rows = []
    for name, of in groups.items():
        forecast = view.found.forecasts.get(name, {"sites": {}})
        rounds: dict[str, float] = {}
        for site, told in forecast["sites"].items():
            took = [m["sites"][site] for m in of if site in m["sites"]]
            if took:
                rounds[site] = fmean(row.get("n_asked", row["n_steps"]) for row in took) / told["steps"]
                rows.append([shown_model(name), site, *_beside(took, told, rounds[site])])
        if rounds:
            rows.append([shown_model(name), "(server)", *_at_server(of, forecast, rounds)])
    if not rows:
        return ()
    note = (
        "Forecast before training, with the machines of the study's [forecast]: of received and sent without the headers of "
        "messages, of training without reading and augmenting patches, of memory the tensors at the worst moment of a step. "
        "Besides: both ways outside of rounds, forecast without scores, for validation cases like the median case. "
        "Measured memory is the most that the process held, with its libraries and all else that it did; on a GPU "
        "tensors alone. The server's seconds are those of its part of a network that is split."
    )
    told_of = ("received", "sent", "besides", "computing", "memory")
    header = ["model", "site", *(text for name in told_of for text in (name, "forecast"))]
    return table(header, rows, caption="Measured, and forecast", words=2), e("p", note, class_="note")


def _beside(took: Sequence[Row], told: Row, n_rounds: float) -> list[str]:
    """Measured and forecast, in turn: bytes received, sent, and besides, seconds, memory."""
    down, up = (n_rounds * told[key] for key in ("down", "up"))
    memory = max(row.get("memory", 0) for row in took)
    return [
        size(_mean(took, "bytes_down")), size(down), size(_mean(took, "bytes_up")), size(up),
        *_besides(took, [told]),
        duration(_mean(took, "seconds")), duration(n_rounds * told["seconds"]),
        size(memory) if memory else MISSING, size(told["memory"]),
    ]  # fmt: skip


def _at_server(of: Sequence[Row], forecast: Row, rounds: Mapping[str, float]) -> list[str]:
    """The same of the server: what all sites send it receives, and what they receive it sends. Its memory is forecast only."""
    sites = [
        (m["sites"][site], forecast["sites"][site], n) for site, n in rounds.items() for m in of if site in m["sites"]
    ]
    times = len(of)
    measured = {key: sum(took[key] for took, _, _ in sites) / times for key in ("bytes_down", "bytes_up")}
    told = {key: sum(n * told[key] for _, told, n in sites) / times for key in ("down", "up")}
    seconds = [m["server_seconds"] for m in of if "server_seconds" in m]
    n_rounds = fmean(rounds.values())
    return [
        size(measured["bytes_up"]), size(told["up"]), size(measured["bytes_down"]), size(told["down"]),
        *_besides([took for took, _, _ in sites], [told for _, told, _ in sites], times=len(sites) / times),
        duration(fmean(seconds)) if seconds else MISSING, duration(n_rounds * forecast["server_seconds"]),
        MISSING, size(forecast["server_memory"]),
    ]  # fmt: skip


def _besides(took: Sequence[Row], told: Sequence[Row], *, times: float = 1.0) -> tuple[str, str]:
    """Bytes outside of rounds, both ways: measured, and forecast; runs of earlier versions counted none."""
    keys = ("besides_down", "besides_up")
    measured = sum(_mean(took, key) for key in keys) if all(keys[0] in row for row in took) else None
    forecast = sum(_mean(told, key) for key in keys) if all(keys[0] in row for row in told) else None
    return _times(measured, times), _times(forecast, times)


def _times(n: float | None, times: float) -> str:
    return MISSING if n is None else size(times * n)


def _size(took: Sequence[Row], key: str) -> str:
    return size(_mean(took, key)) if all(key in row for row in took) else MISSING


def _steps(took: Sequence[Row]) -> str:
    """Steps taken, and of how many where time was short."""
    asked = fmean(row.get("n_asked", row["n_steps"]) for row in took)
    steps = _mean(took, "n_steps")
    return f"{steps:,.0f}" if asked == steps else f"{steps:,.0f} of {asked:,.0f}"


def _mean(rows: Sequence[Row], key: str) -> float:
    return fmean(row[key] for row in rows)
