"""What a site writes down for its own eyes: files in its folder that never leave it."""

from __future__ import annotations

import json

from concilium.answers import Entry, Settings
from concilium.answers._noted import note, noted
from concilium.answers.statistics import Exclusions, find_cases
from concilium.messages import Holding, Prepare


def note_cases(settings: Settings, excluded: Exclusions, holding: Holding | None) -> None:
    """Write which number stands for which case, and what was set aside and why; of a party, beside what alignment left out."""
    found: dict[str, tuple[Entry, ...]] = {
        member: find_cases({member: folder}, settings.names, holding=holding)[0]
        for member, folder in settings.data.items()
    }
    if settings.test:
        found["test"] = find_cases({"test": settings.test}, settings.names)[0]
    cases = {
        m: [
            {"number": e.number, "case": e.case.name, "patient": e.case.patient, "patient_number": e.patient}
            for e in es
        ]
        for m, es in found.items()
    }
    note(settings.folder, "cases.json", cases)
    before = {} if holding is None else noted(settings.folder, "excluded.json")
    note(settings.folder, "excluded.json", before | {case: list(reason) for case, reason in excluded.items()})


def note_excluded(settings: Settings, excluded: Exclusions) -> None:
    """Add cases to those that were set aside."""
    if excluded:
        more = {case: list(reason) for case, reason in excluded.items()}
        note(settings.folder, "excluded.json", {**noted(settings.folder, "excluded.json"), **more})


def note_plan(settings: Settings, request: Prepare) -> None:
    """Write the plan; the first is the study's own, later ones may be those of variants."""
    if not noted(settings.folder, "plan.json"):
        note(settings.folder, "plan.json", json.loads(request.plans))
