"""MODEL_CARD.md, from the run's record alone; after Mitchell et al., Model Cards, FAccT 2019 (arXiv:1810.03993).

No path, case or patient is in it. What a run's problems say may hold words of an error at a simulated site: paths and the names
of known cases are taken out of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from concilium.catalog import TRAINER
from concilium.data.labels import foreground
from concilium.disclosure import without_counts, without_names
from concilium.exports._card_data import Record, Results, data_table, record_of, training_lines
from concilium.finished import Finished
from concilium.reports import TITLES
from concilium.reports._units import unit_of
from concilium.statistics import ALL_SITES, FOREGROUND_MEAN

MOST_LINES = 20
"""Of warnings and of problems."""


def model_card(finished: Finished, results: Results, *, intended_use: str) -> str:
    """The card, Markdown with the front matter that the Hugging Face hub reads.

    Args:
        results: the run's results.json.
        intended_use: typed by hand; the rest is not.
    """
    learnt = list(foreground(finished.labels))
    record = record_of(finished, results)
    title = f"{finished.study.study.name}: {finished.name}"
    parts = [
        _front_matter(finished),
        f"# {title}\n\n**Research software, not a medical device.** {_summary(finished, learnt)}",
        _state(record),
        f"## Intended use\n\n{intended_use}",
        f"## Training data\n\n{_data(record)}",
        f"## Training\n\n{_training(record)}",
        f"## Figures\n\n{_figures(record)}",
        f"## Privacy\n\n{_privacy(finished)}",
        f"## Versions\n\n{_versions(finished)}",
        f"## Reproduce\n\n{_reproduce(record)}",
        "## Licence\n\nNot chosen. The sites whose data the model was trained on decide; write it here and in the front matter.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(finished: Finished) -> str:
    tags = ["medical-imaging", "segmentation", "nnU-Net", finished.study.protocol.name]
    return (
        "---\nlicense: other\nlibrary_name: concilium\npipeline_tag: image-segmentation\ntags: "
        + json.dumps(tags)
        + "\n---"
    )


def _summary(finished: Finished, learnt: Sequence[str]) -> str:
    plan = finished.plan
    size = " × ".join(map(str, plan.patch_size))
    return (
        f"Segments {_and(learnt)} in {len(plan.patch_size)}D images with the channels {_and(finished.channels)}. Network "
        f"`{finished.study.network.name}` ({plan.configuration_name}, patch {size}, spacing "
        f"{' × '.join(f'{s:g}' for s in plan.spacing)} mm, axes as in arrays)"
        + (
            f"; {len(finished.files)} members, one per fold, whose logits are averaged."
            if len(finished.files) > 1
            else "."
        )
    )


def _state(record: Record) -> str:
    """What went wrong, at the top; nothing where all went as asked."""
    results = record.results
    rows = [*results["cases"], *results["excluded"]]
    names = {str(row[key]) for row in rows for key in ("case", "patient") if row.get(key) is not None}
    problems, warnings = (
        [without_counts(line) if record.is_shared else line for line in results[key]]
        for key in ("problems", "warnings")
    )
    text = ""
    if not results["complete"]:
        text += "> **This run is not complete: not all went as asked.**\n" + _quoted(problems, names)
    if warnings:
        text += "\n>\n" * bool(text) + "> Warnings of the run:\n" + _quoted(warnings, names)
    return text


def _quoted(lines: Sequence[str], names: Iterable[str]) -> str:
    shown = [f"> - {without_names(line, names)}" for line in lines[:MOST_LINES]]
    rest = len(lines) - len(shown)
    return "\n".join([*shown, *([f"> - and {rest} more"] if rest else [])])


def _data(record: Record) -> str:
    rows, lines = data_table(record)
    header = ("site", "cases trained on", "patients trained on", "cases scored", "patients scored")
    return "\n".join([_table(header, rows), "", *lines])


def _training(record: Record) -> str:
    study, t = record.finished.study, record.finished.study.training
    mirror = "on" if t.mirror else "off"
    how = (
        f"Optimiser {t.optimizer}, learning rate {t.learning_rate:g}, weight decay {t.weight_decay:g}, precision {t.precision}, "
        f"augmentation {t.augmentation}, mirroring {mirror}"
    )
    if study.local_update.options.get(TRAINER):
        how = (
            "Loss, augmentation, sampling, optimiser and learning rate are the trainer's; mirroring at prediction "
            f"{'as the trainer allows it' if t.mirror else 'off'}"
        )
    return "\n".join([*training_lines(record), f"{how}, seed {record.seed}."])


def _figures(record: Record) -> str:
    finished, summary = record.finished, record.summary
    if not summary:
        return "None: the model was not scored."
    unit = unit_of(record.cases, finished.file_ending)
    rows = []
    for site, subset, label in dict.fromkeys((s["site"], s["subset"], s["label"]) for s in summary):
        cells = {s["metric"]: s for s in summary if (s["site"], s["subset"], s["label"]) == (site, subset, label)}
        told = [s["n"] for s in cells.values() if s["n"] is not None]
        where = "test set" if subset == "test" else f"{site} ({subset})"
        what = "mean of the labels" if label == FOREGROUND_MEAN else label
        n = str(max(told)) if told else "–"
        rows.append((where, what, n, *(_figure(cells.get(metric), metric) for metric in TITLES)))
    return "\n".join([
        _table(("data", "label", "patients", *TITLES.values()), rows),
        "",
        f"Mean over patients [95 % bootstrap interval over patients; none below 6 patients]. Distances in {unit}; "
        f"tolerance of the surface Dice {finished.study.validation.tolerance:g}. Scored in "
        f"{finished.study.training.precision}; in another precision single voxels may differ.",
        *_kept_back(record),
    ])  # fmt: skip


def _kept_back(record: Record) -> list[str]:
    scored = {(c["site"], c["subset"]) for c in record.cases} | {(ALL_SITES, "validation")}
    sites = dict.fromkeys(s["site"] for s in record.summary if (s["site"], s["subset"]) not in scored)
    if not sites:
        return []
    return [
        f"Scores of single cases are kept back at {_and(sites)}: intervals there are Student's; over all sites there is none."
    ]


def _figure(s: Mapping[str, Any] | None, metric: str) -> str:
    if s is None or s["mean"] is None:
        return "–" if s is None else str(s.get("hidden", "–"))
    digits = 2 if metric == "hd95" else 3
    interval = "" if s["ci_low"] is None else f" [{s['ci_low']:.{digits}f}, {s['ci_high']:.{digits}f}]"
    return f"{s['mean']:.{digits}f}{interval}"


def _privacy(finished: Finished) -> str:
    study = finished.study
    lines = ["Images and label maps stayed at their sites."]
    if study.engine.name == "simulation":
        lines = [
            "The study was simulated on one machine: its sites were folders, and nothing was kept apart but by the program."
        ]
    if finished.name.startswith("centralized"):
        lines = [
            "The images of all sites were pooled to train this model: it is a baseline, and nothing was kept apart."
        ]
    if study.collect.name == "plain":
        lines.append("The server saw what each site sent (`plain`): no secure sum.")
    if study.collect.name == "secure_sum":
        lines.append(
            "The server saw sums of the sites' updates, and no single one (`secure_sum`), of sites that kept to it."
        )
    lines.append(
        "The record shows no measurement of what this model tells about its training data, so no privacy is claimed: weights are "
        "functions of patients' data. Ask the sites before you publish it."
    )
    return "\n".join(lines)


def _versions(finished: Finished) -> str:
    path = finished.run / "environment.json"
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.is_file() else []
    if not sessions:
        return "Not recorded."
    last = sessions[-1]
    packages = ", ".join(f"{name} {number}" for name, number in last["packages"].items())
    stops = f" In {len(sessions)} sessions; this is the last." if len(sessions) > 1 else ""
    return f"Concilium {last['concilium']}, Python {last['python']}, {packages}, GPU: {last['gpu'] or 'none'}.{stops}"


def _reproduce(record: Record) -> str:
    study = record.finished.study
    return (
        f"With the study file ({study.study.name}, seed {study.study.seed}, {study.engine.threads} threads) and the same data at "
        f"each site:\n\n    concilium {'serve KIT' if record.is_shared else 'run'} study.toml"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def _and(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else str(last)
