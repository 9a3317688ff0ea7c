"""Commands about what runs found: tables and reports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from concilium.cli._shown import shown


def table(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; each becomes a group of columns.")],
    form: Annotated[str, typer.Option("--format", help="latex, csv or markdown.")] = "markdown",
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="dice, iou, hd95 or nsd; again for others. Default: dice and hd95."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Or foreground_mean; again for others. Default: all, if the runs have the same."),
    ] = None,
    subset: Annotated[
        str | None, typer.Option("--subset", help="test or validation. Default: test where there is one.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option("--margin", min=0, help="Judge non-inferiority by this margin (not of distances).")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write. Default: standard output.")] = None,
) -> None:
    """Models by labels and metrics, with intervals and paired differences: ready to paste into a paper."""
    from concilium import api

    text = api.table(runs, format=form, metrics=metric or (), labels=label or (), subset=subset, margin=margin)
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder; or at a site, the folder of a run there.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write. Default: report.html in the folder.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write losses and Dice per round to tensorboard/ beside it.")
    ] = False,
) -> None:
    """Write a run's report as one HTML file; a site's own with its pictures, where the folder is a site's."""
    from concilium import api

    shown.print(f"Report: {api.report(folder, out)}", markup=False, soft_wrap=True)
    if tensorboard:
        shown.print(f"TensorBoard: {api.tensorboard(folder)}", markup=False, soft_wrap=True)
