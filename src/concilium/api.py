"""Concilium from Python: check data, run a study, score, compare. The commands are thin calls of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concilium.outcomes import Check, Plan, Run, Scores

if TYPE_CHECKING:  # takes seconds to load
    from concilium.network_sizes import NetworkSizes
    from concilium.preparation import Event
    from concilium.study import Study

__all__ = [
    "Check", "Plan", "Run", "Scores", "check", "evaluate", "network", "open_run", "plan", "report", "reported", "run",
    "table", "tensorboard"
]  # fmt: skip


def run(
    study: str | Path | Mapping[str, Any] | Study,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    seeds: int | None = None,
    watch: Callable[[Event], None] = lambda event: None,
) -> Run:
    """Run a study into the folder `out` (default: `runs/NAME`).

    Args:
        study: a study file, or the same as nested mappings (paths are then relative to the current directory).
        resume: go on from the last complete round of the run in `out`.
        seeds: train every model with so many seeds, in place of the study's number.
        watch: is told what happens.

    Raises:
        StudyError, DataError, EngineError, PrivacyError: it could not be finished; what there is lies in `out`.
    """
    from concilium.line import run as run_study
    from concilium.study import with_seeds

    study = with_seeds(_study(study), seeds)
    folder = Path("runs") / study.study.name if out is None else Path(out)
    return reported(run_study(study, folder, resume=resume, watch=watch).folder, watch)


def _study(given: str | Path | Mapping[str, Any] | Study) -> Study:
    """A study from its file, or from nested mappings."""
    from concilium.study import parse_study, read_study

    if isinstance(given, str | Path):
        return read_study(Path(given))
    return parse_study(given, folder=Path.cwd()) if isinstance(given, Mapping) else given


def reported(folder: Path, watch: Callable[[Event], None]) -> Run:
    """The run in this folder, with its report; one that cannot be made does not undo the run."""
    from concilium.preparation import Event

    found = Run(folder)
    try:
        found.report()
    except Exception as e:
        watch(Event("warning", f"No report could be made: {type(e).__name__}: {e}"))
    return found


def check(
    what: str | Path | Mapping[str, Any] | Study | Sequence[str | Path],
    *,
    test: str | Path | None = None,
    fix: str | Path | None = None,
    watch: Callable[[int, int, str], None] = lambda *_: None,
) -> Check:
    """Everything that is wrong with data, before anything runs.

    Args:
        what: a study as for `run`, or nnU-Net raw folders.
        test: a held-out set, in place of the study's own.
        fix: a folder for copies of the data sets, in which what can be mended safely is; its FIXES.txt says what.
        watch: is told how many cases are done, of how many, and which is next.

    Raises:
        StudyError: no such study or folder, a study that does not say where data lie, or `fix` is not empty.
    """
    from dataclasses import replace

    from concilium.data.check import check as check_data
    from concilium.data.mend import check_free, mend
    from concilium.study import Study, data_sets, parse_study

    if isinstance(what, Mapping):
        what = parse_study(what, folder=Path.cwd(), check_data=False)
    elif isinstance(what, str | Path):
        what = [what]
    named = what if isinstance(what, Study) else [Path(path) for path in what]
    data = data_sets(named, None if test is None else Path(test))
    if fix is not None:
        check_free(Path(fix), data.members)
    found = check_data(
        data.sites,
        test=data.test,
        folds=data.folds,
        names=data.names,
        divide=data.divide,
        holds=data.holds,
        watch=watch,
    )
    return Check(found if fix is None else replace(found, changes=mend(data.members, found.findings, Path(fix))))


def plan(
    study: str | Path | Mapping[str, Any] | Study,
    *,
    out: str | Path | None = None,
    forecast: bool = True,
    watch: Callable[[Event], None] = lambda event: None,
) -> Plan:
    """Whether one plan suits all sites of a study, or plans of their own, and why; nothing is trained.

    Args:
        study: as for `run`.
        out: an empty folder to keep the plans and fingerprints in, of all sites together and of each.
        forecast: tell what every way to train would cost, with the links and machines of the study's `[forecast]`.
        watch: is told what happens.

    Raises:
        StudyError, DataError, EngineError: a study whose data are not all here, or cannot be used together.
    """
    from concilium.advice import plan as plan_sites

    return Plan(plan_sites(_study(study), None if out is None else Path(out), forecast=forecast, watch=watch))


def network(
    name: str,
    *,
    cut: str | tuple[str, str] | None = None,
    size: Sequence[int] = (256, 256),
    channels: int = 3,
    labels: int = 5,
    options: Mapping[str, Any] | None = None,
) -> NetworkSizes:
    """How large a network is, whole and cut in three: parameters and operations, counted without running it.

    Args:
        name: as in a study's `[network]` table.
        cut: `shallow`, `deep`, or the two stages after which it is cut; omitted: all cuts with a name.
        size: of the image, in 2D or 3D.
        channels: of the image.
        labels: background included.
        options: the network's own.

    Raises:
        StudyError: there is no such network or option, or it cannot be built or cut so.
    """
    from concilium.network_sizes import sizes_of

    after = (cut,) if isinstance(cut, str) else cut
    return sizes_of(name, cut=after, size=size, channels=channels, labels=labels, options=options)


def evaluate(
    predictions: str | Path,
    reference: str | Path,
    *,
    labels: str | Path | None = None,
    tolerance: float = 1.0,
    watch: Callable[[str, int, int], None] = lambda *_: None,
) -> Scores:
    """Score the label maps of a folder against references of the same names, whoever made them.

    Args:
        labels: dataset.json that names the labels; omitted: one in or beside the folders, if there is one.
        tolerance: of the surface Dice [mm, or px where the spacing is unknown].
        watch: is told each case, its number and how many there are.

    Raises:
        DataError: a folder is missing, holds no label map, or no case is in both; the dataset.json cannot be used.
    """
    from concilium.evaluation import evaluate as score_all

    names = None if labels is None else Path(labels)
    return Scores(score_all(Path(predictions), Path(reference), labels=names, tolerance=tolerance, watch=watch))


def table(
    runs: Sequence[Run | str | Path],
    *,
    format: str = "markdown",
    metrics: Sequence[str] = (),
    labels: Sequence[str] = (),
    subset: str | None = None,
    margin: float | None = None,
) -> str:
    """Models by labels and metrics with intervals and paired differences, as `latex`, `csv` or `markdown`.

    Args:
        runs: each becomes a group of columns.
        metrics: of dice, iou, hd95, nsd; omitted: dice and hd95.
        labels: omitted: all, if the runs have the same.
        subset: `test` or `validation`; omitted: test where there is one.
        margin: judge non-inferiority by it, from the end of the interval.
    """
    from concilium.reports.table import build, read_runs, to_text

    folders = [run.folder if isinstance(run, Run) else Path(run) for run in runs]
    return to_text(build(read_runs(folders), metrics=metrics, labels=labels, subset=subset, margin=margin), format)


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, or a site's own from the site's folder of a run; where it is.

    Raises:
        StudyError: the folder is neither, or what it holds is damaged.
    """
    from concilium.reports.html import write_report

    return write_report(Path(folder), out=None if out is None else Path(out))


def tensorboard(folder: str | Path) -> Path:
    """Write losses and Dice of every round, of a run or a site, as TensorBoard's event files; the folder they are in.

    Raises:
        StudyError: the folder is neither, or the extra `tensorboard` is not installed.
    """
    from concilium.reports.tensorboard import write_events

    return write_events(Path(folder))


def open_run(folder: str | Path) -> Run:
    """A run that is there already.

    Raises:
        StudyError: the folder holds none, or one without results.
    """
    found = Run(Path(folder))
    _ = found.results
    return found
