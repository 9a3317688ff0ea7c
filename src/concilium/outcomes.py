"""What the functions of `api.py` give back: a run, findings, scores; as tables, and what can be done with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concilium.errors import StudyError

if TYPE_CHECKING:  # torch and pandas take seconds to load
    import pandas

    from concilium.advice import Planned
    from concilium.data.check import Checked
    from concilium.evaluation import Evaluation


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
        self, images: str | Path, out: str | Path, *, model: str | None = None, device: str = "auto",
        precision: str | None = None, missing: Sequence[str] = (), boxes: str | Path | None = None,
        watch: Callable[[str, int, int], None] = lambda *_: None,
    ) -> list[tuple[str, str]]:  # fmt: skip
        """Write a label map for every image of a folder; the cases that could not be segmented, with the reason."""
        from concilium.predict import predict

        return predict(
            self.folder, Path(images), Path(out), model=model, device=device, precision=precision, missing=missing,
            boxes=None if boxes is None else Path(boxes), watch=watch,
        )  # fmt: skip

    def leakage(self, **asked: Any) -> dict[str, Any]:
        """Attack what this run sent, as `concilium.leakage.Asked` says; what is written into leakage.json."""
        from concilium.leakage import Asked, leakage

        return leakage(self.folder, asked=Asked(**asked))

    @property
    def report_file(self) -> Path:
        """Where `report` writes, and a run at its end."""
        return self.folder / "report.html"

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report, one HTML file that needs nothing else; where it is."""
        from concilium.reports.html import write_report

        return write_report(self.folder, out=None if out is None else Path(out))

    def tensorboard(self) -> Path:
        """Write losses and Dice of every round as event files of TensorBoard (extra `tensorboard`); the folder they are in."""
        from concilium.reports.tensorboard import write_events

        return write_events(self.folder)

    def export(
        self, out: str | Path, *, format: str, model: str | None = None, intended_use: str | None = None, fold: bool = False
    ) -> tuple[Path, str]:  # fmt: skip
        """Write a model for other programs: the folder, and the command that uses it, with what else to know below."""
        from concilium.exports import export_run

        return export_run(self.folder, Path(out), format=format, model=model, intended_use=intended_use, fold=fold)

    def _table(self, name: str) -> pandas.DataFrame:
        import pandas

        return pandas.DataFrame(self.results[name])


@dataclass(frozen=True)
class Check:
    """What `check` found. It names cases and folders: it stays where the data lie."""

    found: Checked

    @property
    def findings(self) -> pandas.DataFrame:
        """A row per finding: severity, code, site, case, text (what is wrong), fix (what to do), safe (mended in a copy)."""
        import pandas

        columns = ("severity", "code", "site", "case", "text", "fix", "safe")
        return pandas.DataFrame([[getattr(f, c) for c in columns] for f in self.found.findings], columns=columns)

    @property
    def counts(self) -> pandas.DataFrame:
        """A row per data set: its cases, and its findings of each severity."""
        import pandas

        from concilium.data.check import SEVERITIES

        return pandas.DataFrame(
            {"cases": n}
            | {f"{s}s": sum((f.site, f.severity) == (site, s) for f in self.found.findings) for s in SEVERITIES}
            for site, n in self.found.cases.items()
        ).set_axis(list(self.found.cases))

    @property
    def changes(self) -> pandas.DataFrame:
        """A row per change in the copies, where any were asked for: data set, code of the finding, case, file, text."""
        import pandas

        from concilium.data.mend import Change

        return pandas.DataFrame(map(vars, self.found.changes), columns=[f.name for f in fields(Change)])

    @property
    def exit_code(self) -> int:
        """That of the command: 0, or 3 where a finding is an error."""
        return 3 if self.found.n("error") else 0

    def write(self, file: str | Path) -> None:
        """Write all findings as JSON."""
        from concilium.reports.findings import to_json

        Path(file).write_text(to_json(self.found), encoding="utf-8")


@dataclass(frozen=True)
class Plan:
    """What `plan` found. It tells of each site's images: it stays where the data lie."""

    found: Planned

    @property
    def suits(self) -> str:
        """`one` (a plan for all sites) or `asymmetric` (some sites may gain by their own)."""
        return self.found.advice.suits

    @property
    def text(self) -> str:
        """The advice, with its reasons."""
        return self.found.advice.text

    @property
    def sites(self) -> pandas.DataFrame:
        """A row per site: its images, what the joint plan does to them, and the plan of its own. Axes are those of `axes`."""
        import pandas

        from concilium.reports.planned import rows

        return pandas.DataFrame(rows(self.found)).set_index("site")

    @property
    def axes(self) -> tuple[str, ...]:
        """The file's axes in the order of the joint plan."""
        return self.found.joint.axes

    @property
    def grounds(self) -> pandas.DataFrame:
        """A row per ground for a plan of its own: site, kind, text."""
        import pandas

        return pandas.DataFrame(map(vars, self.found.advice.grounds), columns=["site", "kind", "text"])

    @property
    def problems(self) -> tuple[str, ...]:
        """Sites that are not in it."""
        return self.found.problems

    @property
    def exit_code(self) -> int:
        """That of the command: 0, or 4 where a site is not in it."""
        return 4 if self.found.problems else 0

    def write(self, file: str | Path) -> None:
        """Write everything as JSON."""
        from concilium.reports.planned import to_json

        Path(file).write_text(to_json(self.found), encoding="utf-8")


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found."""

    found: Evaluation

    @property
    def cases(self) -> pandas.DataFrame:
        """A row per case and label, with the columns that a run's have."""
        import pandas

        return pandas.DataFrame(self.found.cases)

    @property
    def summary(self) -> pandas.DataFrame:
        """Means over patients, with 95 % intervals: a row per label and metric."""
        import pandas

        return pandas.DataFrame(self.found.summary)

    @property
    def problems(self) -> tuple[tuple[str, str], ...]:
        """Cases that are not scored, with the reason."""
        return self.found.problems

    @property
    def warnings(self) -> tuple[tuple[str, str], ...]:
        """Cases that are scored, with what should be looked at."""
        return self.found.warnings

    @property
    def exit_code(self) -> int:
        """That of the command: 0, or 4 where a case is not scored."""
        return 4 if self.problems else 0

    def write(self, file: str | Path) -> None:
        """Write everything as JSON; the cases alone, as a table, where the name ends in .csv."""
        from concilium.evaluation import write_evaluation

        write_evaluation(self.found, Path(file))
