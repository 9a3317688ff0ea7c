"""The commands. No logic here: a command reads its arguments, calls one function, and shows what came back."""

from __future__ import annotations

import sys
import traceback

import typer

from concilium.cli._shown import console
from concilium.cli.dossier import dossier
from concilium.cli.hospitals import join, provision, serve
from concilium.cli.leakage import leakage
from concilium.cli.models import evaluate, export, predict
from concilium.cli.networks import network
from concilium.cli.results import report, table
from concilium.cli.studies import check, demo, plan, run
from concilium.errors import ConciliumError

app = typer.Typer(
    help="Train one medical image segmentation model at several hospitals without moving an image.",
    no_args_is_help=True,
)
for command in (
    demo,
    check,
    plan,
    network,
    run,
    predict,
    evaluate,
    table,
    report,
    export,
    leakage,
    dossier,
    provision,
    serve,
    join,
):
    app.command()(command)


def main() -> None:
    """Entry point: errors become a sentence and an exit code."""
    try:
        app(standalone_mode=True)
    except ConciliumError as e:
        console.print(f"Error: {e}", style="red", markup=False, soft_wrap=True)
        sys.exit(e.exit_code)
    except Exception:
        console.print(traceback.format_exc(), markup=False)
        console.print(
            "This is a fault of Concilium. Please report it with the text above (it may hold paths of yours).",
            style="red",
        )
        sys.exit(70)
