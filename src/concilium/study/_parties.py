"""What a study may not say of sites that hold different channels of the same patients, and the network that it makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from concilium.messages import Holding, PlugIn
from concilium.study.tables import Study

NAME = "vertical"
FUSED = "fused"


def is_vertical(study: Study) -> bool:
    """Whether sites hold channels of the same patients."""
    return study.protocol.name == NAME


def fronts_stay(study: Study) -> bool:
    """Whether each site's front stays there, so that nobody ever has the whole network."""
    return is_vertical(study) and study.protocol.options["fronts"] == "stay"


def holdings(study: Study) -> dict[str, Holding]:
    """What each site contributes."""
    labels = study.protocol.options["labels"]
    return {name: Holding(site.holds or (), name == labels) for name, site in study.sites.items()}


def parties_of(study: Study) -> tuple[str, ...]:
    """The sites whose channels are used."""
    wanted = study.protocol.options["parties"]
    return tuple(n for n, site in study.sites.items() if site.holds and (not wanted or n in wanted))


def sites_of(study: Study) -> tuple[str, ...]:
    """The sites that take part: all, or where sites hold channels those whose channels are used, and the one with the labels."""
    if not is_vertical(study):
        return tuple(study.sites)
    taking = {*parties_of(study), study.protocol.options["labels"]}
    return tuple(name for name in study.sites if name in taking)


def places(study: Study) -> dict[str, tuple[int, ...]]:
    """Site -> the places of its channels in the whole image, which has those of all sites one after the other."""
    found, begin = {}, 0
    for name, site in study.sites.items():
        n = len(site.holds or ())
        found[name] = tuple(range(begin, begin + n))
        begin += n
    return found


def parted(study: Study) -> PlugIn:
    """The study's network; where sites hold channels, with a front for each."""
    if not is_vertical(study) or study.network.name == FUSED:
        return study.network
    p, where = study.protocol.options, places(study)
    own = "labels" if p["body"] == "labels" else "own"
    return PlugIn(
        FUSED,
        {
            "of": study.network.name,
            "options": {k: v for k, v in study.network.options.items() if v is not None},
            "parties": {name: where[name] for name in parties_of(study)},
            "cut": p["cut"],
            "fuse": p["fuse"],
            "tail": own,
        },
    )


def misparted(found: Mapping[str, Any]) -> list[str]:
    """What is wrong between `[protocol] name = "vertical"`, what sites hold, and the other tables."""
    p, sites, test = found["protocol"], found["sites"], found["test"]
    problems = []
    if test is not None and test.holds is not None:
        problems.append(
            f"[test] holds = {list(test.holds)} is not allowed: its cases have the channels of all sites. Allowed: at a site. "
            "Remove it."
        )
    if not p or p.name != NAME:
        problems += [
            f"[sites.{name}] holds = {list(site.holds)} is not allowed with protocol {p.name if p else '?'!r}, in which every "
            "site has all channels. Allowed: 'vertical'. Choose it, or remove holds."
            for name, site in sites.items()
            if site.holds is not None
        ]
        return problems
    problems += [
        f"[sites.{name}] holds is missing. Expected the channels that it contributes, or [] of one that has the labels only. "
        "Add it."
        for name, site in sites.items()
        if site.holds is None
    ]
    return problems + _misheld(p, sites) + _not_with(found) + _not_with_fronts_that_stay(found)


