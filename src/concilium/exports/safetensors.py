"""The weights as safetensors, under Concilium's names, with the plan, the data set's description and the study beside them."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path

from concilium.exports import dataset_description, members, without_paths, write_json
from concilium.finished import Finished
from concilium.study import to_toml
from concilium.wire import write_tensors


def export(finished: Finished, out: Path, *, card: str, intended_use: str) -> str:
    """Write `model.safetensors` (`model_0.safetensors`, ... for several members), `plans.json`, `dataset.json`, `study.toml`.

    The header of each weights file holds `concilium`: JSON with study, model, fold, network, channels, labels and `plan`, the
    BLAKE2b digest (20 bytes, hexadecimal) of plans.json.
    """
    study = finished.study
    (out / "plans.json").write_text(finished.plans, encoding="utf-8")
    write_json(out / "dataset.json", dataset_description(finished))
    (out / "study.toml").write_text(to_toml(without_paths(study)), encoding="utf-8")
    about = {
        "study": study.study.name,
        "model": finished.name,
        "network": {"name": study.network.name, **study.network.options},
        "deep_supervision": study.training.deep_supervision,
        "configuration": study.plan.configuration,
        "plan": blake2b(finished.plans.encode(), digest_size=20).hexdigest(),
        "channels": list(finished.channels),
        "labels": dict(finished.labels),
    }
    for (fold, name), weights in zip(members(finished).items(), finished.weights(), strict=True):
        write_tensors(out / f"{name}.safetensors", weights, {"concilium": json.dumps({**about, "fold": fold})})
    first = f"{{out}}/{next(iter(members(finished).values()))}.safetensors"
    return f"python -c \"from safetensors import safe_open; print(safe_open('{first}', 'np').metadata())\""
