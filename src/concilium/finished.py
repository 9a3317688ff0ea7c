"""The finished models of a run folder, each with all that is needed to use it: prediction, export and reports start here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from concilium import catalog
from concilium.data.labels import Labels, from_nnunet, n_heads
from concilium.data.plan import Plan, open_plan
from concilium.errors import StudyError
from concilium.messages import Tensors
from concilium.networks import Stages, make_network
from concilium.study import Study, read_study
from concilium.wire import read_tensors


@dataclass(frozen=True)
class Finished:
    """A finished model. `files`: the weights of each of its members (one per fold), whose logits are averaged."""

    run: Path
    name: str
    study: Study
    """What it was trained by."""
    plans: str
    """nnU-Net's plan file, as JSON."""
    channels: tuple[str, ...]
    labels: Labels
    file_ending: str
    files: tuple[Path, ...]

    @property
    def plan(self) -> Plan:
        """The plan's one configuration that the study uses."""
        return open_plan(self.plans, self.study.plan.configuration)

    def weights(self) -> tuple[Tensors, ...]:
        """The weights of each member."""
        return tuple(read_tensors(file)[0] for file in self.files)

    def networks(self) -> tuple[Stages, ...]:
        """Each member as a network with its weights, on the CPU, ready to predict."""
        made = []
        for weights in self.weights():
            network = make_network(
                self.study.network,
                n_channels=len(self.channels),
                n_labels=n_heads(self.labels),
                plan=self.plan.architecture,
                deep_supervision=self.study.training.deep_supervision,
            )
            network.load_state_dict(weights)
            made.append(network.eval())
        return tuple(made)


def finished_models(run: Path) -> tuple[str, ...]:
    """The names of the models in a run folder, such as `federated` or `local:north`: what `open_finished` opens."""
    known = [p.stem for p in sorted((run / "weights").glob("*.safetensors"))]
    return (*known, *(f"local:{p.parts[-3]}" for p in sorted((run / "sites").glob("*/models/local.safetensors"))))


def open_finished(run: Path, name: str | None = None) -> Finished:
    """A model of a run folder; without a name the study's own protocol.

    Raises:
        StudyError: no run folder, or it holds no such model.
    """
    if not (run / "plans.json").is_file():
        raise StudyError(f"{run} is no run folder: it has no plans.json. Give the folder that `concilium run` printed.")
    study = read_study(run / "study.toml", check_data=False)
    name = name or study.protocol.name
    about = json.loads((run / "dataset.json").read_text(encoding="utf-8"))
    return Finished(
        run,
        name,
        study,
        (run / "plans.json").read_text(encoding="utf-8"),
        tuple(about["channel_names"].values()),
        from_nnunet(about),
        about["file_ending"],
        (_weights_file(run, name),),
    )


def _weights_file(run: Path, model: str) -> Path:
    """The file of a model: with the server, or at the simulated site that it never left."""
    name, _, site = model.partition(":")
    path = run / "sites" / site / "models" / f"{name}.safetensors" if site else run / "weights" / f"{name}.safetensors"
    if not path.is_file():
        known = finished_models(run)
        raise StudyError(f"{run} holds no model {model!r}. {catalog.allowed(model, known)} Choose one with --model.")
    return path
