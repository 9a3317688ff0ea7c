"""The part of a dossier that says how many bytes leave: forecast, and as a run measured them."""

from __future__ import annotations

from collections.abc import Mapping

from concilium.disclosure import count
from concilium.reports._bytes import Bytes, Forecast, Measured
from concilium.reports._elements import size
from concilium.reports._sheet import Content, Grid, Lines, Part
from concilium.reports._talk import Trained, trained_in
from concilium.study import Study


def bytes_before(study: Study, told: Mapping[str, Forecast]) -> Part:
    """What training will send."""
    rows, why = [], []
    rounds = study.protocol.rounds
    for model in trained_in(study):
        forecast = told.get(model.name, "It was not asked for (--no-forecast).")
        if isinstance(forecast, str):
            why.append(f"{model.name}: {forecast}")
            continue
        rounds = model.study.protocol.rounds
        for site, b in forecast.items():
            row = [size(b.up), size(b.down), size(b.up * rounds * model.times), size(b.down * rounds * model.times)]
            row += [size(b.besides_up * model.times), size(b.besides_down * model.times)]
            rows.append([model.name, site, *row])
    header = ["model", "site", "sent a round", "received a round", "sent in all rounds", "received in all rounds"]
    header += ["sent besides", "received besides"]
    content: list[Content] = []
    if rows:
        content += [
            Grid(header, rows, "Forecast of training, from the shapes of the network", figures=6),
            "Besides: outside of rounds, when the model is validated, given to the sites and scored. Headers of messages are "
            "not counted, nor are statistics, scores and new patients. A site that is not asked in a round sends nothing in it. "
            "In cyclic training only the site that has the model when it is scored sends it on; any may be that.",
        ]
    if why:
        content += ["No forecast:" if rows else "There is no forecast of bytes:", Lines(why)]
    return Part("How many bytes", content)


def bytes_after(
    study: Study, told: Mapping[str, Forecast], found: Mapping[str, Mapping[str, Measured]], *, least: int
) -> Part:
    """What training sent, beside what was forecast; a number of cases below `least` is not told."""
    rows = []
    models = {m.name: m for m in trained_in(study)}
    for name, sites in found.items():
        forecast = told.get(name, "")
        for site, m in sites.items():
            b = forecast.get(site) if not isinstance(forecast, str) else None
            rows.append([name, site, *_beside(m, b, models[name]), f"{m.messages:,}", count(m.cases, least)])
    why = [f"{name}: {told[name]}" for name in found if isinstance(told.get(name), str)]
    header = ["model", "site", "rounds", "sent", "forecast", "received", "forecast", "messages", "cases"]
    content: list[Content] = [
        Grid(header, rows, "Measured in training, all seeds and folds together", figures=7)
        if rows
        else "The run has no complete round: nothing was measured.",
        "Rounds: those that the site answered, of as many as it was asked. Bytes are counted by the engine, headers "
        "included. Messages: "
        "the site's answers in training, counted from the rounds and steps in the record; between rounds it also "
        "answers “done” and "
        "scores. Cases: the most that it trained on. Statistics of cases, for the plan, come on top.",
    ]
    besides = [
        [name, site, size(m.besides_up), size(m.besides_down)]
        for name, sites in found.items()
        for site, m in sites.items()
        if m.besides_up is not None and m.besides_down is not None
    ]
    if besides:
        title = "Measured outside of rounds: when the model was validated, given to the sites, and scored"
        content.append(Grid(["model", "site", "sent", "received"], besides, title, figures=2))
    if why:
        content += ["No forecast:", Lines(why)]
    return Part("Bytes, messages and cases: measured, beside what was said before", content)


def _beside(m: Measured, b: Bytes | None, model: Trained) -> list[str]:
    planned = model.study.protocol.rounds * model.times
    up, down = ("none", "none") if b is None else (size(b.up * m.rounds), size(b.down * m.rounds))
    return [f"{m.rounds:,} of {planned:,}", size(m.up), up, size(m.down), down]
