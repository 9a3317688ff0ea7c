"""The command that says what a study sends, for whoever has to allow it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from concilium.cli._shown import console, shown


def dossier(
    what: Annotated[Path, typer.Argument(metavar="STUDY|RUN", help="Study file (TOML); or the folder of its run.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write. Default: dossiers/NAME; of a run its folder.")
    ] = None,
    leakage: Annotated[
        Path | None, typer.Option("--leakage", help="leakage.json of an audit. Default: the run's own.")
    ] = None,
    forecast: Annotated[
        bool, typer.Option(help="Forecast the bytes, for which the cases of all sites are read, where they are here.")
    ] = True,
) -> None:
    """Say for data protection what leaves, to whom, how often, and what is not protected; after a run, what was measured."""
    from concilium import api

    made = api.dossier(
        what,
        out,
        leakage=leakage,
        forecast=forecast,
        watch=lambda event: console.print(event.text, style="dim", markup=False) if event.text else None,
    )
    shown.print(f"Dossier: {made.html}; as text: {made.markdown}", markup=False, soft_wrap=True)
