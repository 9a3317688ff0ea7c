"""Answers to `Offer`, `Blind` and `Align`: which of a site's cases all parties of a vertical federation have."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concilium.alignment import blinded, hidden, order_of, secret_in
from concilium.answers import Cancelled, Check, Entry, Settings
from concilium.answers._aligned import note_aligned
from concilium.answers.new_patients import FILE as NEW_FILE
from concilium.answers.new_patients import NEW, find_new, note_new
from concilium.answers.notes import noted
from concilium.answers.statistics import Exclusions, find_cases
from concilium.data.dataset import read_case
from concilium.errors import ContractError, DataError
from concilium.messages import Align, Aligned, Blind, Blinded, Offer, Offered

OFFERED = "offered.json", "offered_new.json"
"""Which cases were shown, in that order, and which new ones: in the site's own folder."""
DIGITS = 2
"""To so many decimals [mm] two sites must agree where a case lies."""


def offer(settings: Settings, request: Offer, cancelled: Check) -> tuple[Offered, Exclusions]:
    """The site's cases that can be read, blinded; and those that cannot."""
    if request.subset == NEW:
        found, excluded = find_new(settings, request.holding.channels)
    else:
        found, excluded = find_cases(settings.data, settings.names, holding=request.holding)
    names, places = [], []
    for entry in found:
        if cancelled():
            raise Cancelled
        try:
            places.append(_place(entry))
            names.append(entry.case.name)
        except DataError as e:
            excluded[entry.key] = (e.code, str(e))
    secret = secret_in(settings.folder / "alignment.key")
    points = hidden(names, secret)
    order = order_of(points)
    _file(settings, request).write_text(json.dumps([names[i] for i in order]), encoding="utf-8")
    geometry = hidden([f"{name} {place}" for name, place in zip(names, places, strict=True)], secret)
    if request.subset == NEW:  # of these nothing is counted: they are left out, and the site can read why
        note_new(settings, request.holding, (), {key: text for key, (_, text) in excluded.items()})
        excluded = {}
    return Offered(points[order], geometry[order]), excluded


def blind(settings: Settings, request: Blind) -> Blinded:
    """Other sites' points, blinded here too.

    Raises:
        ContractError: they are no points.
    """
    secret = secret_in(settings.folder / "alignment.key")
    return Blinded(tuple(blinded(points, secret) for points in request.points))


def align(settings: Settings, request: Align) -> tuple[Aligned, Exclusions]:
    """Keep to these cases from now on; the cases that were offered and are not among them.

    Raises:
        ContractError: nothing was offered, or a row is none of it.
    """
    file = _file(settings, request)
    offered: list[str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    rows = (*request.rows, *request.apart)
    if any(not 0 <= row < len(offered) for row in rows) or len(set(rows)) < len(rows):
        raise ContractError(
            f"{len(rows)} rows are to be aligned, {len(offered)} were offered by {settings.name}. Expected each once, and of "
            "those. Start the alignment again."
        )
    chosen = sorted(offered[row] for row in request.rows)
    (member,) = settings.data
    texts = {
        "geometry_differs": ([offered[row] for row in request.apart], "it lies elsewhere in space at another party"),
        "not_everywhere": (sorted({*offered} - {offered[row] for row in rows}), "another party has no such case"),
    }
    excluded = {
        f"{member}/{name}": (code, f"Case {name}: {why}.") for code, (names, why) in texts.items() for name in names
    }
    if request.subset == NEW:
        before = noted(settings.folder, NEW_FILE)["left_out"]  # those that could not be read, which were not offered
        note_new(settings, request.holding, chosen, before | {key: text for key, (_, text) in excluded.items()})
        return Aligned(len(chosen), ()), {}
    note_aligned(settings, chosen)
    return Aligned(len(chosen), _patients(settings, request, chosen) if request.holding.labelled else ()), excluded


def _patients(settings: Settings, request: Align, names: Sequence[str]) -> tuple[int, ...]:
    """A number for the patient of each of these cases."""
    found, _ = find_cases(settings.data, settings.names, holding=request.holding)
    return patients_of(found, names)


def patients_of(found: Sequence[Entry], names: Sequence[str]) -> tuple[int, ...]:
    """A number for the patient of each of these cases, which are among those found."""
    patient = {e.case.name: e.case.patient for e in found}
    numbers = {p: i for i, p in enumerate(sorted({patient[name] for name in names}))}
    return tuple(numbers[patient[name]] for name in names)


def _place(entry: Entry) -> str:
    """Where a case lies in space: its voxels, their size, and origin and directions where the file tells them.

    Raises:
        DataError: it cannot be read.
    """
    image, _, properties = read_case(entry.case, entry.dataset)
    told: list[Any] = [image.shape[1:], properties["spacing"]]
    for kind in ("sitk_stuff", "nibabel_stuff"):
        for key, value in sorted(properties.get(kind, {}).items()):
            if key != "spacing":
                told.append(value)
    return json.dumps([_rounded(value) for value in told])


def _rounded(value: Any) -> Any:
    """Numbers to a hundredth, of any nesting."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    number = float(value)
    return round(number, DIGITS) + 0.0 if math.isfinite(number) else str(number)


def _file(settings: Settings, request: Offer | Align) -> Path:
    return settings.folder / OFFERED[request.subset == NEW]
