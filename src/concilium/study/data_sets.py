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
    named = {name: Names(t.labels or {}, t.channels or {}, t.annotated) for name, t in tables.items()}
    return {name: found for name, found in named.items() if found != Names()}


def data_sets(
    what: Sequence[Path], test: Path | None = None
) -> tuple[dict[str, Path], Path | None, int, dict[str, Names]]:
    """Sites with their folders, held-out set, number of folds, and own names, of one study file or of raw folders.

    `test` goes before the study's own.

    Raises:
        StudyError: no such study or folder, or a study that does not say where data lie.
    """
    if len(what) == 1 and not what[0].is_dir():
        study = read_study(what[0], check_data=False)
        if study.partition is not None and study.partition.data is not None:
            return (
                {"partition": study.partition.data},
                test or (study.test.data if study.test else None),
                study.validation.folds,
                {},
            )
        sites = {name: site.data for name, site in study.sites.items() if site.data is not None}
        if not sites:
            raise StudyError(
                f"{what[0]} says of no site where its data lie. Expected data = PATH. Give the raw folders."
            )
        held_out = test or (study.test.data if study.test else None)
        return sites, held_out, study.validation.folds, names_of(study)
    for path in (*what, *([test] if test else [])):
        if not (path / "dataset.json").exists() and not (path / "imagesTr").exists():
            raise StudyError(
                f"{path} is no data set. Expected a folder with dataset.json and imagesTr. Correct the path."
            )
    names = [path.resolve().name for path in what]
    if len({*names, "test"}) <= len(names):  # two of one name
        names = [str(path) for path in what]
    return dict(zip(names, what, strict=True)), test, ValidationTable.folds, {}
