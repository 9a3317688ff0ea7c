"""The parts of a dossier that say which attacks were run with which result, and what is not protected."""

from __future__ import annotations

import importlib
from collections.abc import Container, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from concilium import catalog
from concilium.attacks import AUDITED
from concilium.defences import lapses
from concilium.reports._leaks import CALLED
from concilium.reports._permissions import outside
from concilium.reports._sheet import Content, Grid, Lines, Part
from concilium.reports._talk import Trained, trained_in
from concilium.schedule import is_partly_shared
from concilium.study import Study


def attacks(study: Study, found: Sequence[Mapping[str, Any]]) -> Part:
    """Which attacks were run, and what they found: audit by audit."""
    if not found:
        return Part("Attacks that were run", _not_attacked(study))
    every = [a for audit in found for a in audit["attacks"]]
    who = {a["name"]: f"{a['name']}: guesses {a['guesses']} from {a['sees']}. Who could: {a['who']}." for a in every}
    return Part(
        "Attacks that were run",
        [
            *(content for audit in found for content in _audit(study, audit)),
            "Guess: what one gets without looking at anything that was sent. A figure means what it exceeds the guess "
            "by. SSIM: how alike an image that was found and the true one are, 1 being the same. Dice: the same of label maps. "
            "AUC: how well it is told who was trained on, 0.5 being chance.",
            Lines([*who.values(), *_left_out(study, who)]),
            Lines(list(dict.fromkeys(note for audit in found for note in audit["notes"]))),
        ],
    )


def _audit(study: Study, found: Mapping[str, Any]) -> Iterator[Content]:
    """Of each figure of an audit, at each party where they differ, the place where most was found."""
    best: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in found["rows"]:
        key = row["attack"], row["metric"], row.get("site", "")
        if key not in best or row["value"] - row["naive"] > best[key]["value"] - best[key]["naive"]:
            best[key] = row
    rows = [
        [
            row["attack"] or "no attack",
            CALLED.get(row["metric"], row["metric"]),
            _place(row),
            f"{row['value']:.2f}",
            f"{row['naive']:.2f}",
        ]
        for row in best.values()
    ]
    if found["study"] != study.study.name:
        yield f"These figures are of the study {found['study']}, not of this one."
    yield (
        f"On the model {found['model']}, against the sites {', '.join(found['victims'])}, by an attacker with "
        f"{found['n_own_cases']} cases of its own. Of each figure the place where most was found."
    )
    header = ["attack", "figure", "where", "found", "guess"]
    yield Grid(header, rows, f"What was found of {found['model']}, beside a guess without looking", figures=2)


def _left_out(study: Study, there: Container[str]) -> Iterator[str]:
    """The attacks that could be run on what the study sends, and were not."""
    if left := [name for name, _ in _applicable(study) if name not in there]:
        yield f"Not run, although they read what is sent here: {', '.join(left)}."


def _applicable(study: Study) -> Iterator[tuple[str, ModuleType]]:
    """Attacks on what the study's own model sends."""
    models = [m for m in trained_in(study) if not m.beside and m.name == study.protocol.name]
    for name in catalog.names("attacks"):
        module = importlib.import_module(f"concilium.attacks.{name}")
        if any(_applies(module, model) for model in models):
            yield name, module


def _place(row: Mapping[str, Any]) -> str:
    where = [
        f"site {row['site']}" if row.get("site") else "",
        f"after round {row['round']}",
        f"cut {row['cut']}" if row["cut"] else "",
        f"map {row['map']}" if row["map"] else "",
        "in prediction" if row.get("predicting") else "",
    ]
    return ", ".join(part for part in where if part)


def _not_attacked(study: Study) -> list[Content]:
    cannot = study.protocol.name not in AUDITED or is_partly_shared(study)
    head = f"No attack was run on this study: run `concilium leakage {study.study.name}.toml`, on a machine that has the data."
    if cannot:
        head = (
            f"No attack was run on this study. Concilium has no audit of the protocol {study.protocol.name}"
            f"{' with parts that stay at sites' if is_partly_shared(study) else ''}: what is sent may give away "
            "anything that it holds."
        )
    rows = [[name, f"{m.GUESSES}, from {m.SEES}", m.REVEALS, "not run"] for name, m in _applicable(study)]
    return [
        head,
        *([Grid(["attack", "what it guesses", "who could do it", "result"], rows)] if rows else []),
        "Without an attack nothing is known of how much can be found out. That an attack finds little would prove "
        "nothing either: "
        "another may find more.",
    ]


