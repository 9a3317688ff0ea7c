"""What a study may say: a frozen dataclass for each table of the file. A default is what an omitted key means."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from concilium.data.partition import Partition
from concilium.data.shifts import Shift
from concilium.messages import Guard, PlugIn, Training
from concilium.protocols._cohort import fewest


@dataclass(frozen=True)
class StudyTable:
    name: str
    """Names the run folder, and the study in reports."""
    seed: int = 0
    """Of initial weights, batches and all other chance."""
    max_excluded: float = 0.1
    """Largest share of a site's cases that may be set aside before the study stops."""
    seeds: int = 1
    """Every model is trained with so many seeds: `seed`, `seed` + 1, ..."""


@dataclass(frozen=True)
class SiteTable:
    data: Path | None = None
    """nnU-Net raw folder: dataset.json, imagesTr, labelsTr. Between hospitals each site knows its own, and this is not read."""
    values: tuple[str, ...] | None = None
    """In a partition by key or csv: the values of the site's cases; omitted: its name."""
    share: float | None = None
    """In a partition by size: its part of the patients, relative to the others'; omitted by all: equal parts."""
    annotated: tuple[str, ...] | None = None
    """The labels that were looked for at this site; the others are unknown there, not background. Omitted: as its dataset.json
    says, or all. Between hospitals `annotated` in `site.toml`. In a partition by labels its label maps keep only these."""
    shift: Shift | None = None
    """What is done to its images, in a simulation."""
    labels: Mapping[str, str] | None = None
    """Its own names of labels, where they differ -> the study's. Between hospitals: `label_names` in the site's `site.toml`."""
    channels: Mapping[str, str] | None = None
    """The same of channels (`channel_names`)."""
    holds: tuple[str, ...] | None = None
    """In `vertical`: the channels that it contributes, in the study's words; [] of one whose images serve for its labels only."""
    micro_batch: int | Literal["auto"] | None = None
    """How many patches fit into its memory at once: a larger batch is trained in so large parts, to the same step. `auto`: as
    many as the memory at hand allows. Omitted: a batch fits. Between hospitals `micro_batch` in the site's `site.toml`."""


@dataclass(frozen=True)
class ProtocolTable:
    rounds: int
    """How many rounds there are."""
    name: str = "federated"
    """Who computes what, and talks when: a plug-in, whose own options stand in this table too."""
    steps: int | None = None
    """Optimiser steps per site and round ..."""
    epochs: float | None = None
    """... or passes over the site's own training cases per round."""
    compare: tuple[Literal["local", "centralized"], ...] = ()
    """Baselines that are trained too: every site alone; all data in one place, for a site's steps and for all sites' steps."""
    min_sites: int | None = None
    """A round in which fewer sites answer stops the study; omitted: 2, or 1 where only one site is asked."""
    round_seconds: float | None = None
    """Deadline of a round; omitted: none."""
    time_box: bool = False
    """Whether a site that would not be done by the deadline stops before it, and answers with the steps it took; otherwise it
    fails in that round. Its update then counts for so much less. A run with it cannot be repeated to the bit."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The protocol's own, which stand in the same table."""


@dataclass(frozen=True)
class PlanTable:
    configuration: str = "3d_fullres"
    """Of nnU-Net's plan: `2d`, `3d_fullres` or `3d_lowres`."""
    planner: Literal["default", "resenc_m", "resenc_l", "resenc_xl"] = "default"
    """Of nnU-Net: its plain encoder, or one of its presets with residual encoders."""
    memory_gb: float | None = None
    """GPU memory that the plan is made for; omitted: the planner's own (8 GB for the default)."""
    exact_geometry: bool = False
    """Let sites tell the shape and spacing of every case in full; otherwise binned."""
    fingerprint: Literal["pooled", "site"] = "pooled"
    """pooled: one plan, from the statistics of all sites. site: each has its own, and networks share what they have in common."""


