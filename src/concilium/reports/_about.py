"""The parts of a report about the run itself: its headline, what went wrong, what was planned, how to do it again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from xml.etree.ElementTree import Element

from concilium.disclosure import count, without_counts, without_paths
from concilium.reports._cases import View, place_name
from concilium.reports._elements import Child, amount, e, fold, listed, number, signed, table
from concilium.reports._sections import cell, label_name, overall_label, section, shown_model
from concilium.statistics import MIN_PATIENTS


def heading(view: View) -> Element:
    """What this is, whether all went as asked, and the figures to remember."""
    found, results = view.found, view.found.results
    what = f"Site {found.site}" if found.site else results["study"]
    started = [str(s.get("started", ""))[:10] for s in found.sessions]
    sites = list(found.study.get("sites", {}))
    protocol = found.study.get("protocol", {})
    lead = [
        f"Run of {started[0]}." if started else None,
        f" {len(sites)} sites: {', '.join(sites)}." if sites else None,
        f" Protocol {protocol.get('name')}, {protocol['rounds']} rounds{_length(protocol)}."
        if "rounds" in protocol
        else None,
        f" Model{'s' * (len(view.models) != 1)}: {', '.join(map(shown_model, view.models))}.",
    ]
    return e(
        "header",
        e(
            "p",
            "Concilium, report of a site for itself" if found.site else "Concilium, report of a study",
            class_="over",
        ),
        e("h1", what),
        e("p", lead),
        _banner(view),
        e("div", _cards(view), class_="cards"),
    )


def _length(protocol: Mapping[str, Any]) -> str:
    if "steps" in protocol:
        return f" of {protocol['steps']} steps at each site"
    return f" of {protocol['epochs']:g} passes over each site's cases" if "epochs" in protocol else ""


def _banner(view: View) -> Element:
    problems = view.results["problems"]
    if view.found.site:
        text = "This page holds pictures and names of this site's cases. It is for the site alone."
        return e("div", e("p", text), class_="banner note")
    if view.results["complete"] and not problems:
        return e("div", e("p", e("strong", "Complete. "), "Everything ran as asked."), class_="banner good")
    lines = [_said(view, p) for p in problems]
    return e("div", e("p", e("strong", "NOT AS ASKED")), listed(lines[:8]), _more(lines[8:]), class_="banner bad")


def _more(lines: list[str]) -> Element | None:
    return fold(f"{len(lines)} more", listed(lines)) if lines else None


def _said(view: View, text: object) -> str:
    """What a run said, without paths, which an error at a simulated site may hold; in a private report without small "
    "numbers."""
    said = without_paths(str(text))
    return without_counts(said, view.min_cases) if view.private else said


def _cards(view: View) -> list[Element]:
    """The study's own model where it counts most, and how far apart the sites are."""
    if not view.models or not view.places:
        return []
    label, own = overall_label(view), view.models[0]
    cards = []
    places = (*(p for p in view.places if p[1] == "test"), *view.pools, *view.places)
    figures = ((p, row) for p in places if (row := cell(view, p, own, "dice", label)) and row["mean"] is not None)
    main, found = next(figures, (places[0], None))
    if found is not None:
        low, high = found["ci_low"], found["ci_high"]
        interval = f", 95 % interval {number(low)} to {number(high)}" if low is not None else ""
        about = f"Dice of {shown_model(own)}, {place_name(main)}, {label_name(label)} (n = {found['n']}{interval})"
        cards.append(_card(number(found["mean"]), about))
    for c in view.results["comparisons"]:
        if own in (c["a"], c["b"]) and (c["metric"], c["label"]) == ("dice", label) and len(cards) < 3:
            if c.get("ci_low") is None or c.get("subset", main[1]) != main[1]:
                continue
            about = f"Dice, {shown_model(c['a'])} minus {shown_model(c['b'])} [{signed(c['ci_low'])}, {signed(c['ci_high'])}]"
            cards.append(_card(signed(c["difference"]), about))
    return [*cards, *_spread(view, own, label)]


def _spread(view: View, model: str, label: str) -> Iterator[Element]:
    """How far apart the sites are that have patients enough."""
    for s in view.results.get("sites", ()):
        if (s["model"], s["subset"], s["metric"], s["label"]) == (model, "validation", "dice", label):
            best, worst = (f"{s[end]}, {number(s[f'{end}_mean'])}" for end in ("best", "worst"))
            about = f"Dice between the best site ({best}) and the worst ({worst}) of those with {MIN_PATIENTS} patients or more"
            yield _card(number(s["gap"]), about)


def _card(figure: str, about: str) -> Element:
    return e("div", e("strong", figure), e("span", about))


# ------------------------------------------------------------------------------------------------- what was set aside


