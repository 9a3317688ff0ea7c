"""`dossier.html` and `dossier.md`: what a study sends, for a hospital's data-protection officer, to be signed and filed.

Before a run it says what will leave, to whom, how often, how many bytes, through what, and what is not protected. Of a run it
says the same with what was measured beside it. Everything is derived from the study and from the code; no sentence is kept for
one study. It never says that anything is without a person behind it: nothing here makes data of patients into anything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concilium import __version__
from concilium.disclosure import MIN_CASES
from concilium.errors import StudyError
from concilium.preparation import Event
from concilium.reports import _kept, _leaving, _risks, _seeing, _sent
from concilium.reports._bytes import Forecast, forecasts, measured, why_not
from concilium.reports._found import find
from concilium.reports._leaks import AUDITS
from concilium.reports._sheet import Grid, Lines, Part, to_html, to_markdown
from concilium.reports._talk import Trained, exchanges, trained_in
from concilium.reports._words import VOXELS, WORDS
from concilium.study import Study, is_vertical, read_study, to_toml

NAMES = ("dossier.html", "dossier.md")
_STYLE = Path(__file__).with_name("report.css")
Watch = Callable[[Event], None]


@dataclass(frozen=True)
class Dossier:
    """Where it is, and what it says."""

    html: Path
    markdown: Path
    text: str
    """As in the Markdown file."""


def write_dossier(
    what: Study | Path,
    out: Path,
    *,
    defaults: Mapping[str, Any],
    leakage: Path | None = None,
    forecast: bool = True,
    watch: Watch = lambda event: None,
) -> Dossier:
    """Write the dossier of a study, or of the run in a folder, as two files into the folder `out`.

    Args:
        defaults: of a hospital's `site.toml`, by key.
        leakage: leakage.json of an audit; omitted: all of the run's own.
        forecast: forecast the bytes, for which the sites' cases are read, where they are here.

    Raises:
        StudyError: no run in the folder, or a file that is no leakage.json.
    """
    run = what if isinstance(what, Path) else None
    study = read_study(what / "study.toml", check_data=False) if isinstance(what, Path) else what
    own = sorted((run / AUDITS).glob("**/leakage.json")) if run is not None else []
    attacked = [_read_leakage(path) for path in ([leakage] if leakage is not None else own)]
    told = forecasts(study, watch) if forecast else _reasons(study)
    parts = dossier(study, told, attacked, run=run, defaults=defaults)
    when = "before it runs" if run is None else "after a run of it"
    over = f"Concilium {__version__}, data-protection dossier of a study, {when}"
    out.mkdir(parents=True, exist_ok=True)
    markdown = to_markdown(study.study.name, over, parts)
    page = to_html(study.study.name, over, parts, _STYLE.read_text(encoding="utf-8"))
    html, text = (out / name for name in NAMES)
    for path, content in ((html, page), (text, markdown)):
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(path)
    return Dossier(html, text, markdown)


def dossier(
    study: Study,
    told: Mapping[str, Forecast],
    attacked: Sequence[Mapping[str, Any]],
    *,
    run: Path | None,
    defaults: Mapping[str, Any],
) -> list[Part]:
    """The parts, in their order."""
    if run is None:
        bytes_part = _sent.bytes_before(study, told)
    else:
        found = find(run)
        least = MIN_CASES if found.is_shared else 0
        bytes_part = _sent.bytes_after(study, told, measured(study, found.rounds, found.results["models"]), least=least)
    return [
        _short(study, attacked, run),
        _leaving.messages(study),
        bytes_part,
        _seeing.sight(study),
        _seeing.readers(study),
        _leaving.protections(study),
        _leaving.permissions(study, defaults),
        _risks.attacks(study, attacked),
        _risks.unprotected(study, attacked),
        _kept.retention(run),
        *([_outcome(run)] if run is not None else []),
        _leaving.fields(study),
        _words(),
        _signatures(study),
    ]


def _reasons(study: Study) -> dict[str, Forecast]:
    """Why there is no forecast of each model, where that is so whatever its data."""
    return {m.name: why for m in trained_in(study) if (why := why_not(m))}


def _read_leakage(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"study", "model", "attacks", "rows", "notes", "victims"} <= found.keys():
            raise ValueError("keys are missing")
    except (OSError, ValueError, AttributeError) as e:
        raise StudyError(
            f"{path} is no leakage.json ({type(e).__name__}: {e}). Expected the file that `concilium leakage` wrote. "
            "Check the path."
        ) from e
    return dict(found)


# ------------------------------------------------------------------------------------------------------------- short parts


def _short(study: Study, attacked: Sequence[Mapping[str, Any]], run: Path | None) -> Part:
    """The whole in some lines."""
    models = [m for m in trained_in(study) if not m.beside]
    own = models[0]
    p = study.protocol
    steps = f"{p.steps:,} steps" if p.steps is not None else f"{p.epochs:g} passes over each site's cases"
    where = (
        "on one machine (a simulation): as such nothing leaves it. What follows is what leaves each site where the "
        "same study runs between "
        "hospitals"
        if study.engine.name == "simulation"
        else "between hospitals"
    )
    voxels = any(WORDS[x.reply][0] == VOXELS for m in models for x in exchanges(m))
    others = f", and beside it {', '.join(m.name for m in models[1:])}" if len(models) > 1 else ""
    lines = [
        f"{len(study.sites)} sites ({', '.join(study.sites)}) train {own.name}{others}: {p.rounds:,} rounds of {steps}.",
        f"The study runs {where}.",
        "Images, label maps, and names of cases and patients stay at each site.",
        "Values of single voxels leave, from which images can be computed back."
        if voxels
        else "No map of voxels leaves; weights and statistics do, which are computed from patients.",
        *_readings(models),
        f"{len({a['name'] for audit in attacked for a in audit['attacks']})} attacks were run on what is sent: see below."
        if attacked
        else "No attack was run on what is sent.",
    ]
    if is_vertical(study):
        lines.append("Sites hold different channels of the same patients, and find these by blinded numbers.")
    if "centralized" in p.compare:
        lines.append(
            "The comparison “centralized” pools all cases in one place: possible in a simulation only, refused between "
            "hospitals."
        )
    return Part("In short", [Lines(lines)])


def _readings(models: Sequence[Trained]) -> Iterator[str]:
    """What the server reads, by the models of which that holds."""
    said: dict[str, list[str]] = {}
    for model in models:
        if model.protocol != "centralized":
            said.setdefault(_server_reads(model), []).append(model.name)
    for text, of in said.items():
        yield text if len(said) == 1 else f"{', '.join(of)}: {text}"


def _server_reads(model: Trained) -> str:
    if model.sums_secretly:
        return "The server reads the sum of the sites' updates, and the new model; a single site's update looks like noise."
    match model.protocol:
        case "local":
            return "The server gets no weights."
        case "cyclic":
            return "The server carries sealed weights, which it cannot read; the next site can."
        case "vertical" if model.apart:
            return "The server reads maps and gradients of every site, and the weights of the tail. Fronts stay at their sites."
        case "vertical":
            return "The server reads maps, gradients and weights of every site."
        case "splitfed":
            return (
                "The server reads maps and gradients of every site, and the weights of front and tail that do not stay."
            )
    return "The server reads every site's update by itself, and the finished model, but for what stays at sites."


def _outcome(run: Path) -> Part:
    """What was not as asked, by number: texts may name cases."""
    results = find(run).results
    n = {key: len(results.get(key, ())) for key in ("problems", "warnings")}
    lines = [
        f"Everything ran as asked: {'yes' if results.get('complete') else 'NO'}.",
        f"Things that were not as asked: {n['problems']}; warnings: {n['warnings']}. They are in report.html.",
        *_spent(results),
    ]
    return Part("How the run went", [Lines(lines)])


def _spent(results: Mapping[str, Any]) -> Iterator[str]:
    """What differentially private training has spent, where there was any."""
    for model in results.get("models", ()):
        for site, took in model.get("sites", {}).items():
            if isinstance(told := took.get("privacy"), dict):
                values = ", ".join(f"{key} {value:g}" for key, value in told.items() if isinstance(value, int | float))
                yield f"Differential privacy spent, by the site's own account: {model['name']}, {site}: {values}."


def _words() -> Part:
    rows = [
        ["site", "a hospital's computer with its own cases. It opens all connections itself"],
        ["server", "the computer that sends requests to the sites and puts their answers together"],
        ["model, weights", "the numbers that a network has learnt"],
        ["update", "how training at one site changed the weights"],
        [
            "step, round",
            "a step learns from a few image patches; after the steps of a round the sites' work is put together",
        ],
        ["map", "what a layer of the network makes of an image: numbers for every place in it"],
        ["gradient", "how numbers should change so that the result improves"],
        ["scoring", "comparing the model's segmentation of a case with its label map, at the site"],
        ["a simulation", "all sites on one machine, for trying a study out"],
    ]
    return Part("Words used here", [Grid(["word", "meaning"], rows)])


def _signatures(study: Study) -> Part:
    digest = hashlib.sha256(to_toml(study).encode()).hexdigest()
    return Part(
        "Read, and filed",
        [
            "This page was made from the study file by a program. It is no legal assessment, and replaces none.",
            f"SHA-256 of the study with every default filled in, as in the run folder's study.toml: {digest}",
            Grid(
                ["role", "name", "date", "signature"],
                [[role, "", "", ""] for role in ("data protection", "radiology", "IT")],
                kind="sign",
            ),
            Grid(
                ["folders are deleted by", "date", "who"], [["the server", "", ""], ["this site", "", ""]], kind="sign"
            ),
        ],
    )
