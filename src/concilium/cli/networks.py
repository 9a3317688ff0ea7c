"""Command about networks: how large they are, and where they can be cut."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from concilium.cli._shown import console, show_table


def network(
    name: Annotated[str | None, typer.Argument(help="A network, as in a study file. Default: every one.")] = None,
    cut: Annotated[
        str | None, typer.Option("--cut", help="shallow, deep, or two stages: down1,up1. Default: all with a name.")
    ] = None,
    size: Annotated[str, typer.Option("--size", help="Of the image, in 2D or 3D.")] = "256x256",
    channels: Annotated[int, typer.Option("--channels", min=1, help="Channels of the image.")] = 3,
    labels: Annotated[int, typer.Option("--labels", min=1, help="Labels, background included.")] = 5,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Of the network: base_features=16. May be given again.")
    ] = None,
    all: Annotated[
        bool, typer.Option("--all", help="Show every stage, whether it can be cut after it, and what is there then.")
    ] = False,
) -> None:
    """Count parameters and operations of a network, at the site and at the server, without running it."""
    from concilium.network_sizes import all_sizes, read_options, read_size, sizes_of
    from concilium.reports.networks import by_stage, operations, parameters

    after = tuple(cut.replace(",", " ").split()) if cut else None
    asked: dict[str, Any] = {"cut": after, "size": read_size(size), "channels": channels, "labels": labels}
    options = read_options(option or [])
    if name is None:
        found, missing = all_sizes(options=options, **asked)
    else:
        found, missing = [sizes_of(name, options=options, **asked)], []
    grids = map(by_stage, found) if all else (parameters(found), operations(found))
    for grid in grids if found else ():
        show_table(grid.title, grid.header, grid.rows, grid.notes)
    for text in missing:
        console.print(f"Left out: {text}", style="yellow", markup=False)
