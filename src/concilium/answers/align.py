"""Answers to `Offer`, `Blind` and `Align`: which of a site's cases all parties of a vertical federation have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from concilium.alignment import blinded, hidden, order_of, secret_in
from concilium.answers import Cancelled, Check, Entry, Settings
from concilium.answers._aligned import Shown, failed, note_aligned, note_shown, shown_before
from concilium.answers._noted import note, noted
from concilium.answers.new_patients import FILE as NEW_FILE
from concilium.answers.new_patients import NEW, find_new, note_new
from concilium.answers.statistics import Exclusions, find_cases
from concilium.data.dataset import read_case
from concilium.errors import ContractError, DataError
from concilium.messages import Align, Aligned, Blind, Blinded, Offer, Offered

ORIGIN, RELATIVE = 0.01, 1e-4
"""To how much two sites must agree where a case lies: its origin [mm], and spacing and directions, of which that is a share."""
GRIDS = 0.31830989, 0.81830989
"""Two ways to round, half a step apart. A number that one of them rounds differently at two sites, since one file has it in
float32 and the other in decimals, is far from where the other does."""


def offer(settings: Settings, request: Offer, cancelled: Check) -> tuple[Offered, Exclusions]:
    """The site's cases, blinded; and those of them that cannot be read, or could not be prepared. New ones it then does not show.

    Raises:
        DataError: the data set cannot be used.
    """
    new = request.subset == NEW
    if new:
        found, excluded = find_new(settings, request.holding.channels)
    else:
        found, excluded = find_cases(settings.data, settings.names, holding=request.holding)
    places: dict[str, tuple[str, ...]] = {}
    for entry in found:
        if cancelled():
            raise Cancelled
        try:
            places[entry.case.name] = places_of(entry)
        except DataError as e:
            excluded[entry.key] = (e.code, str(e))
    lost = {} if new else _lost(settings, request, excluded)
    names = [*(name for name in places if name not in lost), *lost]
    secret = secret_in(settings.folder / "alignment.key")
    points = hidden(names, secret)
    order = order_of(points)
    note_shown(settings, Shown(tuple(names[i] for i in order), lost, request.begins), new=new)
    lying = [[f"{n} lost {i}" if n in lost else f"{n} {places[n][i]}" for n in names] for i, _ in enumerate(GRIDS)]
    geometry = [hidden(texts, secret)[order] for texts in lying]
    unusable = tuple(row for row, i in enumerate(order) if names[i] in lost)
    if new:  # of these nothing is counted: they are left out, and the site can read why
        note_new(settings, request.holding, (), {key: text for key, (_, text) in excluded.items()})
        return Offered(points[order], torch.cat(geometry)), {}
    if request.begins:  # what an attempt before set aside may be mended
        note(settings.folder, "excluded.json", {})
    (member,) = settings.data
    return Offered(points[order], torch.cat(geometry), unusable), excluded | {
        f"{member}/{n}": r for n, r in lost.items()
    }


def _lost(settings: Settings, request: Offer, excluded: Exclusions) -> dict[str, tuple[str, str]]:
    """The cases that this site cannot use: as they are now, or once training began as they were then, whatever was mended."""
    if not request.begins:
        return shown_before(settings, new=False).lost
    return failed(settings) | {key.partition("/")[2]: reason for key, reason in excluded.items()}


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
    shown = shown_before(settings, new=request.subset == NEW)
    offered = shown.names
    rows = (*request.rows, *request.apart, *request.lost)
    if any(not 0 <= row < len(offered) for row in rows) or len(set(rows)) < len(rows):
        raise ContractError(
            f"{len(rows)} rows are to be aligned, {len(offered)} were offered by {settings.name}. Expected each once, and of "
            "those. Start the alignment again."
        )
    chosen = [offered[row] for row in request.rows]
    (member,) = settings.data
    mine = shown.lost.keys()  # of which the reason is noted
    texts = {
        "unusable_elsewhere": ([offered[row] for row in request.lost], "another party cannot use it"),
        "geometry_differs": ([offered[row] for row in request.apart], "it lies elsewhere in space at another party"),
        "not_everywhere": (sorted({*offered} - {offered[row] for row in rows}), "another party has no such case"),
    }
    excluded = {
        f"{member}/{name}": (code, f"Case {name}: {why}.")
        for code, (names, why) in texts.items()
        for name in names
        if name not in mine
    }
    if request.subset == NEW:
        before = noted(settings.folder, NEW_FILE)["left_out"]  # those that could not be read, which were not offered
        note_new(settings, request.holding, chosen, before | {key: text for key, (_, text) in excluded.items()})
        return Aligned(len(chosen), ()), {}
    chosen = sorted(chosen)  # the order of every party, whatever else changes
    note_aligned(settings, chosen, begins=shown.begins)  # those of before, where the run goes on
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
