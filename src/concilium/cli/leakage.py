"""The command that attacks what a study sends."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concilium.cli._shown import console, show_table, shown

if TYPE_CHECKING:
    from concilium.leakage import Asked


def leakage(
    what: Annotated[
        Path, typer.Argument(metavar="STUDY|RUN", help="Study file (TOML), which is run first; or a run folder.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Of a study: the run folder. Of a run: the audit's. Default: runs/NAME, RUN/leakage."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="As in results.json. Default: the study's own.")] = None,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help="Again for others. Default: all that apply.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Of an attack: inversion.steps=300. May be given again.")
    ] = None,
    cut: Annotated[
        list[str] | None,
        typer.Option(
            "--cut", help="shallow, deep, STAGE,STAGE, or all on the way down; again for others. Default: the study's."
        ),
    ] = None,
    auxiliary: Annotated[
        str | None,
        typer.Option(
            "--auxiliary", help="Whose cases the attacker has: a site, or a raw folder. Default: the test set."
        ),
    ] = None,
    round: Annotated[
        list[int] | None,
        typer.Option("--round", help="Audit the weights after it too; 0: untrained. Again for others."),
    ] = None,
    victims: Annotated[int, typer.Option("--victims", min=1, help="Patches to attack.")] = 48,
    own: Annotated[int, typer.Option("--own", min=2, help="Patches of the attacker.")] = 256,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Every model of the run: Dice against leakage, and the Pareto set."),
    ] = False,
    steering: Annotated[
        int,
        typer.Option(
            "--steering", min=1, help="Steps for which an attack that departs from the protocol steers fronts."
        ),
    ] = 400,
    predicting: Annotated[
        bool,
        typer.Option(
            "--predicting", help="Of protocol vertical: the maps of the finished model at work, not of training."
        ),
    ] = False,
    gallery: Annotated[int, typer.Option("--gallery", min=2, help="Candidates to tell apart.")] = 100,
    site: Annotated[
        Path | None,
        typer.Option(
            "--site", help="A site's site.toml: run and audit the study on its own cases alone, here. Sends nothing."
        ),
    ] = None,
) -> None:
    """Attack what a study sends, and say what each attack finds beside a guess without looking. Runs here, sends nothing."""
    from concilium.api import reported
    from concilium.leakage import Amount, Asked
    from concilium.leakage import leakage as audit
    from concilium.leakage.along import run_and_keep
    from concilium.reports.leakage import grids
    from concilium.study import read_study

    asked = Asked(
        model,
        tuple(attack or ()),
        _by_attack(option or []),
        tuple(cut or ()),
        auxiliary,
        tuple(round or ()),
        Amount(victims, own, gallery, steering),
        predicting,
    )
    if what.is_dir():
        run, folder = what, out
    else:
        study = read_study(what, check_data=site is None)
        if site is not None:
            from concilium.deployment.leakage import study_at_site
            from concilium.deployment.party import party_asked
            from concilium.study import is_vertical

            asked = party_asked(study, asked, compare=compare) if is_vertical(study) else asked
            study = study_at_site(study, site)
        default = Path("runs") / study.study.name if site is None else site.parent / "leakage" / study.study.name
        run = run_and_keep(
            study,
            out or default,
            asked.rounds,
            model=model,
            watch=lambda e: console.print(e.text, style="dim", markup=False) if e.text else None,
        )
        folder = None
    if compare:
        _compare(run, asked)
        return
    found = audit(run, folder, asked=asked, watch=lambda text: console.print(text, style="dim", markup=False))
    for grid in grids(found):
        show_table(grid.title, grid.header, grid.rows, grid.notes)
    for note in found["notes"]:
        shown.print(f"Note: {note}", markup=False, soft_wrap=True)
    where = folder or run / "leakage"
    shown.print(f"Audit: {where / 'leakage.json'}; pictures stay in {where / 'pictures'}", markup=False, soft_wrap=True)
    if folder is None:
        reported(run, lambda event: console.print(event.text, markup=False))


def _by_attack(given: list[str]) -> dict[str, dict[str, Any]]:
    """`inversion.steps=300` and the like, by attack."""
    from concilium.network_sizes import read_options

    options: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in read_options(given).items():
        of, _, name = key.partition(".")
        options[of][name] = value
    return options


def _compare(run: Path, asked: Asked) -> None:
    """Audit every model, and show what defences cost and are worth."""
    from concilium.api import reported
    from concilium.leakage.price import price
    from concilium.reports._leaks import NAIVE, PRICE_HEADER, price_rows

    found = price(run, asked=asked, watch=lambda text: console.print(text, style="dim", markup=False))
    title = "What defences cost, and what they are worth"
    show_table(title, PRICE_HEADER, tuple(price_rows(found)), (NAIVE, *found["notes"]))
    shown.print(f"Written: {run / 'leakage' / 'price.json'}", markup=False, soft_wrap=True)
    reported(run, lambda event: console.print(event.text, markup=False))
