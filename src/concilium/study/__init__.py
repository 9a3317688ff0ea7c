"""The study file: what it may say (`tables.py`), how it is read and written (`reading.py`), and its variants."""

from __future__ import annotations

from concilium.study._forecast import forecast_by
from concilium.study._parties import fronts_stay, holdings, is_vertical, parties_of, places, sites_of
from concilium.study.data_sets import DataSets, data_sets, divide, names_of, of_sites
from concilium.study.reading import RESERVED, parse_study, read_study, to_toml
from concilium.study.tables import (
    ForecastTable,
    SiteTable,
    StartTable,
    Study,
    goes_on,
    guard_of,
    least_sites,
    training_of,
    undefended,
    with_seeds,
)

__all__ = [
    "RESERVED",
    "DataSets",
    "ForecastTable",
    "SiteTable",
    "StartTable",
    "Study",
    "data_sets",
    "divide",
    "forecast_by",
    "fronts_stay",
    "goes_on",
    "guard_of",
    "holdings",
    "is_vertical",
    "least_sites",
    "names_of",
    "of_sites",
    "parse_study",
    "parties_of",
    "places",
    "read_study",
    "sites_of",
    "to_toml",
    "training_of",
    "undefended",
    "with_seeds",
]
