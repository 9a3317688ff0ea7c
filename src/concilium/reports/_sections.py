"""The parts of a report made of aggregates: what came out, how the models compare, how they learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TypeAlias
from xml.etree.ElementTree import Element

from concilium.reports import SHARES, TITLES
from concilium.reports import _figures as draw
from concilium.reports._cases import Place, View, at, base, names_of, place_name
from concilium.reports._elements import Child, e, figure, fold, number, p_value, signed, table
from concilium.reports._found import Row
from concilium.reports._guarded import undefined
from concilium.statistics import FOREGROUND_MEAN, MIN_PATIENTS

Lines: TypeAlias = "dict[str, dict[str, list[tuple[float, float]]]]"
"""Model -> site -> (round, value)."""


def section(title: str, *content: Child) -> Element:
    """A part of the report with its heading."""
    return e("section", e("h2", title), *content, id=slug(title))


def kept_back(view: View, what: str) -> Element | None:
    """The sites whose cases are not in a part of the report."""
    if not view.kept_back:
        return None
    return e("p", f"{what}: scores of single cases are kept back at {names_of(view.kept_back)}.", class_="note")


def slug(title: str) -> str:
    """The title as the name of a place in the page."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def shown_model(name: str) -> str:
    """The name of a model for people."""
    return name.replace("_", " ")


def label_name(label: str) -> str:
    """The name of a label for people."""
    return "mean over the labels" if label == FOREGROUND_MEAN else label


# ------------------------------------------------------------------------------------------------------------- results


def overall_label(view: View) -> str:
    """The label that stands for all: the mean over them, or the only one."""
    labels = list(dict.fromkeys(s["label"] for s in view.results["summary"]))
    return FOREGROUND_MEAN if FOREGROUND_MEAN in labels or not labels else labels[0]


def cell(view: View, place: Place, model: str, metric: str, label: str) -> Row | None:
    """The row of the summary; `None` where there is none. It has no mean where nothing is defined, or may be shown.

    Of the models `NAME:SITE` that summary of them together; where results have none, their mean without interval.
    """
    model = at(model, place)
    rows = [
        s
        for s in view.results["summary"]
        if (s["site"], s["subset"]) == place and base(s["model"]) == model and (s["metric"], s["label"]) == (metric, label)
    ]  # fmt: skip
    rows = [s for s in rows if s["model"] == model] or rows
    told = [s for s in rows if s["mean"] is not None]
    if len(told) < 2:
        return next(iter(told or rows), None)
    return {
        **told[0],
        "mean": fmean(s["mean"] for s in told),
        "ci_low": None,
        "ci_high": None,
        "n": min(s["n"] for s in told),
    }


def results(view: View) -> Element:
    """Model × site for Dice; the other metrics and single labels folded."""
    label = overall_label(view)
    labels = list(dict.fromkeys(s["label"] for s in view.results["summary"] if s["label"] != label))
    more = [_matrix(view, m, label) for m in TITLES if m != "dice"]
    single = [_matrix(view, m, one) for one in labels for m in ("dice", "hd95")]
    return section(
        "Results",
        _matrix(view, "dice", label),
        e("ul", [e("li", note) for note in _notes(view)], class_="note"),
        fold("Other metrics", more),
        fold("Each label by itself", single) if single else None,
    )


