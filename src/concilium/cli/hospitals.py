"""Commands that run a study between hospitals: kits, the server, a site."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from concilium.cli._shown import Out, Resume, Seeds, show_run, shown


def provision(
    study: Annotated[Path, typer.Argument(help="Study file (TOML): its name and its sites.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the kits; must be empty. They hold private keys.")],
    host: Annotated[
        list[str], typer.Option("--host", help="Name or address under which sites reach the server; again for others.")
    ],
    port: Annotated[int, typer.Option("--port", help="Of FLARE, at the server.")] = 8002,
    message_port: Annotated[int, typer.Option("--message-port", help="Of the study's messages, at the server.")] = 8003,
) -> None:
    """Make the kits with which a server and sites become a federation. Carry each to its machine yourself."""
    from concilium.deployment import require_flare

    require_flare()
    from concilium.deployment.provision import provision as make_kits
    from concilium.study import read_study

    read = read_study(study, check_data=False)
    sites = [*read.sites, *(["test"] if read.test else [])]
    kits = make_kits(read.study.name, sites, out, hosts=host, port=port, message_port=message_port)
    for name, kit in kits.items():
        shown.print(f"{name}: {kit}", markup=False, soft_wrap=True)
    shown.print(
        f"Keep {out / 'authority'} to yourself: who has it can make certificates.", markup=False, soft_wrap=True
    )


def serve(
    kit: Annotated[Path, typer.Argument(help="The server's kit.")],
    study: Annotated[Path, typer.Argument(help="Study file (TOML).")],
    out: Out = None,
    resume: Resume = False,
    wait: Annotated[
        float, typer.Option("--wait", help="Seconds to wait for sites before beginning without them.")
    ] = 600,
    seeds: Seeds = None,
) -> None:
    """Run a study with sites that have joined: at the server."""
    from concilium.deployment import require_flare

    require_flare()
    from concilium.api import Run, reported
    from concilium.deployment.serve import serve as serve_study
    from concilium.preparation import Event
    from concilium.study import read_study, with_seeds

    read = with_seeds(read_study(study, check_data=False), seeds)
    folder = out or Path("runs") / read.study.name
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    again = f"concilium serve {kit} {study} --out {folder}{f' --seeds {seeds}' if seeds else ''} --resume"

    def work(watch: Callable[[Event], None]) -> Run:
        return reported(serve_study(kit, read, folder, resume=resume, wait_s=wait, watch=watch).folder, watch)

    show_run(work, again)


def join(
    kit: Annotated[Path, typer.Argument(help="This site's kit.")],
    data: Annotated[Path | None, typer.Option("--data", help="nnU-Net raw folder.")] = None,
    test: Annotated[Path | None, typer.Option("--test", help="Copy of the held-out set.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="For what is private to runs. Default: in the kit.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads to compute with.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")] = None,
    split: Annotated[
        bool | None, typer.Option("--split/--no-split", help="Whether activations may leave this site. Default: no.")
    ] = None,
    case_scores: Annotated[
        bool | None,
        typer.Option(
            "--case-scores/--no-case-scores", help="Whether scores of single cases may. Default: averages only."
        ),
    ] = None,
) -> None:
    """Take part in the studies of a kit's federation: at a site. Settings are kept in the kit's local/site.toml."""
    from concilium.deployment import require_flare

    require_flare()
    from concilium.deployment.join import join as join_federation

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's way to ask: end what was started
    given = {"data": data, "test": test, "folder": folder, "threads": threads, "device": device, "split": split}
    given["case_scores"] = case_scores
    try:
        join_federation(kit, given, watch=lambda text: shown.print(text, markup=False, soft_wrap=True))
    except KeyboardInterrupt as e:
        raise typer.Exit(130) from e
