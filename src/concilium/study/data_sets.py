"""The data sets that a study names, for those who look at data without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from concilium.data.matching import Names
from concilium.errors import StudyError
from concilium.study.reading import read_study
from concilium.study.tables import Study, ValidationTable


def names_of(study: Study) -> dict[str, Names]:
    """What sites, and the test set, call otherwise than the study; between hospitals each site's own settings say it."""
    if study.engine.name == "flare":
        return {}
    tables = dict(study.sites) | ({"test": study.test} if study.test else {})
    return {name: Names(t.labels or {}, t.channels or {}) for name, t in tables.items() if t.labels or t.channels}


def data_sets(
    what: Study | Sequence[Path], test: Path | None = None
) -> tuple[dict[str, Path], Path | None, int, dict[str, Names]]:
    """Sites with their folders, held-out set, number of folds, and own names, of one study (or its file) or of raw folders.

    `test` goes before the study's own.

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
    return dict(zip(names, what, strict=True)), test, ValidationTable.folds, {}


def _of_study(study: Study, test: Path | None) -> tuple[dict[str, Path], Path | None, int, dict[str, Names]]:
    held_out = test or (study.test.data if study.test else None)
    if study.partition is not None and study.partition.data is not None:
        return {"partition": study.partition.data}, held_out, study.validation.folds, {}
    sites = {name: site.data for name, site in study.sites.items() if site.data is not None}
    if not sites:
        raise StudyError(
            f"Study {study.study.name} says of no site where its data lie. Expected data = PATH. Give the raw folders."
        )
    return sites, held_out, study.validation.folds, names_of(study)
