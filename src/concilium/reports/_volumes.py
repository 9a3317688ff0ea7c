"""The parts of a report about volumes, and about lesions where they were counted; a private one gives means and sums alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from xml.etree.ElementTree import Element

import numpy as np

from concilium.reports import _figures as draw
from concilium.reports._cases import Place, View, patients, place_name
from concilium.reports._elements import Child, amount, e, figure, fold, number, table
from concilium.reports._found import Row
from concilium.reports._sections import kept_back, section, shown_model
from concilium.reports._units import volume_of


def volumes(view: View) -> Element | None:
    """Reference against prediction, and their mean difference with limits of agreement."""
    rows = view.of(view.models[0]) if view.models else []
    if not rows:
        return None
    labels = list(dict.fromkeys(r["label"] for r in rows))
    unit = view.volume_unit
    panels = [
        draw.scatter(
            {s: [(r["reference_volume"], r["prediction_volume"]) for r in rows if (r["label"], r["site"]) == (label, s)]
             for s in dict.fromkeys(r["site"] for r in rows)},
            title=label, x=f"reference [{unit}]", y=f"prediction [{unit}]", colours=view.colours,
        )
        for label in labels
    ] if not view.private else []  # fmt: skip
    names = list(dict.fromkeys(r["site"] for r in rows))
    caption = (
        f"Volume of each case under {shown_model(view.models[0])}. On the dashed line both are equal; above it too much was "
        "predicted. Zeros stand at the edge of a logarithmic axis."
    )
    return section(
        "Areas" if unit == "px" else "Volumes",
        figure([draw.legend(view.colours, names), e("div", panels, class_="grid")], caption) if panels else None,
        _agreement(view, rows, labels),
    )


def _agreement(view: View, rows: Sequence[Row], labels: Sequence[str]) -> Element:
    lines = []
    for label in labels:
        for place in view.places:
            of = [r for r in rows if r["label"] == label and (r["site"], r["subset"]) == place]
            if not of:
                lines += [[label, place_name(place), "kept back", None, None, None]] if place in view.kept_back else []
                continue
            if not view.enough(patients(of)):
                lines.append([label, place_name(place), f"n < {view.min_cases}", None, None, None])
                continue
            difference = [r["prediction_volume"] - r["reference_volume"] for r in of]
            mean, spread = fmean(difference), 1.96 * float(np.std(difference, ddof=1)) if len(difference) > 1 else None
            limits = f"{_signed(mean - spread)} to {_signed(mean + spread)}" if spread is not None else None
            volume = (fmean(r["reference_volume"] for r in of), fmean(r["prediction_volume"] for r in of))
            where = place_name(place) + (f" [{volume_of(view.unit_at(place))}]" if view.unit_at(place) else "")
            lines.append([label, where, *map(amount, volume), _signed(mean), limits])
    unit = view.volume_unit
    header = ["label", "where", f"reference [{unit}]", f"prediction [{unit}]", "difference", "95 % of differences"]
    note = "Means over cases; 95 % of differences: mean ± 1.96 standard deviations (Bland and Altman 1986)."
    return e("div", table(header, lines, words=2, caption="Prediction minus reference"), e("p", note, class_="note"))


def _signed(value: float) -> str:
    text = amount(value)
    return text if value < 0 else f"+{text}"


def lesions(view: View) -> Element | None:
    """Lesions found, missed and made up, where they were counted."""
    groups: dict[tuple[str, Place, str], list[Row]] = defaultdict(list)
    for model in view.models:
        for r in view.of(model):
            if r.get("lesions_found") is not None:
                groups[r["label"], (r["site"], r["subset"]), model].append(r)
    if not groups:
        return None
    lines: dict[bool, list[list[Child]]] = {True: [], False: []}
    for (label, place, model), rows in sorted(groups.items(), key=lambda g: (g[0][0], view.places.index(g[0][1]))):
        name = [label, place_name(place), shown_model(model)]
        lines[model == view.models[0]].append([*name, *_lesion_figures(view, rows)])
    header = ["label", "where", "model", "found", "missed", "false", "share found", "false per case"]
    note = "A lesion is one connected part of the reference, or of the prediction; local: the models of all sites together."
    if any(m.get("seed") != view.found.results["models"][0].get("seed") for m in view.found.results["models"]):
        note += " Counts of all seeds are added."
    return section(
        "Lesions",
        table(header, lines[True], words=3),
        e("p", note, class_="note"),
        fold("The other models", table(header, lines[False], words=3)) if lines[False] else None,
        kept_back(view, "Not counted"),
    )


def _lesion_figures(view: View, rows: Sequence[Row]) -> list[Child]:
    if not view.enough(patients(rows)):
        return [f"n < {view.min_cases}", None, None, None, None]
    found, missed, false = (sum(r.get(f"lesions_{k}") or 0 for r in rows) for k in ("found", "missed", "false"))
    share = number(found / (found + missed), 2) if found + missed else None
    return [str(found), str(missed), str(false), share, number(false / len(rows), 2)]
