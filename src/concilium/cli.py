"""The commands. No logic here: a command reads its arguments, calls one function, and shows what came back."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from concilium.errors import ConciliumError

if TYPE_CHECKING:
    from concilium.preparation import Event
    from concilium.run import Outcome

app = typer.Typer(
    help="Train one medical image segmentation model at several hospitals without moving an image.",
    no_args_is_help=True,
)
console = Console(stderr=True, highlight=False)
shown = Console(highlight=False)

Out = Annotated[
    Path | None, typer.Option("--out", help="Run folder to write. Default: runs/NAME in the current directory.")
]


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", help="Run folder to write.")] = Path("runs/demo")) -> None:
    """The main job on built-in data: three synthetic sites; local, federated, centralized (about 3 minutes on 2 cores)."""
    from concilium.demo import demo_study

    _run(demo_study(out), out, resume=False)


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="Study file (TOML).")],
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last complete round.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Train every model with so many seeds. Default: the study's.")
    ] = None,
) -> None:
    """Run a study: fingerprint, plan, train, score."""
    from concilium.study import read_study, with_seeds

    read = with_seeds(read_study(study), seeds)
    _run(read, out or Path("runs") / read.study.name, resume=resume)


@app.command()
def check(
    what: Annotated[
        list[Path], typer.Argument(help="Study file (TOML), or nnU-Net raw folders.", metavar="STUDY|DATASET...")
    ],
    test: Annotated[Path | None, typer.Option("--test", help="Held-out set, beside raw folders.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="File for all findings. It names cases: keep it.")] = None,
    show: Annotated[int, typer.Option("--show", min=1, help="Cases to list for each kind of finding.")] = 20,
) -> None:
    """Say everything that is wrong with the data, before anything runs. Runs where they lie, sends nothing, changes nothing."""
    from concilium.data.check import check as check_data
    from concilium.reports.findings import lines, to_json
    from concilium.study import data_sets

    sites, held_out, folds = data_sets(what, test)
    with _progress() as progress:
        task = progress.add_task("Checking", total=None, note="")
        checked = check_data(
            sites, test=held_out, folds=folds,
            watch=lambda n, total, case: progress.update(task, completed=n, total=total, note=case),
        )  # fmt: skip
    for style, line in lines(checked, most=show):
        shown.print(line, style=style, markup=False, soft_wrap=not shown.is_terminal)
    if json:
        json.write_text(to_json(checked), encoding="utf-8")
    if checked.n("error"):
        raise typer.Exit(3)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    images: Annotated[Path, typer.Option("-i", "--images", help="Folder of images, named CASE_0000.ENDING.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the label maps.")],
    model: Annotated[
        str | None, typer.Option("--model", help="As in results.json, such as federated or local:north.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Segment new images with a model of a run."""
    from concilium.predict import predict as segment_all

    with _progress() as progress:
        task = progress.add_task("Segmenting", total=None, note="")
        skipped = segment_all(
            run, images, out, model=model, device=device,
            watch=lambda case, n, total: progress.update(task, completed=n, total=total, note=case),
        )  # fmt: skip
    for case, reason in skipped:
        console.print(f"Skipped {case}: {reason}", style="red", markup=False)
    shown.print(f"Label maps are in {out}")
    if skipped:
        raise typer.Exit(4)


@app.command()
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
    from concilium.reports.table import build, read_runs, to_text

    figures = build(read_runs(runs), metrics=metric or (), labels=label or (), subset=subset, margin=margin)
    text = to_text(figures, form)
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


@app.command()
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
    from concilium.reports.html import write_report

    shown.print(f"Report: {write_report(folder, out=out)}", markup=False, soft_wrap=True)
    if tensorboard:
        from concilium.reports.tensorboard import write_events

        shown.print(f"TensorBoard: {write_events(folder)}", markup=False, soft_wrap=True)


@app.command()
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
) -> None:
    """Write a model of a run for other programs, with a model card made from the run's record."""
    from concilium.exports import export_run

    folder, after = export_run(run, out, format=format, model=model, intended_use=intended_use)
    shown.print(f"{format}: {folder}", markup=False, soft_wrap=True)
    shown.print(f"Next: {after}", markup=False, soft_wrap=True)


