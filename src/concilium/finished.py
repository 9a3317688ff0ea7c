"""The finished models of a run folder, each with all that is needed to use it: prediction, export and reports start here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from concilium import catalog
from concilium.data.augment import mirror_axes
from concilium.data.labels import Labels, from_nnunet, n_heads
from concilium.data.plan import Plan, open_plan
from concilium.errors import StudyError
from concilium.messages import Tensors
from concilium.networks import Stages, make_network
from concilium.schedule import BEST, PERSONAL, folds_of, is_one, names, settings
from concilium.statistics import WITHOUT
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

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """The spatial axes along which images are mirrored to predict."""
        if not self.study.training.mirror:
            return ()
        own = self._network().mirror_axes
        return mirror_axes(self.plan) if own is None else own

    def weights(self) -> tuple[Tensors, ...]:
        """The weights of each member."""
        return tuple(read_tensors(file)[0] for file in self.files)

    def networks(self) -> tuple[Stages, ...]:
        """Each member as a network with its weights, on the CPU, ready to predict."""
        made = []
        for weights in self.weights():
            network = self._network()
            network.load_state_dict(weights)
            made.append(network.eval())
        return tuple(made)

    def _network(self) -> Stages:
        return make_network(
            self.study.network,
            n_channels=len(self.channels),
            n_labels=n_heads(self.labels),
            plan=self.plan.architecture,
            deep_supervision=self.study.training.deep_supervision,
        )


def finished_models(run: Path) -> tuple[str, ...]:
    """The names of the models in a run folder, as `open_finished` opens them: `federated`, `federated.s8`, `local:north`.

    A model that sites pass on among themselves is the same at each, and opened without a site too.
    """
    at_server = [_without_fold(p) for p in sorted((run / "weights").glob("*.safetensors"))]
    study = read_study(run / "study.toml", check_data=False)
    stay = {name for name, (_, stays) in _known(study).items() if stays}
    kept = (p for p in sorted((run / "sites").glob("*/models/*.safetensors")) if p.name.partition(".")[0] in stay)
    at_sites = [
        f"{_without_fold(p)}:{p.parts[-3]}" for p in kept if not p.stem.endswith(BEST) and p.parts[-3] in study.sites
    ]
    return tuple(dict.fromkeys(at_server + at_sites))


def _known(study: Study) -> dict[str, tuple[str, bool]]:
    """Model -> its protocol, and whether it stays at its sites."""
    return {name: about for members in settings(study) for setting in members for name, about in names(setting).items()}


def open_finished(run: Path, name: str | None = None) -> Finished:
    """A model of a run folder; without a name that of the study's own protocol and first seed.

    Args:
        name: as in results.json; `.s8` after it asks for seed 8, where there are several, and `.f0` for one fold alone.

    Raises:
        StudyError: no run folder, or it holds no such model, or some of its folds are missing.
    """
    if not (run / "plans.json").is_file():
        raise StudyError(f"{run} is no run folder: it has no plans.json. Give the folder that `concilium run` printed.")
    study = read_study(run / "study.toml", check_data=False)
    name = name or study.protocol.name
    about = json.loads((run / "dataset.json").read_text(encoding="utf-8"))
    site = ""
    if is_one(_known(study).get(name.partition(":")[0].partition(".")[0], ("", False))[0]):  # whoever's: it is the same
        name, _, site = name.partition(":")
        found = (m.partition(":") for m in finished_models(run))
        site = site or next((where for model, _, where in found if model == re.sub(r"\.f\d+$", "", name)), "")
    title = (
        name.partition(":")[0].partition(".")[0].removesuffix(PERSONAL)
    )  # what is trained beside a model has its plan
    own_plan = run / "plans" / f"{title}.json"
    return Finished(
        run,
        name,
        study.variants.get(title.partition(WITHOUT)[0], study),
        (own_plan if own_plan.is_file() else run / "plans.json").read_text(encoding="utf-8"),
        tuple(about["channel_names"].values()),
        from_nnunet(about),
        about["file_ending"],
        _files(run, f"{name}:{site}" if site else name, n_folds=len(folds_of(study))),
    )


def _without_fold(path: Path) -> str:
    return re.sub(r"\.f\d+$", "", path.stem)


def _files(run: Path, model: str, *, n_folds: int) -> tuple[Path, ...]:
    """The files of a model: with the server, or at the simulated site that it never left."""
    name, _, site = model.partition(":")
    folder = run / "sites" / site / "models" if site else run / "weights"
    alone = folder / f"{name}.safetensors"
    if alone.is_file():
        return (alone,)
    found = [path for i in range(n_folds) if (path := folder / f"{name}.f{i}.safetensors").is_file()]
    if not found:
        known = finished_models(run)
        raise StudyError(f"{run} holds no model {model!r}. {catalog.allowed(model, known)} Choose one with --model.")
    if len(found) < n_folds:
        raise StudyError(
            f"{run} holds {len(found)} of {n_folds} folds of {model!r}. All are needed for their ensemble. Go on with the run, "
            f"or name one fold, such as {found[0].stem}."
        )
    return tuple(found)
