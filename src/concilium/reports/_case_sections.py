"""The parts of a report that show single cases; in a private one they say what is left out, or give means alone."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from xml.etree.ElementTree import Element

import numpy as np

from concilium.reports import _figures as draw
from concilium.reports._cases import (
    CaseScore,
    Place,
    View,
    by_case,
    mean_of,
    place_name,
    ranked,
    reasons,
    small_volumes,
)
from concilium.reports._elements import Child, e, figure, fold, number, table
from concilium.reports._sections import kept_back, section, shown_model

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
            "This page is made at the server of a federation, from aggregates. It has no picture, no case, no "
            "distribution over "
            f"cases, and no value that describes fewer than {view.min_cases} patients, or lets one be computed. Each site can "
            "see its own cases: concilium report SITE_FOLDER, at the site.",
        ),
        kept_back(view, "Volumes and lesions are of the other sites"),
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
        if place not in view.kept_back
    ]  # fmt: skip
    caption = (
        "Dice of each case (mean over the labels). Box: the middle half of the cases; line: the median; whiskers: cases up to "
        "1.5 box lengths away; dots: cases beyond, at the left edge those below the axis. Fewer than 6 cases are dots alone."
    )
    left_out = kept_back(view, "Not in these figures")
    return section("Spread over cases", figure(e("div", panels, class_="grid"), caption), left_out)


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
    text = f"The {len(cases)} cases with the lowest Dice of {shown_model(view.models[0])}. {_looked_for(view)}"
    return section(
        "The worst cases", e("p", text), e("div", entries, class_="worst"), kept_back(view, "Not among these cases")
    )


def _looked_for(view: View) -> str:
    """The reasons that can be found: a site knows the plan, whose intensities are the federation's, and not its spacings."""
    known = {
        "spacing": view.found.fingerprint.get("geometry"),
        "intensity": view.found.plans.get("foreground_intensity_properties_per_channel"),
    }
    looked_for = [
        "nothing predicted",
        "nothing to be found",
        "a structure below the 5th percentile of its site's volumes (where a site has 20 or more)",
        *(f"{what} outside the federation's" for what, there in known.items() if there),
    ]
    return f"Reasons looked for: {', '.join(looked_for[:-1])}, and {looked_for[-1]}."


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