def _applies(attack: ModuleType, model: Trained) -> bool:
    sees = attack.SEES
    if model.apart and (sees == "model" or getattr(attack, "NEEDS_FRONT", False)):
        return False
    if sees in ("maps", "gradients", "steering"):
        return model.splits
    return sees == "model" or model.protocol == "federated"


# ----------------------------------------------------------------------------------------------------------- not protected


def unprotected(study: Study, found: Sequence[Mapping[str, Any]]) -> Part:
    """What nothing here protects."""
    return Part("What is not protected", [Lines(list(_unprotected(study, found)))])


def _unprotected(study: Study, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    models = [m for m in trained_in(study) if not m.beside and m.protocol != "centralized"]
    yield from _in_training(study, models)
    if not any(m.study.local_update.name.startswith("dp") for m in models):
        yield (
            "No part of the study bounds what a single patient changes (differential privacy): the model may remember a "
            "patient."
        )
    yield "The finished model: who has it can ask whether a patient was among those it was trained on, and may learn more."
    yield (
        "Statistics of the data and scores were never attacked. A site with one case tells that case's intensities; "
        "extremes are values of single voxels."
    )
    if any(outside(m.study) for m in models):
        yield "Code from outside Concilium runs at the site, with all that the site's process may read."
    steered = {a["name"] for audit in found for a in audit["attacks"] if a["sees"] == "steering"}
    yield (
        "A malicious server or holder of labels, which sends what makes a network tell more: nothing stops it, and "
        + (
            f"it was tried in one way only ({', '.join(sorted(steered))})."
            if steered
            else "it was not measured for this study."
        )
    )
    yield (
        "Out of scope: several that collude; machines that are broken into, and whoever reads their disks; what sizes and "
        "times of messages tell."
    )
    if study.engine.name == "simulation":
        yield (
            "As a simulation the study runs on one machine, whose owner sees all cases of all sites. It is for one owner's "
            "data."
        )
    if not found:
        yield "No attack was run: nothing is claimed of how much, or how little, can be found out."
    yield (
        "Data of patients stay data of patients: nothing in this study, and no figure here, makes weights, maps or scores "
        "into anything else."
    )


def _in_training(study: Study, models: Sequence[Trained]) -> Iterator[str]:
    """What the protocols leave open."""
    yield from (text for m in models for text in lapses(m.name, m.study.defences))
    if any(m.apart for m in models):
        yield (
            "Maps and their gradients are computed from every voxel. Fronts stay at their sites, so that the server does not "
            "know the layers that made them. That is no defence by itself: who has images with the maps that such a front made "
            "of them (of patients known from elsewhere, or by the help of a site) can learn to compute images back, and "
            "what the channels of a shallow map have in common is much of the image without any (inversion_blind)."
        )
    if any(m.splits and not m.apart for m in models):
        yield (
            "Maps and their gradients are computed from every voxel. The server knows the layers that made them: an image "
            "can be computed back, at a shallow cut nearly whole, and much of the label map from the gradients. The server "
            "must be trusted with what it could see."
        )
    if any(m.study.protocol.options.get("reveal_labels") for m in models if m.splits):
        yield "The study has reveal_labels: the server can compute the label maps of single cases."
    if any(m.study.protocol.options.get("patches") == "labels" for m in models):
        yield (
            "Patches follow the labels (patches = 'labels'): in every round all sites, and the server, learn where in the "
            "images of which patients structures lie."
        )
    if any(m.protocol == "vertical" for m in models):
        yield (
            "Names of cases are blinded, not out of reach: who can guess a name (a hospital's numbers, a scheme of names) and "
            "takes part, or is the server, can have the guess blinded as a party's and learn whether a site has such a case. "
            "The same holds of where a case lies in space."
        )
    if any(m.protocol in ("federated", "splitfed") and not m.sums_secretly for m in models):
        yield (
            "The server reads each site's update by itself. An update is computed from patients, and something of them may "
            "be found in it."
        )
    if any(m.sums_secretly for m in models):
        yield (
            "Masks hide each update, not their sum: of n sites n − 1 together, or with the server, read the last one's. "
            "Rounds that differ by one site can be compared. Nobody else has reviewed how the masks are put together. The "
            "attacks on updates can be run on the sum, which of few sites may tell of single patients too."
        )
    if any(m.protocol == "cyclic" for m in models):
        yield (
            "The next site gets the weights as this one left them; with the server it can read all that passes. No attack "
            "on them was measured."
        )
    if any(m.collects == "judged" for m in models):
        yield "Every site gets every other site's update as it is."
