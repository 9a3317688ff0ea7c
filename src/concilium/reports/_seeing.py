"""The parts of a dossier that say who sees what, and who has the model in the end."""

from __future__ import annotations

from collections.abc import Iterator

from concilium.reports._sheet import Grid, Part
from concilium.reports._talk import Trained, trained_in
from concilium.schedule import ELSEWHERE, is_partly_shared
from concilium.study import Study

NOBODY, OWN, YES = "no", "its own", "yes"


def sight(study: Study) -> Part:
    """What the server, other sites and outsiders see."""
    same: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for model in trained_in(study):
        if not model.beside:
            same.setdefault(tuple(map(tuple, _sight(model))), []).append(model.name)
    header = ["", "the site itself", "the server", "other sites", "outsiders"]
    grids = [Grid(header, rows, ", ".join(of) if len(same) > 1 else "") for rows, of in same.items()]
    return Part(
        "Who sees what",
        [
            *grids,
            "Outsiders: whoever watches the network. Between hospitals every connection is dialled by the site and "
            "encrypted, with "
            "certificates at both ends (mutual TLS): what can be watched is that a site takes part, when, and how much "
            "it sends.",
        ],
    )


def _sight(model: Trained) -> Iterator[tuple[str, ...]]:
    study, options = model.study, model.study.protocol.options
    if model.protocol == "centralized":
        yield "everything", "all cases lie in one place", "the same", "the same", NOBODY
        return
    labels = str(options.get("labels", ""))
    yield "images, names of cases and patients, paths", OWN, NOBODY, NOBODY, NOBODY
    yield (
        "label maps",
        OWN,
        "no; with reveal_labels it can compute them" if options.get("reveal_labels") else NOBODY,
        NOBODY,
        NOBODY,
    )
    yield (
        "statistics of the data set, numbers of cases",
        OWN,
        "each site's",
        "what the plan and the sums tell of them",
        NOBODY,
    )
    yield "scores", OWN, "averages of each site, or of cases where the site allows it", NOBODY, NOBODY
    yield "losses, steps, seconds", OWN, "each site's", NOBODY, NOBODY
    if model.splits:
        holder = f"{labels}: all, through the server" if options.get("body") == "labels" else NOBODY
        yield "maps: values of single voxels", OWN, "each site's, in every step", holder, NOBODY
        computes = f"{labels}: those that it computes" if labels else NOBODY
        yield "gradients of maps", OWN, "each site's, in every step", computes, NOBODY
    if options.get("patches") == "labels":
        yield "where patches lie, around the labels", f"{labels}: its own", "all", "all parties", NOBODY
    yield from _weights(model)
    yield (
        "that it takes part, when, how many bytes",
        YES,
        YES,
        "who takes part" if model.sums_secretly else "which sites there are",
        YES,
    )
    yield from (("the finished model", *_finished(model), NOBODY),)
    if is_partly_shared(study):
        elsewhere = study.sharing.unseen != "none"
        once = "once, at the end" if elsewhere else NOBODY
        yield "what the study keeps at sites", OWN, once, "their mean" if elsewhere else NOBODY, NOBODY


def _weights(model: Trained) -> Iterator[tuple[str, ...]]:
    """Who sees what training at a site left."""
    what, study = "weights after training at the site", model.study
    if model.protocol == "local":
        yield what, OWN, NOBODY, NOBODY, NOBODY
    elif model.sums_secretly:
        yield what, OWN, "the sum of the sites only", "the mean", NOBODY
    elif model.protocol == "cyclic":
        yield what, OWN, "sealed, unreadable", "the next site, as they are", NOBODY
    elif model.apart:
        yield what, OWN, f"no front; of {study.protocol.options['labels']} the tail, after each round", NOBODY, NOBODY
    elif model.protocol == "vertical":
        yield what, OWN, "each site's part, after each round", NOBODY, NOBODY
    elif study.protocol.options.get("variant") == "sequential":
        yield what, OWN, "each site's", "the next site, as they are", NOBODY
    else:
        others = "each site's, as they are" if model.collects == "judged" else "the mean; of two sites, the other's"
        yield what, OWN, "each site's, in every round", others, NOBODY


def _finished(model: Trained) -> tuple[str, str, str]:
    """Whether the site, the server and other sites have the finished model."""
    if model.protocol == "local":
        return YES, NOBODY, NOBODY
    if model.protocol == "vertical":
        return "its own part", "all but the fronts" if model.apart else YES, "their own parts"
    if model.one:
        return YES, NOBODY, YES
    if model.stays:
        return YES, "the shared part", "the shared part, each with its own"
    return YES, YES, YES


def readers(study: Study) -> Part:
    """Who can read each model, in the end."""
    rows = []
    for model in trained_in(study):
        if model.protocol == "centralized":
            rows.append([model.name, *["all cases lie in one place"] * 3])
        elif model.beside:
            rows.append([model.name, *((YES, YES, YES) if model.beside == ELSEWHERE else (OWN, NOBODY, NOBODY))])
        else:
            rows.append([model.name, *_finished(model)])
    test = "Whoever holds the held-out test set gets every finished model that is scored there." if study.test else ""
    after = (
        "A model is a file without a lock: who has it can copy it and pass it on, and from it something may be found "
        "out about the "
        "patients whom it was trained on. Agree in writing who may keep, use and publish it."
    )
    return Part(
        "Who can read the model",
        [
            Grid(["the finished model", "each site", "the server", "other sites"], rows),
            *([test] if test else []),
            after,
        ],
    )
