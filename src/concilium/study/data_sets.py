"""The data sets that a study names or makes, for those who look at data without running anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from concilium.data.matching import Names
from concilium.data.partition import Layout, Member, lay_out
from concilium.errors import StudyError
from concilium.messages import Holding
from concilium.study._parties import holdings, is_vertical
from concilium.study.reading import read_study
from concilium.study.tables import Study, ValidationTable


def names_of(study: Study) -> dict[str, Names]:
    """What sites, and the test set, call otherwise than the study; between hospitals each site's own settings say it."""
    if study.engine.name == "flare":
        return {}
    tables = dict(study.sites) | ({"test": study.test} if study.test else {})
    named = {name: Names(t.labels or {}, t.channels or {}, t.annotated) for name, t in tables.items()}
    return {name: found for name, found in named.items() if found != Names()}


def of_sites(study: Study) -> dict[str, Any]:
    """What a simulation is told of single sites; between hospitals, and where there is nothing to tell, nothing."""
    parts = {name: site.micro_batch for name, site in study.sites.items() if site.micro_batch is not None}
    told = {"names": names_of(study), "micro_batch": parts}
    return {key: value for key, value in told.items() if value}


@dataclass(frozen=True)
class DataSets:
    """Where data lie. `sites`: name -> folder; `names`: what a site calls otherwise than the study."""

    sites: Mapping[str, Path]
    test: Path | None = None
    folds: int = ValidationTable.folds
    names: Mapping[str, Names] = field(default_factory=dict)
    divide: Callable[[], Layout] | None = None
    """How the one data set in `sites` becomes the study's sites."""
    holds: Mapping[str, Holding] = field(default_factory=dict)
    """What each site contributes, where they have different channels of the same patients."""

    @property
    def members(self) -> dict[str, Path]:
        """All of them, the held-out one as `test`."""
        return {**self.sites, **({} if self.test is None else {"test": self.test})}


def data_sets(what: Study | Sequence[Path], test: Path | None = None) -> DataSets:
    """Those of one study, or its file, or raw folders. `test` goes before the study's own.

    Raises:
        StudyError: no such study or folder, or a study that does not say where data lie.
    """
    if isinstance(what, Study):
        return _of_study(what, test)
    if len(what) == 1 and not what[0].is_dir():
        return _of_study(read_study(what[0], check_data=False), test)
    for path in (*what, *([test] if test else [])):
        if not (path / "dataset.json").exists() and not (path / "imagesTr").exists():
            raise StudyError(
                f"{path} is no data set. Expected a folder with dataset.json and imagesTr. Correct the path."
            )
    names = [path.resolve().name for path in what]
    if len({*names, "test"}) <= len(names):  # two of one name
        names = [str(path) for path in what]
    return DataSets(dict(zip(names, what, strict=True)), test)


def _of_study(study: Study, test: Path | None) -> DataSets:
    held_out = test or (study.test.data if study.test else None)
    if study.partition is not None:
        if test and study.partition.test is not None:
            raise StudyError(
                f"--test {test} was given, and [partition] of study {study.study.name} holds out a test set of its own. "
                "Leave one of them out."
            )
        default = Path("runs") / study.study.name  # what a run there has counted need not be counted again
        return DataSets(
            {"partition": study.partition.data},
            held_out,
            study.validation.folds,
            divide=partial(divide, study, default),
        )
    sites = {name: site.data for name, site in study.sites.items() if site.data is not None}
    if not sites:
        raise StudyError(
            f"Study {study.study.name} says of no site where its data lie. Expected data = PATH. Give the raw folders."
        )
    held = holdings(study) if is_vertical(study) else {}
    return DataSets(sites, held_out, study.validation.folds, names_of(study), holds=held)


def divide(study: Study, folder: Path) -> Layout:
    """Which cases of which data set each site of a run in `folder` gets, where the study divides or shifts one; writes nothing.

    Raises:
        StudyError, DataError: the data set does not allow it.
    """
    tables = dict(study.sites) | ({"test": study.test} if study.test else {})
    members = {n: Member(t.data, t.values, t.share, t.annotated, t.shift) for n, t in tables.items()}
    return lay_out(study.partition, members, folder, seed=study.study.seed)