def remarks(view: View) -> Element | None:
    """Cases set aside, and warnings."""
    excluded = view.results["excluded"]
    rows: list[list[Child]]
    if view.private or any(x["case"] is None for x in excluded):
        counts: Counter[tuple[str, str]] = Counter()
        for x in excluded:
            counts[x["site"], x["reason"]] += x.get("count", 1)
        least = view.min_cases if view.private else 0
        rows = [[site, reason, count(n, least)] for (site, reason), n in sorted(counts.items())]
        aside = table(["site", "reason", "cases"], rows, caption="Cases set aside", words=2)
    else:
        rows = [[x["site"], x["case"], _said(view, x["text"])] for x in excluded]
        aside = table(["site", "case", "why"], rows, caption="Cases set aside", words=3)
    lines = [_said(view, text) for text in (*view.results["warnings"], *view.found.notes)]
    return section(
        "Remarks",
        aside if rows else e("p", "No case was set aside."),
        listed(lines) if lines else e("p", "No warnings."),
    )


# ----------------------------------------------------------------------------------------------------- plan and reruns


def plan(view: View) -> Element | None:
    """What was planned, in a few lines."""
    found = view.found
    name = found.study.get("plan", {}).get("configuration")
    about = found.plans.get("configurations", {}).get(name)
    if about is None:
        return None
    network = found.study.get("network", {})
    models = found.results["models"]
    parameters, trained = (models[0].get(key) if models else None for key in ("parameters", "trained"))
    architecture = about.get("architecture", {}).get("arch_kwargs", {})
    stages = architecture.get("features_per_stage")
    training, trainer = found.study.get("training", {}), found.study.get("local_update", {}).get("trainer")
    rows: list[tuple[str, Child]] = [
        ("configuration", f"{name}, by nnU-Net's planner ({found.study.get('plan', {}).get('planner', 'default')})"),
        ("spacing", f"{_times(about['spacing'])} {view.unit}"),
        ("patch", f"{_times(about['patch_size'])} voxels, {(models or [about])[0]['batch_size']} in a batch"),
        ("intensities", ", ".join(dict.fromkeys(about.get("normalization_schemes", [])))),
        ("network", [f"{network.get('name')}",
                     f", {len(stages)} stages of {', '.join(map(str, stages))} features" if stages else None,
                     f", {parameters / 1e6:.2f} million parameters" if parameters else None,
                     f", of which {trained / 1e6:.2f} million train" if trained else None]),
        ("training", f"by {trainer}" if trainer else
            f"{training.get('optimizer')}, learning rate {training.get('learning_rate')}, {training.get('precision')}"),
    ]  # fmt: skip
    n = found.fingerprint.get("n_cases")
    if n is not None and view.enough(n):
        rows.insert(0, ("data", f"{n} cases at {len(found.study.get('sites', {}))} sites{_spacings(view)}"))
    return section("Plan", e("dl", [(e("dt", k), e("dd", v)) for k, v in rows]))


def _times(values: Iterable[Any]) -> str:
    return " × ".join(amount(float(v)) if isinstance(v, float) and not v.is_integer() else f"{v:g}" for v in values)


def _spacings(view: View) -> str:
    """The range of spacings, which single cases decide."""
    found = [g["spacing"] for g in view.found.fingerprint.get("geometry", [])]
    if view.private or not found or view.unit != "mm":
        return ""
    ends = [(min(axis), max(axis)) for axis in zip(*found, strict=True)]
    ranges = (amount(a) if math.isclose(a, b, rel_tol=0.01) else f"{amount(a)}–{amount(b)}" for a, b in ends)
    return f"; spacing {' × '.join(ranges)} mm"


def reproduction(view: View) -> Element | None:
    """Commands, versions, seed and threads."""
    found = view.found
    if found.site or not found.sessions:
        return None
    last = found.sessions[-1]
    engine = found.study.get("engine", {})
    seeds = list(dict.fromkeys(str(m["seed"]) for m in found.results["models"] if m.get("seed") is not None))
    packages = {"concilium": last.get("concilium"), "python": last.get("python"), **last.get("packages", {})}
    command = "concilium serve KIT study.toml" if view.private else "concilium run study.toml --out RUN"
    lines = [
        f"Seed{'s' * (len(seeds) > 1)} {', '.join(seeds) or found.results['seed']}; threads per site: {engine.get('threads')}; "
        f"processes: {engine.get('workers')}; device: {engine.get('device')}.",
        "Equal versions, threads and kind of processor give equal weights on a CPU; other thread counts give other bits.",
        f"Run on {last.get('platform')}, {last.get('cores')} cores, GPU: {last.get('gpu') or 'none'}.",
    ]
    if len(found.sessions) > 1:
        lines.append(f"Times the run was stopped and went on: {len(found.sessions) - 1}.")
    return section(
        "Do it again",
        e("pre", command + "\nconcilium report RUN"),
        listed(lines),
        fold("Versions", table(["package", "version"], [[k, str(v)] for k, v in packages.items()], words=2)),
        fold("study.toml (paths left out)", e("pre", found.study_text)) if found.study_text else None,
    )
