"""Links and machines that a command line tells, in place of the study's."""

from __future__ import annotations

import dataclasses

from concilium.errors import StudyError
from concilium.study.reading import _table
from concilium.study.tables import ForecastTable, Study


def forecast_by(study: Study, **given: float | None) -> Study:
    """The study with these values of `[forecast]`, but for those that are `None`.

    Raises:
        StudyError: one is not allowed.
    """
    changed = {key: value for key, value in given.items() if value is not None}
    if not changed:
        return study
    problems: list[str] = []
    table = _table(ForecastTable, {**_plain(study.forecast or ForecastTable()), **changed}, "[forecast]", problems)
    if table is None:
        raise StudyError(f"What was given for [forecast] cannot be taken. {' '.join(problems)} Correct it.")
    return dataclasses.replace(study, forecast=table)


def _plain(table: ForecastTable) -> dict[str, float]:
    return {key: value for key, value in dataclasses.asdict(table).items() if value is not None}
