"""Concilium from Python: run a study, look at what came out as tables, use the models. The commands are thin calls of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concilium.errors import StudyError

if TYPE_CHECKING:  # torch and pandas take seconds to load
    import pandas

    from concilium.data.check import Checked
    from concilium.preparation import Event
    from concilium.study import Study


@dataclass(frozen=True)
class Run:
    """A run folder.

    Raises:
        StudyError: it is none.
    """

    folder: Path
    _read: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (self.folder / "study.toml").is_file():
            raise StudyError(f"{self.folder} is no run folder: it has no study.toml. Give the folder that a run wrote.")

    @property
    def results(self) -> dict[str, Any]:
        """results.json, as it is (its schema: results.schema.json of the package); the same object until the file changes.

        Raises:
            StudyError: there is none.
        """
        import json

        path = self.folder / "results.json"
        try:
            state = path.stat()
        except FileNotFoundError as e:
            raise StudyError(
                f"{self.folder} has no results.json: the run did not come to its end. Go on with it, by the command that began "
                "it and --resume."
            ) from e
        key = state.st_mtime_ns, state.st_size
        if key not in self._read:
            self._read.clear()
            self._read[key] = json.loads(path.read_text(encoding="utf-8"))
        return self._read[key]

    @property
    def complete(self) -> bool:
        """Whether everything was done as asked; `problems` says what was not."""
        return bool(self.results["complete"])

    @property
    def exit_code(self) -> int:
        """That of the command: 0, or 4 where something was not as asked."""
        return 0 if self.complete else 4

    @property
    def problems(self) -> tuple[str, ...]:
        """What was not as asked."""
        return tuple(self.results["problems"])

    @property
    def models(self) -> tuple[str, ...]:
        """The models that `predict` and `export` take."""
        from concilium.finished import finished_models

        return finished_models(self.folder)

    @property
    def cases(self) -> pandas.DataFrame:
        """Every score: a row per model, seed, case and label."""
        return self._table("cases")

    @property
    def summary(self) -> pandas.DataFrame:
        """Means over patients, with 95 % intervals: a row per model, site, subset, label and metric."""
        return self._table("summary")

    @property
    def comparisons(self) -> pandas.DataFrame:
        """Paired differences between every two models."""
        return self._table("comparisons")

    @property
    def rounds(self) -> pandas.DataFrame:
        """What every round took and told: a row per model, round and site that answered."""
        import json

        import pandas

        lines = [json.loads(line) for line in (self.folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
        return pandas.DataFrame(
            {"model": line["model"], "round": line["round"], "site": site, **took}
            for line in lines
            for site, took in line["sites"].items()
        )

    def predict(
        self,
        images: str | Path,
        out: str | Path,
        *,
        model: str | None = None,
        device: str = "auto",
        precision: str | None = None,
        watch: Callable[[str, int, int], None] = lambda *_: None,
    ) -> list[tuple[str, str]]:
        """Write a label map for every image of a folder; the cases that could not be segmented, with the reason."""
        from concilium.predict import predict

        return predict(
            self.folder, Path(images), Path(out), model=model, device=device, precision=precision, watch=watch
        )

    @property
    def report_file(self) -> Path:
        """Where `report` writes, and a run at its end."""
        return self.folder / "report.html"

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report, one HTML file that needs nothing else; where it is."""
        from concilium.reports.html import write_report

        return write_report(self.folder, out=None if out is None else Path(out))

    def export(
        self, out: str | Path, *, format: str, model: str | None = None, intended_use: str | None = None
    ) -> tuple[Path, str]:
        """Write a model for other programs: the folder, and the command that uses it next."""
        from concilium.exports import export_run

        return export_run(self.folder, Path(out), format=format, model=model, intended_use=intended_use)

    def _table(self, name: str) -> pandas.DataFrame:
        import pandas

        return pandas.DataFrame(self.results[name])


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
    from concilium.study import parse_study, read_study, with_seeds

    if isinstance(study, str | Path):
        study = read_study(Path(study))
    elif isinstance(study, Mapping):
        study = parse_study(study, folder=Path.cwd())
    study = with_seeds(study, seeds)
    folder = Path("runs") / study.study.name if out is None else Path(out)
    return reported(run_study(study, folder, resume=resume, watch=watch).folder, watch)


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
    what: str | Path | Sequence[str | Path],
    *,
    test: str | Path | None = None,
    fix: str | Path | None = None,
    watch: Callable[[int, int, str], None] = lambda done, total, case: None,
) -> Checked:
    """Everything that is wrong with the data of a study, or of nnU-Net raw folders, as findings, the gravest first.

    Args:
        test: a held-out set beside raw folders.
        fix: a folder for copies of the data sets, in which what can be mended safely is; its FIXES.txt says what.
        watch: is told the number of cases done, of how many, and the next.

    Raises:
        StudyError: no such study or data set, or `fix` is not empty.
    """
    from dataclasses import replace

    from concilium.data.check import check as check_data
    from concilium.data.mend import check_free, mend
    from concilium.study import data_sets

    paths = [Path(what)] if isinstance(what, str | Path) else [Path(w) for w in what]
    data = data_sets(paths, None if test is None else Path(test))
    if fix is not None:
        check_free(Path(fix), data.members)
    checked = check_data(
        data.sites, test=data.test, folds=data.folds, names=data.names, divide=data.divide, watch=watch
    )
    return checked if fix is None else replace(checked, changes=mend(data.members, checked.findings, Path(fix)))


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


def open_run(folder: str | Path) -> Run:
    """A run that is there already.

    Raises:
        StudyError: the folder holds none, or one without results.
    """
    found = Run(Path(folder))
    _ = found.results
    return found
