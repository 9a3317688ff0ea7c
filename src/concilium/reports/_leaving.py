"""The parts of a dossier that say what leaves: what, to whom, how often, what for, what is done to it before."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from concilium import catalog
from concilium.errors import StudyError
from concilium.messages import FAILURES, PlugIn
from concilium.networks import beside_build
from concilium.reports._permissions import WHY, needed
from concilium.reports._sheet import Content, Grid, Part
from concilium.reports._talk import OF_LABELS, Exchange, Trained, exchanges, how_often, replies_of, trained_in
from concilium.reports._words import ORDER, VOXELS, WORDS, fields_of, first_words
from concilium.schedule import is_partly_shared
from concilium.study import Study

KINDS = {"filters": "filters", "defences": "defences"}
"""Lists of plug-ins that a study may have -> their folder."""


def messages(study: Study) -> Part:
    """What a site sends, to whom, how often."""
    models = [m for m in trained_in(study) if m.protocol != "centralized"]
    seen: dict[Exchange, list[Trained]] = {}
    for model in models:
        for x in exchanges(model):
            same = dataclasses.replace(x, request=x.reply, sure=True)  # the same answer to another request is the same
            of = seen.setdefault(same, []) if WORDS[x.reply][0] != ORDER else [model]
            of += [] if model in of else [model]
    rows = []
    for x, of in seen.items():
        kind, text = WORDS[x.reply]
        rows.append([x.reply.__name__, kind, text, x.to + _also(x, of), _often(x, of, models)])
    others = ", ".join(f.__name__ for f in FAILURES)
    return Part(
        "What leaves a site",
        [
            "All that a site's computer can send in this study. The list is closed: whatever is not one of these kinds "
            "of message "
            "cannot be packed, and each is an answer to a request of the server.",
            Grid(["message", "about", "what it holds", "who can read it", "how often, from each site"], rows),
            f"Besides: “done”, without content, and in place of any answer a failure ({others}): the class of the "
            "error, a code "
            "word, and a reference into the site's own log, without its text.",
            "Never in a message: images, label maps, names of cases or patients, paths of files.",
        ],
    )


def _also(x: Exchange, of: Sequence[Trained]) -> str:
    """Who else has it, by the study's settings."""
    judged = any(m.collects == "judged" for m in of)
    if x.reply.__name__ == "Trained" and judged:
        return "; every other site, as it is"
    holders = [m.study.protocol.options for m in of if m.protocol == "vertical"]
    if x.reply in OF_LABELS and holders:
        return f" (from {', '.join(sorted({options['labels'] for options in holders}))} alone, which has the labels)"
    labels = {options["labels"] for options in holders if options["body"] == "labels"}
    return f"; {', '.join(sorted(labels))}, through the server" if labels and WORDS[x.reply][0] == VOXELS else ""


def _often(x: Exchange, of: Sequence[Trained], models: Sequence[Trained]) -> str:
    said: dict[str, list[str]] = {}
    for model in of:
        said.setdefault(how_often(x.often, model), []).append(model.name)
    if x.often == "once" or (len(said) == 1 and len(of) == len(models)):
        return next(iter(said))
    return "; ".join(f"{', '.join(names)}: {text}" if len(models) > 1 else text for text, names in said.items())


def fields(study: Study) -> Part:
    """Exactly what each message holds, from the code."""
    rows = []
    for reply in replies_of(m for m in trained_in(study) if m.protocol != "centralized"):
        if told := fields_of(reply):
            rows.append([reply.__name__, "; ".join(f"{name} ({text})" if text else name for name, text in told)])
    return Part(
        "The fields of each message",
        [
            "For whoever checks the list above against the program (src/concilium/messages.py).",
            Grid(["message", "fields"], rows),
        ],
    )


# ---------------------------------------------------------------------------------------------------------------- bytes


# ----------------------------------------------------------------------------------------------- permissions, protections


