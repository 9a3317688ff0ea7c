"""What the commands show: progress, a run as it goes, and what came out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from concilium.api import Run
    from concilium.preparation import Event

console = Console(stderr=True, highlight=False)
"""What is said besides: progress, warnings, errors."""
shown = Console(highlight=False)
"""What was asked for."""

Out = Annotated[
    Path | None, typer.Option("--out", help="Run folder to write. Default: runs/NAME in the current directory.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out from its last complete round.")]

Seeds = Annotated[
    int | None, typer.Option("--seeds", min=1, help="Train every model with so many seeds. Default: the study's.")
]


def show_run(work: Callable[[Callable[[Event], None]], Run], again: str) -> None:
    """Show the run as it goes, and its outcome; `again` is the command that goes on after a stop."""
    try:
        with progress_bar() as progress:
            outcome = work(_shower(progress))
    except KeyboardInterrupt as e:  # typer would end without a word
        console.print(f"Stopped. This goes on from the last complete round: {again}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from e
    _show(outcome)
    raise typer.Exit(outcome.exit_code)


def progress_bar() -> Progress:
    """A bar for long work, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def _shower(progress: Progress) -> Callable[[Event], None]:
    """Shows events: a bar per model, lines for the rest; without a terminal, a line for every tenth of the rounds."""
    bars: dict[str, Any] = {}

    def show(event: Event) -> None:
        match event.kind:
            case "round":
                if event.model not in bars:
                    bars[event.model] = progress.add_task(
                        event.model, total=event.rounds, completed=event.round - 1, note=""
                    )
                note = "" if event.loss is None else f"loss {event.loss:.3f}"
                progress.update(bars[event.model], completed=event.round, note=note)
                if not console.is_terminal and event.round % max(1, event.rounds // 10) == 0:
                    console.print(f"{event.model}: round {event.round}/{event.rounds} {note}")
            case "warning":
                console.print(f"Warning: {event.text}", style="yellow", markup=False)
            case "stage":
                console.print(event.text, style="dim", markup=False)

    return show


def _show(outcome: Run) -> None:
    from concilium.reports.matrix import fitting, matrix_of_run

    results = outcome.results
    text = fitting(matrix_of_run(outcome.folder, results), shown.width)
    show_table(text.title, [name.replace("_", " ") for name in text.header], text.rows, text.notes)
    _show_costs(results["models"])
    for line in results["excluded"]:
        what = f"case {line['case']}: {line['text']}" if line["case"] else f"{line['count']} × {line['reason']}"
        console.print(f"Excluded: {line['site']}, {what}", style="yellow", markup=False)
    for line in results["warnings"]:
        console.print(f"Note: {line}", style="dim", markup=False)
    for line in results["problems"]:
        console.print(f"Not as asked: {line}", style="red", markup=False)
    shown.print(f"Run folder: {outcome.folder}", markup=False, soft_wrap=True)
    if outcome.report_file.is_file():
        shown.print(f"Report: {outcome.report_file}", markup=False, soft_wrap=True)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """A table on standard output: its first column in one piece, the others folded where the terminal is narrow."""
    table = Table(title=title, title_justify="left", caption=" ".join(notes), caption_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    shown.print(table)


def _show_costs(models: Sequence[Mapping[str, Any]]) -> None:
    """What each model took: the mean over its seeds and folds."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for m in models:
        by_name.setdefault(m["name"], []).append(m)
    several = max((len(of) for of in by_name.values()), default=1) > 1
    title = "What each model took" + (", per seed and fold" if several else "")
    costs = Table(title=title, title_justify="left")
    for name in ("model", "updates", "patches", "seconds", "MB sent per site"):
        costs.add_column(name, justify="left" if name == "model" else "right")
    for name, of in by_name.items():
        up = fmean(fmean(s["bytes_up"] for s in m["sites"].values()) for m in of)
        numbers = [f"{fmean(m[key] for m in of):.0f}" for key in ("updates", "patches", "seconds")]
        costs.add_row(name, *numbers, f"{up / 1e6:.1f}")
    shown.print(costs)
