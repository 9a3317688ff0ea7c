"""The parts of a report that show single cases; in a private one they say what is left out, or give means alone."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from xml.etree.ElementTree import Element

import numpy as np

from concilium.reports import _figures as draw
from concilium.reports._cases import (
    CaseScore,
    Place,
    View,
    by_case,
    mean_of,
    patients,
    place_name,
    ranked,
    reasons,
    small_volumes,
)
from concilium.reports._elements import Child, amount, e, figure, fold, number, table
from concilium.reports._found import Row
from concilium.reports._sections import section, shown_model

N_WORST = 10
MAX_GALLERIES = 12
MAX_PICTURE_BYTES = 100_000


def withheld(view: View) -> Element | None:
    """What a private report leaves out."""
    if not view.private:
        return None
    return section(
        "Not shown here",
        e(
            "p",
            "This page is made at the server of a federation, from aggregates. It has no picture, no case, no distribution over "
            f"cases, and no value that describes fewer than {view.min_cases} patients. Each site can see its own cases: "
            "concilium report SITE_FOLDER, at the site.",
        ),
    )


def distribution(view: View) -> Element | None:
    """Box plots per site and model."""
    if view.private:
        return None
    groups: dict[Place, dict[str, list[float]]] = {p: {m: [] for m in view.models} for p in view.places}
    for model in view.models:
        for case in by_case(view.of(model)):
            if case.dice is not None:
                groups[case.place][model].append(case.dice)
    found = [v for models in groups.values() for values in models.values() for v in values]
    if not found:
        return None
    low = math.floor(min(np.percentile(found, 0.5), min(found) if min(found) > 0.5 else 1) * 10) / 10
    low = 0.0 if low < 0.3 else low
    panels = [
        draw.boxes(
            {shown_model(m): v for m, v in models.items()},
            title=f"{place_name(place)} ({max(map(len, models.values()))} cases)",
            x="Dice", low=low, high=1.0, strong=shown_model(view.models[0]),
        )
        for place, models in groups.items()
    ]  # fmt: skip
    caption = (
        "Dice of each case (mean over the labels). Box: the middle half of the cases; line: the median; whiskers: cases up to "
        "1.5 box lengths away; dots: cases beyond, at the left edge those below the axis. Fewer than 6 cases are dots alone."
    )
    return section("Spread over cases", figure(e("div", panels, class_="grid"), caption))


# ------------------------------------------------------------------------------------------------------------ pictures


def pictures(view: View) -> Element | None:
    """Worst, median and best case of the study's own model, for the test set and every site."""
    if view.private or not view.models:
        return None
    groups: dict[Place, list[CaseScore]] = defaultdict(list)
    for case in ranked(by_case(view.of(view.models[0]))):
        if _image(view, case) is not None:
            groups[case.place].append(case)
    galleries = []
    for place in [p for p in view.places if p in groups][:MAX_GALLERIES]:
        cases = groups[place]
        picks = {"worst": cases[0], "median": cases[len(cases) // 2], "best": cases[-1]}
        distinct = {c.case: (word, c) for word, c in picks.items()}
        shown = [_shown(view, case, f"{word}: ") for word, case in distinct.values()]
        galleries.append(e("div", e("h3", place_name(place)), e("div", shown, class_="trio"), class_="gallery"))
    if not galleries:
        return None
    n_hidden = len(groups) - len(galleries)
    return section(
        "Cases in pictures",
        e(
            "p",
            f"Cases of {shown_model(view.models[0])}, each in the slice with the most wrong voxels. ",
            e("span", _key(view)),
        ),
        galleries,
        e("p", f"{n_hidden} more sites have pictures of their own.", class_="note") if n_hidden else None,
    )


def _key(view: View) -> Child:
    """What the colours of the outlines mean."""

    def swatch(colour: str) -> Element:
        return e("i", style=f"background:{colour if len(colour) == 7 else '#888888'}")

    several = len(view.found.colours) > 1
    shown = [
        e("span", f"{label}: " if several else None, swatch(reference), "reference", swatch(prediction), "prediction")
        for label, (reference, prediction) in view.found.colours.items()
    ]
    return e("span", shown, e("span", swatch("#ffffff"), "both"), class_="legend key")


def by_label(case: CaseScore) -> list[str]:
    """Dice of each label, the mean over models that scored the case (seeds, folds)."""
    labels = dict.fromkeys(r["label"] for r in case.rows)
    return [f"{x} {number(mean_of([r['dice'] for r in case.rows if r['label'] == x]), 2)}" for x in labels]


def _shown(view: View, case: CaseScore, word: str = "") -> Element:
    source = _image(view, case)
    title = f"{word}Dice {number(case.dice, 2)}"
    parts = by_label(case) if len({r["label"] for r in case.rows}) > 1 else []
    alt = f"Case {case.case} with reference and prediction in outline; Dice {number(case.dice, 2)}"
    image = e("img", src=source, alt=alt, loading="lazy") if source else e("p", "no picture", class_="none")
    caption = [e("strong", title), e("span", case.case, class_="case"), e("span", ", ".join(parts)) if parts else None]
    return e("figure", image, e("figcaption", caption))


def _image(view: View, case: CaseScore) -> str | None:
    """The site's picture of a case, as text for the page; `None` where there is none that can be shown."""
    for row in case.rows:
        known = view.found.picture(row)
        if known is None or known.path is None or not known.path.resolve().is_relative_to(view.found.folder.resolve()):
            continue
        try:
            content = known.path.read_bytes()
        except OSError:
            continue
        if content.startswith(b"\x89PNG") and len(content) <= MAX_PICTURE_BYTES:
            return "data:image/png;base64," + base64.b64encode(content).decode()
    return None


def worst(view: View) -> Element | None:
    """The cases of lowest Dice of the study's own model, with what is known of why."""
    if view.private or not view.models:
        return None
    rows = view.of(view.models[0])
    cases = ranked(by_case(rows))[:N_WORST]
    if not cases:
        return None
    small = small_volumes(rows)
    entries = []
    for case in cases:
        told = reasons(case, view, small) or ["no reason known"]
        where = e("p", f"{place_name(case.place)}: ", "; ".join(told), class_="why")
        entries.append(e("div", _shown(view, case), where, class_="entry"))
    text = (
        f"The {len(cases)} cases with the lowest Dice of {shown_model(view.models[0])}. Reasons looked for: nothing predicted, "
        "nothing to be found, a structure below the 5th percentile of its site's volumes (where a site has 20 or more), and "
        "spacing or intensity outside the federation's."
    )
    return section("The worst cases", e("p", text), e("div", entries, class_="worst"))


# ------------------------------------------------------------------------------------------------- volumes and lesions


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
        "Volumes" if unit == "ml" else "Areas",
        figure([draw.legend(view.colours, names), e("div", panels, class_="grid")], caption) if panels else None,
        _agreement(view, rows, labels),
    )


def _agreement(view: View, rows: Sequence[Row], labels: Sequence[str]) -> Element:
    lines = []
    for label in labels:
        for place in view.places:
            of = [r for r in rows if r["label"] == label and (r["site"], r["subset"]) == place]
            if not of:
                continue
            if not view.enough(patients(of)):
                lines.append([label, place_name(place), f"n < {view.min_cases}", None, None, None])
                continue
            difference = [r["prediction_volume"] - r["reference_volume"] for r in of]
            mean, spread = fmean(difference), 1.96 * float(np.std(difference, ddof=1)) if len(difference) > 1 else None
            limits = f"{_signed(mean - spread)} to {_signed(mean + spread)}" if spread is not None else None
            volume = (fmean(r["reference_volume"] for r in of), fmean(r["prediction_volume"] for r in of))
            lines.append([label, place_name(place), *map(amount, volume), _signed(mean), limits])
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
    )


def _lesion_figures(view: View, rows: Sequence[Row]) -> list[Child]:
    if not view.enough(patients(rows)):
        return [f"n < {view.min_cases}", None, None, None, None]
    found, missed, false = (sum(r.get(f"lesions_{k}") or 0 for r in rows) for k in ("found", "missed", "false"))
    share = number(found / (found + missed), 2) if found + missed else None
    return [str(found), str(missed), str(false), share, number(false / len(rows), 2)]


def case_list(view: View) -> Element | None:
    """At a site: every case of the study's own model, by name."""
    if view.found.site is None or view.private or not view.models:
        return None
    lines = [
        [c.case, place_name(c.place), number(c.dice), ", ".join(by_label(c))]
        for c in ranked(by_case(view.of(view.models[0])))
    ]
    return section(
        "All cases", fold("From the worst to the best", table(["case", "where", "Dice", "by label"], lines, words=2))
    )