@dataclass(frozen=True)
class SharingTable:
    keep: tuple[str, ...] = ()
    """What stays at each site: `norms`, `statistics` (of norms), `heads`, `stem`, `decoder`, `adapters`, `biases`, `ends` (front
    and tail in `splitfed`), or patterns of tensors' names."""
    unseen: Literal["none", "mean", "reestimate"] = "none"
    """What a site that did not train gets for what stays, and the test set: nothing, and every site's model is tested by itself;
    the mean of the sites', fetched once at the end; or this with running statistics estimated on its own images, unlabelled."""
    match: Literal["resolution", "intersection", "published"] = "resolution"
    """Of plans by site: tensors of one name and shape are shared by those that have them, at least two; only if all have them; or
    by the names that the network's authors gave."""


@dataclass(frozen=True)
class PersonalizeTable:
    steps: int | None = None
    """How many plain steps every site trains the finished model on for itself; omitted: none. Both are scored."""
    tensors: tuple[str, ...] = ()
    """Which tensors then change, by roles or patterns as in `[sharing] keep`; omitted: all."""
    learning_rate: float | None = None
    """Of the first of these steps; omitted: that of training."""


@dataclass(frozen=True)
class StartTable:
    """What stands in `[network]` beside the network's own options, and is the server's business."""

    weights: Path | None = None
    """Start from these: a run folder (`RUN`, or `RUN#MODEL`), nnU-Net's model folder, a .safetensors or .pth file. Nothing (`""`)
    in a variant: drawn weights, whatever the study starts from."""
    min_matched: float = 0.9
    """Smallest share of the network's values, heads not counted, that the weights must give."""


@dataclass(frozen=True)
class PreprocessingTable:
    name: Literal["nnunet", "resize"] = "nnunet"
    """nnU-Net's own, or every image at one size, which is then one patch."""
    size: tuple[int, ...] | None = None
    """Of resize: voxels along the last two axes (configuration 2d) or all three, the file's last axis first."""
    intensity: Literal["zscore", "0-1"] | tuple[float, ...] = "zscore"
    """Of resize: each image's mean and deviation to 0 and 1, its range to 0 to 1, or the range from low to high."""


@dataclass(frozen=True)
class TrainingTable:
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """sgd: with Nesterov momentum, as in nnU-Net."""
    learning_rate: float | None = None
    """Omitted: 0.01 for sgd (nnU-Net's), 0.001 for adam and adamw."""
    weight_decay: float = 3e-5
    """Of the optimiser."""
    momentum: float = 0.99
    """Of sgd."""
    batch_size: int | None = None
    """Patches in a batch; omitted: the plan's."""
    patch_size: tuple[int, ...] | None = None
    """[voxels], in the order of the plan's axes; omitted: the plan's."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of training and segmenting; weights are float32 throughout."""
    foreground: float = 0.33
    """Share of the patches in a batch that are centred on a foreground voxel."""
    mirror: bool = True
    """Mirror patches while training, and average over mirrored images when segmenting."""
    augmentation: Literal["nnunet", "none"] = "nnunet"
    """nnU-Net's random transforms, or none."""
    clip_norm: float = 12.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    deep_supervision: bool = True
    """Also compute the loss at the coarser resolutions of the decoder."""
    loader_workers: int = 0
    """Processes that make batches ahead; 0: none."""
    tensors: tuple[str, ...] = ()
    """Which tensors train, by roles or patterns as in `[sharing] keep`; the others are frozen, and never travel. Omitted: as the
    network itself says, or all; `["*"]`: all."""
    views: int = 0
    """How many augmented patches there are of each case, drawn once and for all; 0: new ones in every step. What stages at the
    network's beginning that do not train make of each is computed once, but in `splitfed` and `dp_sgd`."""


@dataclass(frozen=True)
class ValidationTable:
    folds: int = 5
    """Into how many parts each site's cases are divided, by patient; one of them validates."""
    fold: int | Literal["all"] = 0
    """The part that validates. `all`: every model is trained once per fold; its members together segment the test set."""
    every: int | None = None
    """Score the validation cases after every so many rounds, for the curves; omitted: only at the end."""
    select: Literal["last", "best"] = "last"
    """Which weights a model ends with: those of the last round, or of the scored round whose validation Dice is best."""
    leave_one_site_out: bool = False
    """Train also once without each site, and score there."""
    tolerance: float = 1.0
    """Of the normalised surface Dice: mm where the spacing is known, pixels where not."""