@app.command()
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
    from concilium.evaluation import evaluate as score_all
    from concilium.evaluation import mean_table, write_evaluation

    with _progress() as progress:
        task = progress.add_task("Scoring", total=None, note="")
        found = score_all(
            predictions, reference, labels=labels, tolerance=tolerance,
            watch=lambda case, n, total: progress.update(task, completed=n, total=total, note=case),
        )  # fmt: skip
    header, *rows = mean_table(found)
    table = Table(*header, title="Means over patients", title_justify="left")
    for row in rows:
        table.add_row(*row)
    shown.print(table)
    for case, text in found.warnings:
        console.print(f"Warning: {case}: {text}", style="yellow", markup=False, soft_wrap=True)
    for case, text in found.problems:
        console.print(f"Not scored: {case}: {text}", style="red", markup=False, soft_wrap=True)
    if out is not None:
        write_evaluation(found, out)
        shown.print(f"Scores of every case are in {out}", markup=False, soft_wrap=True)
    if found.problems:
        raise typer.Exit(4)


@app.command()
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


@app.command()
def serve(
    kit: Annotated[Path, typer.Argument(help="The server's kit.")],
    study: Annotated[Path, typer.Argument(help="Study file (TOML).")],
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last complete round.")
    ] = False,
    wait: Annotated[
        float, typer.Option("--wait", help="Seconds to wait for sites before beginning without them.")
    ] = 600,
) -> None:
    """Run a study with sites that have joined: at the server."""
    from concilium.deployment import require_flare

    require_flare()
    from concilium.deployment.serve import serve as serve_study
    from concilium.study import read_study

    read = read_study(study, check_data=False)
    folder = out or Path("runs") / read.study.name
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    again = f"concilium serve {kit} {study} --out {folder} --resume"
    _shown(lambda watch: serve_study(kit, read, folder, resume=resume, wait_s=wait, watch=watch), again)


@app.command()
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
) -> None:
    """Take part in the studies of a kit's federation: at a site. Settings are kept in the kit's local/site.toml."""
    from concilium.deployment import require_flare

    require_flare()
    from concilium.deployment.join import join as join_federation

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's way to ask: end what was started
    given = {"data": data, "test": test, "folder": folder, "threads": threads, "device": device, "split": split}
    try:
        join_federation(kit, given, watch=lambda text: shown.print(text, markup=False, soft_wrap=True))
    except KeyboardInterrupt as e:
        raise typer.Exit(130) from e


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


def _run(study: Any, out: Path, *, resume: bool) -> None:
    from concilium.run import run as run_study

    again = f"concilium run {out / 'study.toml'} --out {out} --resume"
    _shown(lambda watch: run_study(study, out, resume=resume, watch=watch), again)


def _shown(work: Callable[[Callable[[Event], None]], Outcome], again: str) -> None:
    """Show the run as it goes, and its outcome; `again` is the command that goes on after a stop."""
    try:
        with _progress() as progress:
            outcome = work(_shower(progress))
    except KeyboardInterrupt as e:  # typer would end without a word
        console.print(f"Stopped. This goes on from the last complete round: {again}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from e
    _show(outcome)
    _write_report(outcome.folder)
    raise typer.Exit(outcome.exit_code)


def _write_report(folder: Path) -> None:
    """Write the report of a run that has ended; a report that cannot be made does not undo the run."""
    from concilium.reports.html import write_report

    try:
        shown.print(f"Report: {write_report(folder)}", markup=False, soft_wrap=True)
    except Exception as e:
        console.print(f"Warning: no report could be made: {type(e).__name__}: {e}", style="yellow", markup=False)


def _progress() -> Progress:
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


def _show(outcome: Outcome) -> None:
    from concilium.reports.matrix import matrix

    results = outcome.results
    table_text = matrix(results)
    table = Table(
        title=table_text.title, title_justify="left", caption=" ".join(table_text.notes), caption_justify="left"
    )
    for i, name in enumerate(table_text.header):
        table.add_column(name.replace("_", " "), justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    for row in table_text.rows:
        table.add_row(*row)
    shown.print(table)
    costs = Table(title="What each model took", title_justify="left")
    for name in ("model", "updates", "patches", "seconds", "MB sent per site"):
        costs.add_column(name, justify="left" if name == "model" else "right")
    for m in results["models"]:
        up = [s["bytes_up"] for s in m["sites"].values()]
        costs.add_row(
            m["name"], str(m["updates"]), str(m["patches"]), f"{m['seconds']:.0f}", f"{sum(up) / len(up) / 1e6:.1f}"
        )
    shown.print(costs)
    for line in results["excluded"]:
        console.print(f"Excluded: {line['site']}, case {line['case']}: {line['text']}", style="yellow", markup=False)
    for line in results["warnings"]:
        console.print(f"Note: {line}", style="dim", markup=False)
    for line in results["problems"]:
        console.print(f"Not as asked: {line}", style="red", markup=False)
    shown.print(f"Run folder: {outcome.folder}")
