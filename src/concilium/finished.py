"""The finished models of a run folder, each with all that is needed to use it: prediction, export and reports start here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from concilium import catalog
from concilium.data.augment import mirror_axes
from concilium.data.labels import Labels, from_nnunet, n_heads, unknown_labels, with_labels
from concilium.data.plan import Plan, open_plan
from concilium.defences import guarded
from concilium.errors import StudyError
from concilium.messages import Tensors
from concilium.networks import Stages, beside_build, make_network
from concilium.schedule import BEST, folds_of, is_one, names, settings, title_of
from concilium.statistics import WITHOUT
from concilium.study import Study, fronts_stay, guard_of, read_study, undefended
from concilium.wire import read_tensors

BASELINES = ("local", "centralized", "centralized_long")


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
    unknown: tuple[str, ...] = ()
    """Labels that no site which trained it looked for; of a model whose heads are its site's own, that site."""
    fold: Callable[[Tensors], Tensors] | None = None
    """Makes of the weights in the files those of the study's network, where that is another than the one that trained."""

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
        read = (read_tensors(file)[0] for file in self.files)
        return tuple(read if self.fold is None else map(self.fold, read))

    def folded(self) -> Finished:
        """The same model without what its network has beside the published one, in whose place other weights have changed.

        Raises:
            StudyError: it has nothing such, or what it has cannot be folded.
        """
        network = self.study.network
        known = beside_build(network, "folded")
        if known is None:
            raise StudyError(
                f"[network] name = {network.name!r} has nothing that could be folded into its weights. Allowed: 'sam' with "
                "adapt = 'lora'. Export without --fold."
            )
        options, fold = known(network.options)
        return replace(self, study=replace(self.study, network=replace(network, options=options)), fold=fold)

    def networks(self) -> tuple[Stages, ...]:
        """Each member as a network with its weights, on the CPU, ready to predict."""
        made = []
        for weights in self.weights():
            network = self._network()
            network.load_state_dict(weights)
            made.append(network.eval())
        return tuple(made)

    def _network(self) -> Stages:
        build = partial(
            make_network,
            self.study.network,
            n_channels=len(self.channels),
            n_labels=n_heads(self.labels),
            plan=with_labels(self.plan.architecture, self.labels),
            deep_supervision=self.study.training.deep_supervision,
        )
        image = (1, len(self.channels), *self.plan.configuration.patch_size)
        return guarded(build, guard_of(self.study), image=image)()


def finished_models(run: Path) -> tuple[str, ...]:
    """The names of the models in a run folder, as `open_finished` opens them: `federated`, `federated.s8`, `local:north`.

    A model that sites pass on among themselves is the same at each, and opened without a site too.
    """
    at_server = [_without_fold(p) for p in sorted((run / "weights").glob("*.safetensors"))]
    study = read_study(run / "study.toml", check_data=False)
    at_server = [name for name in at_server if not _is_apart(study, name)]
    stay = {name for name, (_, stays) in _known(study).items() if stays}
    kept = (p for p in sorted((run / "sites").glob("*/models/*.safetensors")) if p.name.partition(".")[0] in stay)
    at_sites = [
        f"{_without_fold(p)}:{p.parts[-3]}" for p in kept if not p.stem.endswith(BEST) and p.parts[-3] in study.sites
    ]
    return tuple(dict.fromkeys(at_server + at_sites))


def _known(study: Study) -> dict[str, tuple[str, bool]]:
    """Model -> its protocol, and whether it stays at its sites."""
    return {name: about for members in settings(study) for setting in members for name, about in names(setting).items()}


