"""A site's own audit, before anything is sent: the study as it would run with this site alone, here, with no connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from concilium.deployment.kits import SiteSettings, read_site
from concilium.deployment.party import party_alone
from concilium.errors import StudyError
from concilium.study import SiteTable, Study, is_vertical

OWN = "own"
"""What the site is called in its own audit."""


def study_at_site(study: Study, settings: Path) -> Study:
    """The study with the site of this `site.toml` as its only one, in a simulation; `test` there is whose cases an attacker has.

    Raises:
        StudyError: the settings are not allowed, or the protocol needs others.
    """
    site = read_site(settings)
    engine = replace(study.engine, name="simulation", workers=1, threads=site.threads, device=site.device)  # type: ignore[arg-type]
    if is_vertical(study):
        cases = settings.parent / "leakage" / f"{study.study.name}.cases"
        return replace(party_alone(study, site, cases), engine=engine)
    if study.protocol.name not in ("federated", "splitfed"):
        raise StudyError(
            f"[protocol] name = {study.protocol.name!r} cannot be audited at a site alone. Allowed: federated, splitfed, "
            "vertical. Audit it in a simulation."
        )
    options = {key: value for key, value in study.protocol.options.items() if key not in ("participation", "cohorts")}
    defaults: Mapping[str, object] = {"participation": 1.0, "cohorts": ()}
    options |= {key: value for key, value in defaults.items() if key in study.protocol.options}
    return replace(
        study,
        sites={OWN: _table(site, site.data)},
        test=None if site.test is None else SiteTable(data=site.test),
        partition=None,
        start=replace(study.start, weights=site.weights) if study.start.weights and site.weights else study.start,
        protocol=replace(study.protocol, compare=(), min_sites=1, options=options),
        engine=engine,
        variants={},
    )


def _table(site: SiteSettings, data: Path) -> SiteTable:
    return SiteTable(
        data=data,
        annotated=site.annotated,
        labels=site.label_names,
        channels=site.channel_names,
        micro_batch=site.micro_batch,
    )
