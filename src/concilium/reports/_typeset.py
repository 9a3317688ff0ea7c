"""Figures of several runs as text: LaTeX (with booktabs), Markdown, CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from concilium.disclosure import MIN_CASES
from concilium.reports import SHARES, TITLES
from concilium.reports._guarded import undefined
from concilium.statistics import FOREGROUND_MEAN, MIN_PATIENTS

SHORT = {"hd95": "HD95", "nsd": "NSD"}
FIELDS = (
    "study", "subset", "label", "metric", "unit", "model", "minus", "value", "ci_low", "ci_high", "p_holm", "n", "n_seeds",
    "non_inferior", "equivalent", "n_undefined", "site", "gap",
)  # fmt: skip
"""Columns of the CSV. `minus`: the row is the difference of two models. `site`: it is that of a model's worst site, `gap`
behind its best."""
MEAN, DIFFERENCE, WORST = "", ", difference", ", worst site"
"""Kinds of rows, in their order, as they are called behind the label."""
Figure = Mapping[str, Any]
"""The `FIELDS` of one cell, its `kind`, `run` (the number of its column group), and `hidden`: why it has no value, if so."""


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
    kept_back: tuple[str, ...]
    """Sites that told averages in place of the scores of cases."""


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
    """Block (a label and a kind) -> rows: a model or two, with a cell per run and metric."""
    columns = [(run, metric) for run in range(len(table.groups)) for metric in table.metrics]
    found = {(f["run"], f["metric"], f["label"], f["kind"], f["model"], f["minus"]): f for f in table.figures}
    blocks = []
    for label in table.labels:
        for kind in (MEAN, DIFFERENCE, WORST):
            rows = dict.fromkeys(
                (f["model"], f["minus"])
                for f in sorted(table.figures, key=lambda f: table.models.index(f["minus"] or f["model"]))
                if (f["label"], f["kind"]) == (label, kind)
            )
            lines = [
                (
                    model if minus is None else f"{model} − {minus}",
                    [found.get((*c, label, kind, model, minus)) for c in columns],
                )
                for model, minus in rows
            ]
            title = "mean over the foreground labels" if label == FOREGROUND_MEAN else label
            if lines:
                blocks.append((title + kind, lines))
    return blocks


def _cell(figure: Figure | None, group: Group) -> str:
    """`0.875 [0.862, 0.886]`; of a difference also its p; how many patients where some do not count, and undefined scores."""
    if figure is None or figure["value"] is None:
        return "–" if figure is None else figure.get("hidden") or "–"
    sign = "+" if figure["kind"] == DIFFERENCE else ""
    digits = 3 if figure["metric"] in SHARES else 2

    def shown(value: float) -> str:
        return f"{value:{sign}.{digits}f}".replace("-", "−")

    text = shown(figure["value"])
    if figure["kind"] == WORST:
        return f"{figure['site']} {text}; gap {shown(figure['gap'])}"
    if figure["ci_low"] is not None:
        text += f" [{shown(figure['ci_low'])}, {shown(figure['ci_high'])}]"
    if figure["kind"] == DIFFERENCE:
        text += _judged(figure)
    besides = [f"n = {figure['n']}"] if figure["n"] != group.n else []
    besides += [undefined(figure)] if undefined(figure) else []
    return f"{text} ({', '.join(besides)})" if besides else text


def _judged(figure: Figure) -> str:
    text = ""
    if figure["p_holm"] is not None:
        text += ", p < 0.001" if figure["p_holm"] < 0.001 else f", p = {figure['p_holm']:.3f}"
    if figure["non_inferior"] is not None:
        judged = "non-inferior" if figure["non_inferior"] else "inferiority not excluded"
        text += ", equivalent" if figure["equivalent"] else f", {judged}"
    return text


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
        n = f"{g.n} patients" if g.n else "patients"
        sets.append(f"{g.name}: {g.subset} set, {n}{sites}{seeds}")
    text = f"{'; '.join(sets)}. Means over patients with 95 % intervals (patients resampled within sites, then seeds). "
    kinds = {f["kind"] for f in table.figures}
    if DIFFERENCE in kinds:
        text += (
            "Differences are paired by patient; p from a sign-flip test, with Holm's correction over all pairs of "
            "models for one "
            "label and metric. "
        )
    if any(g.n < MIN_PATIENTS for g in table.groups):
        text += f"No interval and no p below {MIN_PATIENTS} patients. "
    if any(g.n_seeds == 1 for g in table.groups):
        text += "One seed: intervals and tests are of these trained models, not of training again. "
    if table.margin is not None:
        text += (
            f"Non-inferior: the lower end of the interval of the difference is above −{table.margin:g}; equivalent: the upper "
            f"one below {table.margin:g} as well. "
        )
    if WORST in kinds:
        text += (
            f"Worst site: of those with {MIN_PATIENTS} patients or more, on validation cases; gap: between its mean and "
            "that of "
            "the best. "
        )
    return (text + _reservations(table)).strip()


def _reservations(table: Comparison) -> str:
    """What is not in the figures."""
    text = ""
    if any(undefined(f) for f in table.figures if f["kind"] == MEAN):
        text += "Undefined: scores of a case and label that are in no mean. "
    if any(f.get("hidden") for f in table.figures):
        text += (
            f"Not shown: figures of fewer than {MIN_CASES} patients, and means over all sites that would tell them. "
        )
    for g in table.groups:
        if g.kept_back:
            text += (
                f"{g.name}: scores of single cases are kept back at {', '.join(g.kept_back)}, so means with theirs have no "
                "resampled interval, and differences are on the other patients. "
            )
        if g.unknown:
            text += f"{g.name}: patients unknown at {', '.join(g.unknown)}, so intervals may be too narrow. "
    return text


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
        r"\footnotesize", f"\\begin{{tabular}}{{l{'r' * n}}}", "\\toprule",
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
        lines += [" & ".join(map(_escaped, line)) + r" \\" for name, cells in rows for line in _in_two(name, cells)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _in_two(name: str, cells: Sequence[str]) -> list[tuple[str, ...]]:
    """A row, and below it what stands behind the intervals, so that two metrics fit the column of an article."""
    parts = [re.split(r"(?<=\]),? ", cell, maxsplit=1) for cell in cells]
    rest = [part[1] if len(part) > 1 else "" for part in parts]
    return [(name, *(part[0] for part in parts))] + ([("", *rest)] if any(rest) else [])


def _escaped(text: str) -> str:
    """Text that LaTeX would read as its own signs."""
    signs = {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
        "−": "$-$", "–": "--", "×": r"$\times$",
    }  # fmt: skip
    return "".join("\\" + c if c in "&%$#_{}" else signs.get(c, c) for c in text)


WRITERS: Mapping[str, Callable[[Comparison], str]] = {"latex": to_latex, "csv": to_csv, "markdown": to_markdown}
