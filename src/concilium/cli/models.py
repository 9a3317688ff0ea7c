"""Commands about finished models: segment, score, hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from concilium.cli._shown import console, progress_bar, shown


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    images: Annotated[Path, typer.Option("-i", "--images", help="Folder of images, named CASE_0000.ENDING.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the label maps.")],
    model: Annotated[
        str | None, typer.Option("--model", help="As in results.json, such as federated or local:north.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str | None, typer.Option("--precision", help="float32, bfloat16 or float16. Default: that of training.")
    ] = None,
    missing: Annotated[
        list[str] | None,
        typer.Option(
            "--missing", help="Of a vertical model: a site whose channels these images lack. Repeat for more."
        ),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(
            "--boxes", help='Of a model of sam: JSON with boxes by case, {"CASE": [[12, 40, 80, 95]]}, or points.'
        ),
    ] = None,
) -> None:
    """Segment new images with a model of a run."""
    from concilium.api import Run

    with progress_bar() as progress:
        task = progress.add_task("Segmenting", total=None, note="")
        skipped = Run(run).predict(
            images, out, model=model, device=device, precision=precision, missing=missing or (), boxes=boxes,
            watch=lambda case, n, total: progress.update(task, completed=n, total=total, note=case),
        )  # fmt: skip
    for case, reason in skipped:
        console.print(f"Skipped {case}: {reason}", style="red", markup=False)
    shown.print(f"Label maps are in {out}")
    if skipped:
        raise typer.Exit(4)


def evaluate(
    predictions: Annotated[Path, typer.Option("-p", "--predictions", help="Folder of label maps, CASE.ENDING.")],
    reference: Annotated[Path, typer.Option("-r", "--reference", help="Folder of label maps of the same names.")],
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="dataset.json that names the labels. Default: one in or beside the folders."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File for the scores of every case: JSON, or CSV by its name.")
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Of the surface Dice, in mm.")] = 1.0,
) -> None:
    """Score label maps against references, whoever made them."""
    from concilium import api
    from concilium.evaluation import mean_table

    with progress_bar() as progress:
        task = progress.add_task("Scoring", total=None, note="")
        scores = api.evaluate(
            predictions, reference, labels=labels, tolerance=tolerance,
            watch=lambda case, n, total: progress.update(task, completed=n, total=total, note=case),
        )  # fmt: skip
    header, *rows = mean_table(scores.found)
    table = Table(title="Means over patients", title_justify="left")
    for name in header:
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    shown.print(table)
    for case, text in scores.warnings:
        console.print(f"Warning: {case}: {text}", style="yellow", markup=False, soft_wrap=True)
    for case, text in scores.problems:
        console.print(f"Not scored: {case}: {text}", style="red", markup=False, soft_wrap=True)
    if out is not None:
        scores.write(out)
        shown.print(f"Scores of every case are in {out}", markup=False, soft_wrap=True)
    if scores.exit_code:
        raise typer.Exit(scores.exit_code)


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must be empty.")],
    format: Annotated[str, typer.Option("--format", help="nnunet, onnx, monai or safetensors.")],
    model: Annotated[
        str | None, typer.Option("--model", help="As in results.json, such as federated or local:north.")
    ] = None,
    intended_use: Annotated[
        str | None, typer.Option("--intended-use", help="What the model is for, for its card: text, or a text file.")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold low-rank updates into the weights that they change.")
    ] = False,
) -> None:
    """Write a model of a run for other programs, with a model card made from the run's record."""
    from concilium.api import Run

    folder, after = Run(run).export(out, format=format, model=model, intended_use=intended_use, fold=fold)
    shown.print(f"{format}: {folder}", markup=False, soft_wrap=True)
    shown.print(f"Next: {after}", markup=False, soft_wrap=True)
