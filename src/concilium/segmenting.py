"""After training: new patients of all parties of a vertical study, segmented by all together.

They are the cases of `imagesTs`, the same at every party; with `incomplete` also those that some lack. Which they are is found
as for those that are trained on; each party that has one runs its front, and whoever has the labels gets the label map. Nothing
of them is scored. A finished run that goes on (`--resume`) segments whoever is there by then.
"""

from __future__ import annotations

from collections import Counter

from concilium.answers.new_patients import NEW
from concilium.answers.service import SEGMENTED
from concilium.errors import ConciliumError
from concilium.messages import Evaluate, Evaluated, as_failure
from concilium.preparation import Event, Ledger, Work, failure_line
from concilium.schedule import Model
from concilium.serving import serve
from concilium.study import Study, parties_of
from concilium.together import align_new
from concilium.wire import read_tensors


def segments_new(study: Study) -> bool:
    """Whether a study asks for it."""
    return study.protocol.name == "vertical" and bool(study.protocol.options["new_patients"])


def segment_new(work: Work, model: Model, ledger: Ledger) -> None:
    """Have the new patients segmented by a finished model, if its study asks for it; what fails is a problem of the run."""
    study = model.setting.study
    if model.protocol != "vertical" or not segments_new(study):
        return
    where = str(study.protocol.options["labels"])
    label = f"{model.key}, new patients"
    try:
        newcomers = align_new(study, work.engine)
    except ConciliumError as e:
        ledger.problems.append(f"{label}: {e}")
        return
    n, apart = len(newcomers.cases), newcomers.apart
    if apart:
        ledger.warnings.append(f"{label}: {apart} cases lie elsewhere in space at one of the sites, and are left out.")
    told = {"model": model.key, "site": where, "folder": f"{SEGMENTED}/{model.key}", "cases": n, "left_out": apart}
    if study.protocol.options["incomplete"]:
        parties = parties_of(study)
        told["without"] = Counter(" ".join(p for p in parties if p not in case) for case in newcomers.cases)
    if n:
        work.watch(Event("stage", f"{label}: segmenting {n} cases, whose label maps go to {where}", model=model.key))
        request = Evaluate(model.key, NEW, (), (model.key,), unknown=work.plans.unknown)
        weights, _ = read_tensors(work.record.folder / "weights" / f"{model.key}.safetensors")
        device = work.study.engine.device
        reply = serve(work.engine, model, work.plans, weights, request, device=device, cases=newcomers.cases)
        if not isinstance(reply, Evaluated):
            ledger.problems.append(f"{label}: {failure_line(work.record, where, as_failure(reply))}")
            return
        if lost := sum(e.count for e in reply.excluded):
            ledger.warnings.append(f"{label}: {lost} of {n} cases could not be segmented.")
        told |= {"cases": n - lost, "left_out": apart + lost}
    work.record.write_json(f"new_patients/{model.key}.json", told)