def _notes(view: View) -> Iterator[str]:
    """What the cells mean."""
    rows: Sequence[Row] = view.results["summary"]
    yield f"A cell: mean over patients, with its 95 % interval where there are {MIN_PATIENTS} patients or more."
    if any(subset == "unseen" for _, subset in view.places):
        yield "Unseen cases: all cases of the site, by the model that was trained without it."
    own = dict.fromkeys(base(s["model"]) for s in rows if ":" in s["model"])
    if "local" in own:
        yield "local: the model each site trained alone; on the test set, the mean over these models."
    for name in (name for name in own if name != "local"):
        yield f"{shown_model(name)}: the model each site trained of its own; on the test set, the mean over these models."
    if any(undefined(s) for s in rows):
        yield "Undefined: scores of single cases and labels that are in no mean, such as the distance to what was not found."
    if view.kept_back:
        yield (
            f"{names_of(view.kept_back)}: scores of single cases are kept back, so intervals are Student's; means over "
            "all sites "
            "have none."
        )
    if " or " in view.unit:
        yield "px: where files tell no spacing; a mean over sites of both kinds has no unit."
    if any(s.get("hidden", "").startswith("n <") for s in rows):
        yield f"“n\N{NO-BREAK SPACE}<\N{NO-BREAK SPACE}{view.min_cases}”: too few patients to be shown."
    if any(s.get("hidden") == "not shown" for s in rows):
        yield "Means over all sites are not shown where those of the few patients that are hidden would follow from them."


def _matrix(view: View, metric: str, label: str) -> Element:
    digits = 1 if metric == "hd95" else 3
    rows: list[list[Child]] = []
    for place in (*view.places, *view.pools):
        found = [cell(view, place, model, metric, label) for model in view.models]
        counts = sorted({c["n"] for c in found if c and c["mean"] is not None})
        n = f"n = {'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}" if counts else ""
        own = view.unit_at(place) if metric == "hd95" else ""
        name = e("span", place_name(place), e("small", ", ".join(filter(None, (n, own)))))
        rows.append([name, *(_cell_text(view, place, model, metric, label, digits) for model in view.models)])
    unit = f" [{view.unit}]" if metric == "hd95" else ""
    better = "higher" if metric in SHARES else "lower"
    caption = f"{TITLES[metric]}{unit}, {label_name(label)} ({better} is better)"
    return table(["", *(shown_model(m) for m in view.models)], rows, caption=caption)


def _cell_text(view: View, place: Place, model: str, metric: str, label: str, digits: int) -> Child:
    found = cell(view, place, model, metric, label)
    if found is None:
        return None
    if found["mean"] is None:
        return found.get("hidden") or undefined(found) or None
    low, high = found["ci_low"], found["ci_high"]
    return [
        number(found["mean"], digits),
        e("small", f"[{number(low, digits)}, {number(high, digits)}]") if low is not None else None,
        e("small", undefined(found)) if undefined(found) else None,
    ]


# --------------------------------------------------------------------------------------------------------- comparisons


def comparisons(view: View) -> Element | None:
    """Paired differences in words."""
    found: Sequence[Row] = view.results["comparisons"]
    hidden = len(view.found.results["comparisons"]) - len(found)
    if not found:
        return None
    main = [c for c in found if c["label"] == overall_label(view) and c["metric"] == "dice"]
    rest = [c for c in found if c not in main]
    note = (
        "Paired over the same patients; 95 % interval; p-values after Holm's correction. “No difference shown” does not mean "
        "that there is none: the interval says how large it may still be."
    )
    if hidden:
        note += f" {hidden} are not shown: they describe fewer than {view.min_cases} patients, or would give away what does."
    return section(
        "Comparisons",
        _differences(main or found),
        e("p", note, class_="note"),
        fold("Other metrics and labels", _differences(rest)) if main and rest else None,
    )


def _differences(found: Sequence[Row]) -> Element:
    rows: list[list[Child]] = []
    for c in found:
        digits = 1 if c["metric"] == "hd95" else 3
        where = [str(c[k]) for k in ("subset", "site") if c.get(k)]
        interval = (
            f" [{signed(c['ci_low'], digits)}, {signed(c['ci_high'], digits)}]" if c.get("ci_low") is not None else ""
        )
        rows.append([
            f"{shown_model(c['a'])} minus {shown_model(c['b'])}",
            ", ".join(dict.fromkeys([TITLES.get(c["metric"], str(c["metric"])), label_name(c["label"]), *where])),
            f"{signed(c['difference'], digits)}{interval}",
            p_value(c.get("p_holm")),
            str(c["n"]),
            _reading(c),
        ])  # fmt: skip
    header = ["comparison", "of", "difference [95 % interval]", "p (Holm)", "patients", "in words"]
    return e("div", table(header, rows, words=2), class_="words-last")