@dataclass(frozen=True)
class EngineTable:
    name: str = "simulation"
    """Where the sites are: all on this machine, or in hospitals (`flare`)."""
    workers: int = 1
    """1: sites are answered one at a time in this process; more: in that many processes."""
    threads: int = 0
    """Threads a site computes with; 0: the machine's cores divided by the workers. Other thread counts give other bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    cache: Path | None = None
    """Folder for preprocessed cases; omitted: inside the run folder."""
    pictures: bool = True
    """Whether sites keep a picture of each scored case, for the report of a simulation and for their own."""


@dataclass(frozen=True)
class ForecastTable:
    mbit: float = 100.0
    """Of each site's link to the server, both ways, in Mbit/s."""
    ms: float = 20.0
    """From a site to the server and back, in milliseconds."""
    site_gflops: float | None = None
    """What a site's machine sustains, in 1e9 operations a second; omitted: as this machine, where a step is timed."""
    server_gflops: float | None = None
    """The same of the server's."""


@dataclass(frozen=True)
class Study:
    """Everything that a run depends on."""

    study: StudyTable
    sites: Mapping[str, SiteTable]
    protocol: ProtocolTable
    test: SiteTable | None = None
    partition: Partition | None = None
    """One data set that is divided into the sites; omitted: every site has its own."""
    plan: PlanTable = PlanTable()
    preprocessing: PreprocessingTable = PreprocessingTable()
    network: PlugIn = PlugIn("nnunet")
    start: StartTable = StartTable()
    """Its keys stand in `[network]`."""
    training: TrainingTable = TrainingTable()
    aggregation: PlugIn = PlugIn("mean")
    collect: PlugIn = PlugIn("plain")
    loss: PlugIn = PlugIn("dice_ce")
    local_update: PlugIn = PlugIn("plain")
    defences: tuple[PlugIn, ...] = ()
    """What is done, in this order, to the maps that leave a site in split training, in prediction too."""
    filters: tuple[PlugIn, ...] = ()
    """What is done, in this order, to each update before it leaves its site: it bounds what a site tells, not what a patient
    does."""
    sharing: SharingTable = SharingTable()
    personalize: PersonalizeTable = PersonalizeTable()
    validation: ValidationTable = ValidationTable()
    engine: EngineTable = EngineTable()
    forecast: ForecastTable | None = None
    """Links and machines, for what `concilium plan` forecasts; with it the report of a run puts that beside what was measured."""
    variants: Mapping[str, Study] = field(default_factory=dict)
    """The same study with some tables replaced, by name; trained in the same run on the same folds."""


def undefended(study: Study) -> Study:
    """The study as models are trained by it of which no map leaves its site."""
    return dataclasses.replace(study, defences=())


def guard_of(study: Study, cut: tuple[str, ...] | None = None) -> Guard:
    """The study's defences, where its network is cut, or at another cut."""
    if not study.defences:
        return Guard()
    options = study.protocol.options
    own = options["cut"]
    after = cut or ((own,) if isinstance(own, str) else tuple(own))
    return Guard(study.defences, after, bool(options.get("reveal_labels")))


def with_seeds(study: Study, seeds: int | None) -> Study:
    """The study, with so many seeds in place of its own."""
    return study if seeds is None else dataclasses.replace(study, study=dataclasses.replace(study.study, seeds=seeds))


def goes_on(before: str, after: str) -> bool:
    """Whether a run of one study may go on as the other (both as `to_toml` writes them): the same one, or with more seeds."""
    one, other = tomllib.loads(before), tomllib.loads(after)
    fewer, more = one["study"].pop("seeds"), other["study"].pop("seeds")
    return one == other and fewer <= more


def least_sites(study: Study) -> int:
    """How many sites must answer in a round: what the study says, or 2 where so many are asked."""
    p = study.protocol
    return p.min_sites or min(2, fewest(study.sites, p.options, 2))


def training_of(study: Study) -> Training:
    """The part of the study that a site needs to train."""
    t = study.training
    rate = t.learning_rate if t.learning_rate is not None else (0.01 if t.optimizer == "sgd" else 0.001)
    return Training(
        t.optimizer, rate, t.weight_decay, t.momentum, t.precision, t.foreground, t.mirror, t.augmentation, t.clip_norm,
        t.deep_supervision, t.loader_workers, study.loss, study.local_update, t.tensors, t.views,
    )  # fmt: skip