def open_finished(run: Path, name: str | None = None, *, apart: bool = False) -> Finished:
    """A model of a run folder; without a name that of the study's own protocol and first seed.

    Args:
        name: as in results.json; `.s8` after it asks for seed 8, where there are several, and `.f0` for one fold alone.
        apart: also one whose fronts stay at their sites; its files have the rest.

    Raises:
        StudyError: no run folder, or it holds no such model as a whole, or some of its folds are missing.
    """
    if not (run / "plans.json").is_file():
        raise StudyError(f"{run} is no run folder: it has no plans.json. Give the folder that `concilium run` printed.")
    study = read_study(run / "study.toml", check_data=False)
    name = name or study.protocol.name
    if not apart and _is_apart(study, name):
        raise StudyError(
            f"Model {name} of {run} is nowhere as a whole: by [protocol] fronts = 'stay' each site's front stays there, and the "
            "run folder holds the rest. Allowed: a model whose fronts were sent. Segment new patients with all sites together: "
            "put them into their imagesTs, and go on with the run (--resume), if its study says new_patients = true."
        )
    files = _files(run, _somewhere(run, study, name), n_folds=len(folds_of(study)))
    if _is_one(study, name):
        name = name.partition(":")[0]  # whosever it is: it is the same
    about = json.loads((run / "dataset.json").read_text(encoding="utf-8"))
    labels = from_nnunet(about)
    title, site = title_of(name), name.partition(":")[2]  # what is made beside a model has its plan
    own_plan = _plan_of(run, study, title, site)
    return Finished(
        run,
        name,
        _trained_by(study, title),
        own_plan.read_text(encoding="utf-8"),
        tuple(about["channel_names"].values()),
        labels,
        about["file_ending"],
        files,
        _unknown(run, study, title, site, labels),
    )


def _trained_by(study: Study, title: str) -> Study:
    """What a model was trained by: its variant, or for a baseline the study without defences."""
    if title in BASELINES:
        return undefended(study)
    return study.variants.get(title.partition(WITHOUT)[0], study)


def _is_apart(study: Study, name: str) -> bool:
    """Whether nobody has the named model as a whole."""
    title = title_of(name)
    return title not in BASELINES and fronts_stay(_trained_by(study, title))


def _is_one(study: Study, name: str) -> bool:
    """Whether the named model is the same at every site."""
    title = name.partition(":")[0].partition(".")[0]
    return title == title_of(name) and is_one(_known(study).get(title, ("", False))[0])


def _somewhere(run: Path, study: Study, name: str) -> str:
    """The name with a site where a model lies that is the same at every one; any other as it is."""
    if ":" in name or not _is_one(study, name):
        return name
    without_fold = re.sub(r"\.f\d+$", "", name)
    places = (known.partition(":") for known in finished_models(run))
    site = next((where for model, _, where in places if model == without_fold), "")
    return f"{name}:{site}" if site else name


def _unknown(run: Path, study: Study, title: str, site: str, labels: Labels) -> tuple[str, ...]:
    known = run / "annotated.json"
    if not known.is_file():
        return ()
    told = json.loads(known.read_text(encoding="utf-8"))
    if site and site in _sites_with_own_heads(run, study, title):
        return unknown_labels(labels, [told[site]])
    return unknown_labels(labels, [names for name, names in told.items() if name != title.partition(WITHOUT)[2]])


def _sites_with_own_heads(run: Path, study: Study, title: str) -> Collection[str]:
    """The sites at which the layers that make a model's logits saw that site only."""
    trained_by = study.variants.get(title.partition(WITHOUT)[0], study)
    if title == "local" or trained_by.protocol.name == "local":
        return study.sites
    noted = run / "own_heads.json"
    if noted.is_file():
        return cast("list[str]", json.loads(noted.read_text(encoding="utf-8")).get(title, []))
    return () if {"heads", "decoder"}.isdisjoint(trained_by.sharing.keep) else study.sites  # of an earlier version


def _plan_of(run: Path, study: Study, title: str, site: str) -> Path:
    """The file of the plan that a model was made by: its setting's, and there its site's, where these differ.

    The baselines belong to the study's own setting: `local` trains by the site's plan too.
    """
    setting = study.protocol.name if title == "local" else title
    places = [run / "plans" / setting / f"{site}.json", run / "plans" / f"{title}.json", run / "plans.json"]
    return next(p for p in places if p.is_file())


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
