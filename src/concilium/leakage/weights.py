"""The weights that an audit goes on from: those after a round, where they were kept, and fronts that stay at their sites."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from concilium.beginning import initial_weights
from concilium.errors import StudyError
from concilium.messages import Tensors
from concilium.networks._fusion import without_fronts
from concilium.planning import Plans
from concilium.study import Study, sites_of
from concilium.wire import part, read_tensors


def kept_at(run: Path, model: str, number: int) -> Path:
    """Where the weights after a round lie that were kept for an audit."""
    return run / "leakage" / "rounds" / f"{model}.{number:06d}.safetensors"


def fronts_at(run: Path, study: Study, file: str, prefix: str = "") -> dict[str, Tensor]:
    """The fronts that stay at the sites of a simulation, from this file of each site's folder.

    Raises:
        StudyError: a site's folder is not here.
    """
    found: dict[str, Tensor] = {}
    for site in sites_of(study):
        path = run / "sites" / site / file
        if not path.is_file():
            raise StudyError(
                f"The front of {site} is not here: there is no {path}. Fronts of this study stay at their sites, so that only a "
                "simulation can be audited, which has the folders of all. Run the study as one, on data of your own."
            )
        own = part(read_tensors(path)[0], prefix)
        found |= {name: t for name, t in own.items() if name not in without_fronts(own)}
    return found


def weights_after(run: Path, model: str, number: int, study: Study, plans: Plans) -> Tensors:
    """The weights after a round; those before the first are drawn anew, unless the study starts from others."""
    path = kept_at(run, model, number)
    if path.is_file():
        return read_tensors(path)[0]
    if number == 0 and study.start.weights is None:
        return initial_weights(study, plans)
    raise StudyError(
        f"The weights of {model} after round {number} were not kept: there is no {path}. Expected them from `concilium leakage "
        f"STUDY --round {number}`, which runs the study and keeps them. Run that, or leave the round out."
    )