def permissions(study: Study, defaults: Mapping[str, Any]) -> Part:
    """What a site must allow."""
    wanted = needed(study)
    rows = []
    for key, value in wanted.items():
        words = f"{value} or less" if key == "least_summed" else _toml(value)
        default = _toml(defaults.get(key))
        enough = defaults.get(key) == value or (key == "least_summed" and defaults[key] <= value)
        rows.append([key, words, default, "allowed unless forbidden" if enough else "REFUSED unless allowed", WHY[key]])
    not_needed = [key for key in WHY if key not in wanted and key != "least_summed"]
    content: list[Content] = [
        "Each site decides in its own file site.toml, which no server can change. What is not allowed there is refused before "
        "anything is computed.",
        Grid(["setting", "this study needs", "default", "by default", "what it lets happen"], rows)
        if rows
        else "This study needs no permission.",
        f"Not needed, and best left forbidden: {', '.join(not_needed)}." if not_needed else "",
        "case_scores is never needed: without it averages over patients leave in place of scores of single cases.",
    ]
    return Part("What a site must allow", [c for c in content if c])


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case tuple() | list():
            return ", ".join(map(str, value)) or "none"
    return str(value)


def protections(study: Study) -> Part:
    """Through which filters and defences it goes."""
    same: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
    for model in trained_in(study):
        if not model.beside and model.protocol not in ("local", "centralized"):
            same.setdefault(tuple(_measures(model)), []).append(model.name)
    header = ["measure", "in this study", "what it does"]
    grids = [Grid(header, rows, ", ".join(of) if len(same) > 1 else "") for rows, of in same.items()]
    return Part(
        "What is done to it before it leaves",
        grids or ["Nothing of a model leaves a site, so nothing is done to it."],
    )


def _measures(model: Trained) -> Iterator[tuple[str, str, str]]:
    study = model.study
    if model.sums_secretly:
        yield "masked sums", "secure_sum", _about("collect", study.collect)
    elif model.protocol != "cyclic":
        yield "masked sums", "none", "The server reads what each site sends by itself."
    if model.protocol == "cyclic":
        yield (
            "sealing",
            "yes",
            "Weights are encrypted by one site for the next. The server carries what it cannot open.",
        )
    yield from _not_sent(model)
    for field, folder in KINDS.items():
        given: Sequence[PlugIn] = getattr(study, field)
        for plug_in in given:
            yield field, _spelt(plug_in), _about(folder, plug_in)
        if not given:
            yield (
                field,
                "none",
                "Nothing is done to updates." if field == "filters" else "Nothing is done to maps of voxels.",
            )
    update = study.local_update
    private = update.name.startswith("dp")
    text = "What each patient may change is bounded and drowned in noise; how far is in the run's results (epsilon, delta)."
    yield (
        "differential privacy",
        _spelt(update) if private else "none",
        text if private else "No guarantee for single patients.",
    )
    if (transport := study.protocol.options.get("transport")) is not None:
        yield (
            "rounding on the way",
            str(transport),
            "Maps and gradients travel so. It saves bytes and protects nothing.",
        )


def _not_sent(model: Trained) -> Iterator[tuple[str, str, str]]:
    """What of a network does not leave."""
    study = model.study
    kept = ", ".join(study.sharing.keep) if study.sharing.keep else ""
    if model.apart:
        yield (
            "kept at the site",
            "each site's front",
            "Its weights are drawn at the site and never leave. Its maps do, which is no protection of images.",
        )
    elif is_partly_shared(study):
        yield (
            "kept at the site",
            kept or "what other sites' networks do not have",
            "These parts of the network do not leave.",
        )
    else:
        yield (
            "kept at the site",
            "none",
            "All that is trained at the site leaves, as is said above.",
        )
    if trains := _trains(study):
        where = "its own copy of the file that the study starts from" if study.start.weights else "the study's seed"
        yield (
            "frozen",
            f"all but {', '.join(trains)}",
            f"What does not train does not leave, and comes to no site: each has it from {where}.",
        )


def _trains(study: Study) -> tuple[str, ...]:
    """The roles and patterns of tensors that train, as the study or its network says; none: all do."""
    says = beside_build(study.network, "trains")
    return study.training.tensors or (() if says is None else says(**study.network.options))


def _spelt(plug_in: PlugIn) -> str:
    options = ", ".join(f"{key} = {_toml(value)}" for key, value in plug_in.options.items() if value is not None)
    return plug_in.name + (f" ({options})" if options else "")


def _about(kind: str, plug_in: PlugIn) -> str:
    """What a plug-in says of itself."""
    try:
        function = catalog.load(kind, plug_in.name)
    except StudyError:
        return "Code from outside Concilium, of which nothing is known here."
    own = importlib.import_module(function.__module__)
    return (
        first_words(own.__doc__ if function.__module__.startswith("concilium.") else function.__doc__)
        or "Nothing is said."
    )
