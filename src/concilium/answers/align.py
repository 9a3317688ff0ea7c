"""Answers to `Offer`, `Blind` and `Align`: which of a site's cases all parties of a vertical federation have."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

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
ORIGIN, RELATIVE = 0.01, 1e-4
"""To how much two sites must agree where a case lies: its origin [mm], and spacing and directions, of which that is a share."""
GRIDS = 0.31830989, 0.81830989
"""Two ways to round, half a step apart. A number that one of them rounds differently at two sites, since one file has it in
float32 and the other in decimals, is far from where the other does."""


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
            places.append(places_of(entry))
            names.append(entry.case.name)
        except DataError as e:
            excluded[entry.key] = (e.code, str(e))
    secret = secret_in(settings.folder / "alignment.key")
    points = hidden(names, secret)
    order = order_of(points)
    _file(settings, request).write_text(json.dumps([names[i] for i in order]), encoding="utf-8")
    geometry = [
        hidden([f"{n} {p[i]}" for n, p in zip(names, places, strict=True)], secret)[order] for i, _ in enumerate(GRIDS)
    ]
    if request.subset == NEW:  # of these nothing is counted: they are left out, and the site can read why
        note_new(settings, request.holding, (), {key: text for key, (_, text) in excluded.items()})
        excluded = {}
    return Offered(points[order], torch.cat(geometry)), excluded


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
    note_aligned(settings, chosen)  # those of before, where the run goes on
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


def places_of(entry: Entry) -> tuple[str, ...]:
    """Where a case lies in space, rounded in two ways: its voxels, their size, and origin and directions if the file tells them.

    Raises:
        DataError: it cannot be read.
    """
    image, _, properties = read_case(entry.case, entry.dataset)
    steps = [float(n) for n in image.shape[1:]]  # numbers, in steps of what makes a difference
    steps += [math.log(s) / RELATIVE for s in properties["spacing"]]
    told = properties.get("sitk_stuff", {})
    steps += [x / ORIGIN for x in told.get("origin", ())] + [x / RELATIVE for x in told.get("direction", ())]
    for _, affine in sorted(properties.get("nibabel_stuff", {}).items()):
        rows = np.asarray(affine, float)[:3]
        steps += [x / ORIGIN for x in rows[:, 3]] + [x / RELATIVE for x in rows[:, :3].flatten()]
    return tuple(f"{grid} {[math.floor(x + grid) if math.isfinite(x) else str(x) for x in steps]}" for grid in GRIDS)


def _file(settings: Settings, request: Offer | Align) -> Path:
    return settings.folder / OFFERED[request.subset == NEW]
