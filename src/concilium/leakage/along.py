"""Run a study and keep the weights after chosen rounds, so that an audit can look at them later."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from concilium.errors import StudyError
from concilium.leakage.weights import fronts_at, kept_at
from concilium.line import run
from concilium.preparation import Event
from concilium.protocols import WEIGHTS
from concilium.study import Study, fronts_stay
from concilium.wire import part, read_tensors, write_tensors


def run_and_keep(
    study: Study,
    out: Path,
    rounds: Collection[int],
    *,
    model: str | None = None,
    watch: Callable[[Event], None] = lambda event: None,
) -> Path:
    """Run the study into `out`, and keep the weights of the model (the study's own) after these rounds; the run folder.

    Raises:
        StudyError: the study has no such round.
        StudyError, DataError, EngineError: as a run.
    """
    name, last = model or study.protocol.name, study.protocol.rounds
    if wrong := [n for n in rounds if not 0 <= n <= last]:
        raise StudyError(
            f"Round {wrong[0]} was asked for. Allowed: 0, before any training, to {last}. Correct --round."
        )

    def keep(event: Event) -> None:
        if event.kind == "round" and event.model == name and event.round in rounds:
            file = f"{event.round:06d}.safetensors"
            weights = part(read_tensors(out / "checkpoints" / name / file)[0], WEIGHTS)
            if fronts_stay(of := study.variants.get(name, study)):
                weights = {**weights, **fronts_at(out, of, f"states/{name}/{file}", WEIGHTS)}
            write_tensors(kept_at(out, name, event.round), weights, {"round": str(event.round)})
        watch(event)

    return run(study, out, watch=keep).folder
