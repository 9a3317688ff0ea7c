"""Commands about studies, on one machine: look at the data, run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from concilium.cli._shown import Out, Resume, Seeds, console, progress_bar, show_run, show_table, shown


def demo(out: Annotated[Path, typer.Option("--out", help="Run folder to write.")] = Path("runs/demo")) -> None:
    """The main job on built-in data: three synthetic sites; local, federated, centralized (about 3 minutes on 2 cores)."""
    from concilium.demo import demo_study

    _run(demo_study(out), out, resume=False)


def run(
    study: Annotated[Path, typer.Argument(help="Study file (TOML).")],
    out: Out = None,
    resume: Resume = False,
    seeds: Seeds = None,
) -> None:
    """Run a study: fingerprint, plan, train, score."""
    from concilium.study import read_study, with_seeds

    read = with_seeds(read_study(study), seeds)
    _run(read, out or Path("runs") / read.study.name, resume=resume)


def check(
    what: Annotated[
        list[Path], typer.Argument(help="Study file (TOML), or nnU-Net raw folders.", metavar="STUDY|DATASET...")
    ],
    test: Annotated[Path | None, typer.Option("--test", help="Held-out set, beside raw folders.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="File for all findings. It names cases: keep it.")] = None,
    fix: Annotated[
        Path | None, typer.Option("--fix", help="Folder for copies in which what can be mended safely is.")
    ] = None,
    show: Annotated[int, typer.Option("--show", min=1, help="Cases to list for each kind of finding.")] = 20,
) -> None:
    """Say everything that is wrong with the data, before anything runs. Runs where they lie, sends nothing, changes nothing."""
    from concilium import api
    from concilium.reports.findings import fixed, lines

    with progress_bar() as progress:
        task = progress.add_task("Checking", total=None, note="")
        checked = api.check(
            what, test=test, fix=fix,
            watch=lambda n, total, case: progress.update(task, completed=n, total=total, note=case),
        )  # fmt: skip
    for style, line in lines(checked.found, most=show):
        shown.print(line, style=style, markup=False, soft_wrap=not shown.is_terminal)
    if fix:
        shown.print(fixed(fix, len(checked.found.changes)), markup=False, soft_wrap=True)
    if json:
        checked.write(json)
    if checked.exit_code:
        raise typer.Exit(checked.exit_code)


def plan(
    study: Annotated[Path, typer.Argument(help="Study file (TOML).")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Empty folder to keep the plans and fingerprints in, of all and of each site."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="File for everything. It tells of each site: keep it.")
    ] = None,
    mbit: Annotated[float | None, typer.Option("--mbit", help="Of each site's link [Mbit/s]. Default: 100.")] = None,
    ms: Annotated[float | None, typer.Option("--ms", help="To the server and back [ms]. Default: 20.")] = None,
    site_gflops: Annotated[
        float | None, typer.Option("--site-gflops", help="What a site sustains [GFLOP/s]. Default: timed here.")
    ] = None,
    server_gflops: Annotated[
        float | None, typer.Option("--server-gflops", help="What the server sustains. Default: timed here.")
    ] = None,
    forecast: Annotated[bool, typer.Option(help="Tell what every way to train would cost.")] = True,
) -> None:
    """Say whether one plan suits all sites, or plans of their own, and why; and what training would cost. Sends nothing."""
    from concilium import api
    from concilium.reports.planned import grids, lines
    from concilium.study import forecast_by, read_study

    read = forecast_by(read_study(study), mbit=mbit, ms=ms, site_gflops=site_gflops, server_gflops=server_gflops)
    planned = api.plan(
        read, out=out, forecast=forecast, watch=lambda event: console.print(event.text, style="dim", markup=False)
    )
    for grid in grids(planned.found):
        show_table(grid.title, grid.header, grid.rows, grid.notes)
    for style, line in lines(planned.found):
        shown.print(line, style=style, markup=False, soft_wrap=not shown.is_terminal)
    if json:
        planned.write(json)
    if planned.exit_code:
        raise typer.Exit(planned.exit_code)


def _run(study: Any, out: Path, *, resume: bool) -> None:
    from concilium import api

    again = f"concilium run {out / 'study.toml'} --out {out} --resume"
    show_run(lambda watch: api.run(study, out, resume=resume, watch=watch), again)