def _misheld(p: Any, sites: Mapping[str, Any]) -> list[str]:
    """What is wrong with who holds what."""
    labels, parties = p.options.get("labels"), p.options.get("parties", ())
    held = [channel for site in sites.values() for channel in site.holds or ()]
    known = ", ".join(sites)
    problems = []
    if labels not in sites:
        problems.append(
            f"[protocol] labels = {labels!r} is no site. Allowed: {known}. Name the one that has the labels."
        )
    if unknown := [name for name in parties if name not in sites or not sites[name].holds]:
        problems.append(
            f"[protocol] parties = {list(parties)} is not allowed: {', '.join(unknown)} holds no channel. Allowed: sites that "
            "do. Correct it."
        )
    if twice := sorted({channel for channel in held if held.count(channel) > 1}):
        problems.append(
            f"[sites] holds names {', '.join(twice)} at two sites. Allowed: each channel at one. Take it out at the other, or "
            "give it a name of its own there (channels)."
        )
    if not held:
        problems.append(
            f"[sites] holds is empty at all of {known}. Allowed: one channel or more at one site. Say whose."
        )
    if p.compare and "local" in p.compare:
        problems.append(
            "[protocol] compare = ['local'] is not allowed with 'vertical': a site without the labels cannot train alone. "
            "Allowed: 'centralized', and variants with protocol = { parties = ['NAME'] }. Use these."
        )
    if p.options.get("incomplete") and not p.options.get("new_patients"):
        problems.append(
            "[protocol] incomplete = true is not allowed without new_patients = true: it says which new patients are segmented. "
            "Allowed: both, or neither. Add new_patients = true, or take it out."
        )
    if not 0 <= p.options.get("drop", 0.0) < 1:
        problems.append(f"[protocol] drop = {p.options['drop']} is not allowed. Allowed: 0 to below 1. Correct it.")
    return problems


def _not_with(found: Mapping[str, Any]) -> list[str]:
    """What else does not go together with it."""
    given = "is not allowed with protocol 'vertical'"
    wrong = []
    for table, fine in (("aggregation", "mean"), ("collect", "plain"), ("local_update", "plain")):
        if found[table].name != fine:
            wrong.append(
                f"[{table}] name = {found[table].name!r} {given}, in which nothing is averaged. Allowed: {fine!r}. Take it out."
            )
    s, plan, v, own, t, r = (
        found[k] for k in ("sharing", "plan", "validation", "personalize", "training", "partition")
    )
    if s and s.keep:
        wrong.append(
            f"[sharing] keep = {list(s.keep)} {given}: each part has one owner already. Allowed: none. Remove it."
        )
    if plan and plan.fingerprint == "site":
        wrong.append(f"[plan] fingerprint = 'site' {given}: there is one network. Allowed: 'pooled'. Remove it.")
    if v and v.leave_one_site_out:
        wrong.append(
            f"[validation] leave_one_site_out = true {given}: without a site its channels lack. Allowed: variants with "
            "protocol = { parties = [...] }. Use these."
        )
    if own and own.steps:
        wrong.append(
            f"[personalize] steps = {own.steps} {given}: no site has the whole network. Allowed: none. Remove it."
        )
    if t and t.precision == "float16":
        wrong.append(
            f"[training] precision = 'float16' {given}: the scale of the loss would have to travel. Allowed: 'float32', "
            "'bfloat16'. Choose one."
        )
    if t and t.views:
        wrong.append(
            f"[training] views = {t.views} {given}, whose parties draw every patch together. Allowed: 0. Take it out."
        )
    if r is not None:
        wrong.append(
            f"[partition] data = '{r.data}' {given}: it divides patients. Allowed: none, and holds. Remove it."
        )
    return wrong


def _not_with_fronts_that_stay(found: Mapping[str, Any]) -> list[str]:
    """What asks for the whole network, or has others know the fronts."""
    if found["protocol"].options.get("fronts") != "stay":
        return []
    given = "is not allowed with [protocol] fronts = 'stay'"
    wrong = []
    if found["test"] is not None:
        wrong.append(
            f"[test] data = '{found['test'].data}' {given}: a held-out set is scored by the whole network in one place, and "
            "nobody has that. Allowed: none. Remove [test]: all sites together score their validation cases, which "
            "'centralized' does too, and segment patients in imagesTs (new_patients = true). Or let fronts be sent."
        )
    if (start := found["start"]) and start.weights is not None:
        wrong.append(
            f"[network] weights = '{start.weights}' {given}: whoever has the file would know what fronts begin with. Allowed: "
            "none. Leave weights out, or let fronts be sent."
        )
    if (t := found["training"]) and t.tensors:
        wrong.append(
            f"[training] tensors = {list(t.tensors)} {given}: what does not train is known to all, and could be a front's. "
            "Allowed: none. Take it out, or let fronts be sent."
        )
    return wrong