def _reading(c: Row) -> str:
    if c["difference"] is None or c.get("ci_low") is None:
        return "too few patients to say"
    if c["ci_low"] <= 0 <= c["ci_high"] or (c.get("p_holm") or 0) >= 0.05:
        return "no difference shown"
    a_better = (c["difference"] > 0) == (c["metric"] in SHARES)
    return f"{shown_model(c['a'] if a_better else c['b'])} is better"


# -------------------------------------------------------------------------------------------------------------- curves


def curves(view: View) -> Element | None:
    """Training loss, and Dice on validation cases where it was measured, per round and site."""
    parts = [
        _panels(
            view, _of_all(losses(view)), "loss", "Training loss of each round, mean over its steps; lower is better."
        ),
        _panels(view, _of_all(dice(view)), "Dice", f"Dice on validation cases after each round; {_use(view)}."),
    ]
    if not any(p is not None for p in parts):
        return None
    hidden = f"Sites with fewer than {view.min_cases} cases are left out." if view.private else None
    return section("Learning", *parts, e("p", hidden, class_="note") if hidden else None)


def _use(view: View) -> str:
    """What became of the curves."""
    if view.found.study.get("validation", {}).get("select") != "best":
        return "shown, never used to choose one"
    return "each model ends with the weights of the round that was best over the sites that train"


def losses(view: View) -> Lines:
    """Training losses, of sites that have enough training cases."""
    return _lines([
        (line["model"], site, line["round"], s["loss"])
        for line in view.found.rounds
        for site, s in line["sites"].items()
        if view.enough(s.get("n_cases", 0))
    ])  # fmt: skip


def dice(view: View) -> Lines:
    """Dice on validation cases, the mean over the labels, of sites that have enough of them."""
    rows = [s for s in view.found.results["summary"] if s["subset"] == "validation"]
    n = {site: min(s["n"] for s in rows if s["site"] == site) for site in {s["site"] for s in rows}}
    found = [c for c in view.found.curves if view.enough(n.get(c["site"], 0)) and c.get("dice") is not None]
    label = overall_label(view)
    kept = [c for c in found if c.get("label", label) == label] or found
    return _lines([(c["model"], c["site"], c["round"], c["dice"]) for c in kept])


def _lines(points: Sequence[tuple[str, str, int, float | None]]) -> Lines:
    """Model -> site -> points; several of one round (of labels or seeds) become their mean."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for model, site, number_, value in points:
        if value is not None:
            found.setdefault(model, {}).setdefault(site, {}).setdefault(number_, []).append(value)
    return {
        model: {site: [(float(r), fmean(v)) for r, v in sorted(rounds.items())] for site, rounds in sites.items()}
        for model, sites in found.items()
    }


def _of_all(lines: Lines) -> Lines:
    """The mean over seeds and folds, which end a model's name in `rounds.jsonl` and `curves.jsonl`: `federated.s8.f0`."""
    return _lines([
        (model.partition(".")[0], site, int(x), y)
        for model, sites in lines.items()
        for site, points in sites.items()
        for x, y in points
    ])  # fmt: skip


def _panels(view: View, lines: Lines, what: str, caption: str) -> Element | None:
    span = [p for sites in lines.values() for points in sites.values() for p in points]
    if not span:
        return None
    panels = [
        draw.curves(sites, title=shown_model(model), x="round", y=what, colours=view.colours, span=span)
        for model, sites in lines.items()
    ]
    names = list(dict.fromkeys(site for sites in lines.values() for site in sites))
    return figure([draw.legend(view.colours, names), e("div", panels, class_="grid")], caption)
