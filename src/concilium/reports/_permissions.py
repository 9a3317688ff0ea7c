"""What a study needs a site to allow in its `site.toml`; a site that does not allow it refuses (`answers/permission.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from concilium import catalog
from concilium.collect.secure_sum import threshold_of
from concilium.protocols._cohort import fewest
from concilium.reports._talk import Trained, trained_in
from concilium.schedule import ELSEWHERE
from concilium.study import Study

WHY: Mapping[str, str] = {
    "split": "values of single voxels leave (maps of the network's first layers, and gradients)",
    "labels": "the server can compute label maps from what it gets, or is told where patches lie that follow the labels",
    "open_weights": "weights leave the site as they are, readable by the server",
    "least_summed": "masked updates are added up, and the server reads the sum of this many sites",
    "reveal": "the server gets the finished model in the end",
    "shown": "other sites get this site's update as it is, to judge it",
    "new_patients": "maps of patients who were never trained on (imagesTs) leave too, whenever the study is run",
    "kept": "parts of the network that otherwise stay leave once, at the end",
    "plug_ins": "code that is no part of Concilium is run at the site",
}


def needed(study: Study) -> dict[str, Any]:
    """Key of `site.toml` -> what it must say so that the whole study runs; of `least_summed`, what it may say at most."""
    found: dict[str, Any] = {}
    for model in trained_in(study):
        own = _of_model(model)
        if "least_summed" in own and "least_summed" in found:
            own["least_summed"] = min(own["least_summed"], found["least_summed"])
        found |= own
    if code := sorted({name for model in trained_in(study) for name in outside(model.study)}):
        found["plug_ins"] = tuple(code)
    return {key: found[key] for key in WHY if key in found}


def outside(study: Study) -> list[str]:
    """Code from outside Concilium that a study has its sites run."""
    plug_ins = (study.network, study.loss, study.local_update, *study.defences, *study.filters)
    return [code for p in plug_ins for code in catalog.code_from_outside(p.name, p.options)]


def _of_model(model: Trained) -> dict[str, Any]:
    options = model.study.protocol.options
    if model.protocol in ("local", "centralized"):
        return {}
    if model.beside:
        return {"kept": True, "open_weights": True} if model.beside == ELSEWHERE else {}
    if model.sums_secretly:
        given = cast("int | None", model.study.collect.options.get("threshold"))
        return {"least_summed": threshold_of(given, fewest(model.study.sites, options, 2))}
    if model.protocol == "cyclic":
        return {"reveal": True} if options["reveal"] else {}
    found: dict[str, Any] = {"open_weights": True}
    if model.splits:
        found["split"] = True
    if options.get("reveal_labels") or options.get("patches") == "labels":
        found["labels"] = True
    if options.get("new_patients"):
        found["new_patients"] = True
    if model.collects == "judged":
        found["shown"] = True
    return found
