"""Figures of several runs as text: LaTeX (with booktabs), Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from concilium.reports import SHARES, TITLES
from concilium.statistics import FOREGROUND_MEAN, MIN_PATIENTS

SHORT = {"hd95": "HD95", "nsd": "NSD"}
FIELDS = (
    "study", "subset", "label", "metric", "unit", "model", "minus", "value", "ci_low", "ci_high", "p_holm", "n", "n_seeds",
    "non_inferior",
)  # fmt: skip
"""Columns of the CSV. `minus`: the row is the difference of two models."""
Figure = Mapping[str, Any]
"""The `FIELDS` of one cell, with `run`, the number of its column group."""


@dataclass(frozen=True)
class Group:
    """A run: its columns. `n`: patients (the most of any figure)."""

    name: str
    subset: str
    n: int
    n_sites: int
    n_seeds: int
    unit: str
    unknown: tuple[str, ...]
    """Sites without patient ids."""


@dataclass(frozen=True)
class Comparison:
    """All figures of a table, not yet as text."""

    groups: tuple[Group, ...]
    labels: tuple[str, ...]
    """`FOREGROUND_MEAN`: over the labels that a run has, be it one."""
    metrics: tuple[str, ...]
    figures: tuple[Figure, ...]
    margin: float | None
    models: tuple[str, ...]
    """In the order of their rows."""


def to_csv(table: Comparison) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.figures)
    return text.getvalue()


def _blocks(table: Comparison) -> list[tuple[str, list[tuple[str, list[Figure | None]]]]]:
    """Block (a label) -> rows: means of the models, then differences; a cell per run and metric."""
    columns = [(run, metric) for run in range(len(table.groups)) for metric in table.metrics]
    found = {(f["run"], f["metric"], f["label"], f["model"], f["minus"]): f for f in table.figures}
    blocks = []
    for label in table.labels:
        for differs in (False, True):
            rows = dict.fromkeys(
                (f["model"], f["minus"])
                for f in sorted(table.figures, key=lambda f: table.models.index(f["minus"] or f["model"]))
                if f["label"] == label and (f["minus"] is not None) == differs
            )
            lines = [
                (
                    model if minus is None else f"{model} − {minus}",
                    [found.get((*c, label, model, minus)) for c in columns],
                )
                for model, minus in rows
            ]
            title = "mean over the foreground labels" if label == FOREGROUND_MEAN else label
            if lines:
                blocks.append((f"{title}, difference" if differs else title, lines))
    return blocks


def _cell(figure: Figure | None, group: Group) -> str:
    """`0.875 [0.862, 0.886]`; of a difference also its p, and how many patients where some do not count."""
    if figure is None or figure["value"] is None:
        return "–"
    sign = "+" if figure["minus"] is not None else ""
    digits = 3 if figure["metric"] in SHARES else 2

    def shown(value: float) -> str:
        return f"{value:{sign}.{digits}f}".replace("-", "−")

    text = shown(figure["value"])
    if figure["ci_low"] is not None:
        text += f" [{shown(figure['ci_low'])}, {shown(figure['ci_high'])}]"
    if figure["p_holm"] is not None:
        text += ", p < 0.001" if figure["p_holm"] < 0.001 else f", p = {figure['p_holm']:.3f}"
    if figure["non_inferior"] is not None:
        text += ", non-inferior" if figure["non_inferior"] else ", inferiority not excluded"
    return text if figure["n"] == group.n else f"{text} (n = {figure['n']})"


def _heads(table: Comparison) -> list[list[str]]:
    """For each run the heads of its columns."""
    return [
        [f"{SHORT.get(m, TITLES[m])}{'' if m in SHARES else f' [{g.unit}]'}" for m in table.metrics]
        for g in table.groups
    ]


def caption(table: Comparison) -> str:
    """What the figures are, in sentences."""
    sets = []
    for g in table.groups:
        sites = f" of {g.n_sites} sites" if g.subset == "validation" and g.n_sites > 1 else ""
        seeds = f", {g.n_seeds} seeds" if g.n_seeds > 1 else ", one seed"
        sets.append(f"{g.name}: {g.subset} set, {g.n} patients{sites}{seeds}")
    text = f"{'; '.join(sets)}. Means over patients with 95 % intervals (patients resampled within sites, then seeds). "
    if any(f["minus"] for f in table.figures):
        text += (
            "Differences are paired by patient; p from a sign-flip test, with Holm's correction over all pairs of models for one "
            "label and metric. "
        )
    if any(g.n < MIN_PATIENTS for g in table.groups):
        text += f"No interval and no p below {MIN_PATIENTS} patients. "
    if any(g.n_seeds == 1 for g in table.groups):
        text += "One seed: intervals and tests are of these trained models, not of training again. "
    if table.margin is not None:
        text += f"Non-inferior: the lower end of the interval of the difference is above −{table.margin:g}. "
    for g in table.groups:
        if g.unknown:
            text += f"{g.name}: patients unknown at {', '.join(g.unknown)}, so intervals may be too narrow. "
    return text.strip()


def _texts(table: Comparison) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    per_run = len(table.metrics)
    return [
        (title, [(name, [_cell(f, table.groups[i // per_run]) for i, f in enumerate(cells)]) for name, cells in rows])
        for title, rows in _blocks(table)
    ]


def to_markdown(table: Comparison) -> str:
    several = len(table.groups) > 1
    heads = [
        f"{_plain(g.name)}: {h}" if several else h
        for g, own in zip(table.groups, _heads(table), strict=True)
        for h in own
    ]
    lines = [["", *heads]]
    for title, rows in _texts(table):
        lines.append([f"**{_plain(title)}**", *[""] * len(heads)])
        lines += [[_plain(name), *cells] for name, cells in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) + 1)]
    rule = ["-" * max(3, widths[0]), *("-" * (max(3, w) - 1) + ":" for w in widths[1:])]
    texts = ["| " + " | ".join(_padded(line, widths)) + " |" for line in (lines[0], rule, *lines[1:])]
    return "\n".join([*texts, "", _plain(caption(table))]) + "\n"


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(max(3, widths[0])), *(c.rjust(max(3, w)) for c, w in zip(line[1:], widths[1:], strict=True))]


def _plain(text: str) -> str:
    """Names that Markdown would read as its own signs."""
    return "".join("\\" + c if c in "\\|*_`<" else c for c in text)


def to_latex(table: Comparison) -> str:
    """A table environment; needs the package booktabs and no other."""
    n, per_run = len(table.groups) * len(table.metrics), len(table.metrics)
    lines = [
        "% needs \\usepackage{booktabs}", "\\begin{table}", "\\centering", f"\\caption{{{_escaped(caption(table))}}}",
        f"\\begin{{tabular}}{{l{'r' * n}}}", "\\toprule",
    ]  # fmt: skip
    if len(table.groups) > 1:
        lines.append(
            "".join(f" & \\multicolumn{{{per_run}}}{{c}}{{{_escaped(g.name)}}}" for g in table.groups) + r" \\"
        )
        spans = (f"\\cmidrule(lr){{{2 + i * per_run}-{1 + (i + 1) * per_run}}}" for i in range(len(table.groups)))
        lines.append(" ".join(spans))
    lines.append("".join(f" & {_escaped(head)}" for own in _heads(table) for head in own) + r" \\")
    for title, rows in _texts(table):
        lines += [r"\midrule", f"\\multicolumn{{{n + 1}}}{{l}}{{\\emph{{{_escaped(title)}}}}} \\\\"]
        lines += [" & ".join(map(_escaped, (name, *cells))) + r" \\" for name, cells in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _escaped(text: str) -> str:
    """Text that LaTeX would read as its own signs."""
    signs = {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
        "−": "$-$", "–": "--", "×": r"$\times$",
    }  # fmt: skip
    return "".join("\\" + c if c in "&%$#_{}" else signs.get(c, c) for c in text)


WRITERS: Mapping[str, Callable[[Comparison], str]] = {"latex": to_latex, "csv": to_csv, "markdown": to_markdown}
