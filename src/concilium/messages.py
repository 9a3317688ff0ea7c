"""Every request and reply that may cross a site's boundary. What is not a type in this file cannot leave a site.

Values are text, numbers, truth values, tuples and mappings of them, tensors, and frozen dataclasses of all these. Replies
hold no name of a case, no path, no image and no label map; a case is known outside its site by a number private to the site.
What is computed for single voxels (maps and their gradients) leaves in split training only (`Maps`, `Gradients`), and where the
site's policy allows it. `Json` (free-form settings) occurs in requests only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, get_args

from torch import Tensor

Tensors: TypeAlias = Mapping[str, Tensor]
Labels: TypeAlias = Mapping[str, int | tuple[int, ...]]
"""Name -> id, or the ids of a region, of which the first is written into label maps (`data/labels.py`)."""
Json: TypeAlias = "bool | int | float | str | tuple[Json, ...] | Mapping[str, Json] | None"

# ----------------------------------------------------------------------------------------------- what messages hold


@dataclass(frozen=True)
class PlugIn:
    """A plug-in by name (`mean`, or `module:function`) with its options."""

    name: str
    options: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Guard:
    """What is done to the maps of a front before they leave, in this order, and where the front ends: as in `Front`."""

    defences: tuple[PlugIn, ...] = ()
    cut: tuple[str, ...] = ()
    reveal_labels: bool = False


@dataclass(frozen=True)
class Training:
    """How a site trains. `None` means: as nnU-Net's plan says."""

    optimizer: str
    learning_rate: float
    weight_decay: float
    momentum: float
    precision: str
    foreground: float
    """Share of patches in a batch that are centred on a foreground voxel."""
    mirror: bool
    augmentation: str
    clip_norm: float
    deep_supervision: bool
    loader_workers: int
    loss: PlugIn
    local_update: PlugIn
    tensors: tuple[str, ...] = ()
    """Which tensors train, by role or pattern; empty: as the network itself says, or all."""
    views: int = 0
    """Augmented patches of each case; 0: new ones in every step."""


@dataclass(frozen=True)
class Frozen:
    """The tensors that do not train. They never travel: each site has them by itself, and compares their SHA-256, `digest`."""

    digest: str = ""
    file: str = ""
    """SHA-256 of the file of weights that they are in, which calls some otherwise (`names`); empty: drawn from the seed."""
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ChannelStatistics:
    """What a site tells about the foreground intensities of one channel. Sums are integers, so that adding them is exact.

    Every case with foreground has the same mass, as in nnU-Net (which draws equally many voxels from each case).
    """

    mean_sum: int
    """Sum over cases of the mean foreground intensity, in units of 2**-1074 (exact for float64)."""
    square_sum: int
    """Sum over cases of the mean squared foreground intensity, in the same units."""
    minimum: float
    maximum: float
    keys: Tensor
    """int32 (K,), ascending: intensities as float32 rounded to 10 mantissa bits."""
    masses: Tensor
    """int64 (K,): mass of each key; a case's masses add up to `fingerprint.CASE_MASS`."""


@dataclass(frozen=True)
class Geometry:
    """How many cases have this shape [voxels] after cropping and this spacing [mm] (binned unless the study says otherwise)."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    count: int


@dataclass(frozen=True)
class RelativeSize:
    """How many cases keep `share` / 1024 of their voxels when cropped to the non-zero region."""

    share: int
    count: int


@dataclass(frozen=True)
class Fingerprint:
    """Statistics of a data set that add up (`data.fingerprint.merge`)."""

    n_cases: int
    n_foreground: int
    channels: tuple[ChannelStatistics, ...]
    geometry: tuple[Geometry, ...]
    relative_sizes: tuple[RelativeSize, ...]
    exact_geometry: bool


@dataclass(frozen=True)
class Excluded:
    """How many cases were set aside for one reason (a word of `errors.DataError.code`)."""

    reason: str
    count: int


@dataclass(frozen=True)
class Score:
    """Metrics of one label in one case. `None` where the metric is undefined."""

    case: int
    """A number private to the site."""
    patient: int
    """A number private to the site."""
    label: str
    status: str
    """`ok`, `empty_reference`, `empty_prediction`, `both_empty` or `not_annotated`."""
    unit: str
    """`mm` or `px`."""
    values: Mapping[str, float | None]
    reference_volume: float
    """[ml], or [px] where the spacing is unknown."""
    prediction_volume: float
    lesions_found: int
    """Connected components of the reference of which at least 10 % of the voxels are predicted (`metrics/_lesions.py`)."""
    lesions_missed: int
    """The others."""
    lesions_false: int
    """Connected components of the prediction without a voxel of the reference."""


@dataclass(frozen=True)
class Average:
    """One metric of one label over the patients of a site, in place of the scores of its cases. Cases of a patient count as one.

    `None` where too few patients have a value: then only how many there are is told.
    """

    label: str
    """Empty: the mean over the labels within each patient, where there are several."""
    metric: str
    n: int
    """Patients with a value."""
    n_cases: int
    n_undefined: int
    """Scores of cases that are undefined."""
    mean: float | None
    deviation: float | None
    """Standard deviation between patients (of a sample)."""


@dataclass(frozen=True)
class Spent:
    """What a site's updates of a model have told of any one of its patients so far, by its own account: (epsilon, delta)."""

    epsilon: float
    delta: float
    epsilon_of_run: float
    """Of all models of the run that were trained so: they add up."""
    noise: float
    """Deviation of the noise, as a multiple of the largest norm of a patient's gradient."""
    rate: float
    """Chance of each patient in each step."""
    steps: int


@dataclass(frozen=True)
class Card:
    """A site's public sealing key, with which others seal what that site alone can open (`sealing.py`). Bytes are uint8 (n,)."""

    site: str
    """As in the study."""
    key: Tensor
    certificate: Tensor
    """The site's certificate (DER) and its signature of run, site and key; both empty in a simulation."""
    signature: Tensor


@dataclass(frozen=True)
class Keys:
    """A site's public keys for one round of masked updates: on one card that of shares, on the other that of its masks."""

    share: Card
    mask: Card


@dataclass(frozen=True)
class Masking:
    """How the updates of a round are masked, so that the server sees their sum alone (`masking.py`)."""

    threshold: int
    """So many sites must be in the sum, and help to unmask it."""
    bits: int
    """Of one masked value: 16, 32 or 64."""
    range: float
    """Largest change of a value in a round that can be said."""
    counts: str
    """What an update counts: `cases`, times the share of the steps; or `equal`, that share alone."""


@dataclass(frozen=True)
class Holding:
    """What a site contributes where channels of the same patients lie at several sites (`vertical`)."""

    channels: tuple[str, ...]
    """Of those in its files, in this order; none: its images serve for their geometry only."""
    labelled: bool
    """Whether its label maps are those that are trained on; those of any other site are not read."""


@dataclass(frozen=True)
class Examine:
    """Read the data set; answer what may be told of it."""

    exact_geometry: bool
    max_excluded: float
    holding: Holding | None = None
    """With it images are not cropped, and where there are no labels intensities are those of whole images."""
    common: bool = False
    """Tell of the cases only that `Align` named."""


@dataclass(frozen=True)
class Offer:
    """Show which cases the site has, blinded with a secret of its own (`alignment.py`)."""

    holding: Holding
    subset: str = "known"
    """`new`: those in `imagesTs`, of which nobody has a label map yet."""
    begins: bool = True
    """Whether nothing was trained yet; after that the cases are those that the run began with."""


@dataclass(frozen=True)
class Blind:
    """Blind these points of other sites with the site's own secret too. uint8 (n, 32) each."""

    points: tuple[Tensor, ...]


@dataclass(frozen=True)
class Align:
    """Train on these of the cases that the site offered, and on no others; `apart` lie elsewhere in space at another site, and
    `lost` are those that a site cannot use. Those that are `new` are segmented together, and never trained on."""

    holding: Holding
    rows: tuple[int, ...]
    apart: tuple[int, ...]
    subset: str = "known"
    lost: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prepare:
    """Preprocess all cases by this plan (nnU-Net's own JSON) and get ready to train.

    The sites have agreed on `channels`, in this order, and on `labels`; each re-maps its own by name. Empty: as they are there.
    """

    plans: str
    configuration: str
    network: PlugIn
    training: Training
    folds: int
    fold: int
    seed: int
    max_excluded: float
    channels: tuple[str, ...] = ()
    labels: Labels = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    """Which tensors of the network stay at the site, by role or pattern (`sharing.kept_of`)."""
    holding: Holding | None = None
    """What the site contributes of `channels`; then its cases are those that `Align` named."""
    patients: tuple[int, ...] = ()
    """With `holding`: which of those cases are of one patient, as whoever has the labels says."""
    guard: Guard = Guard()
    """Of models that are split; those that train in one place have none of it."""
    filters: tuple[PlugIn, ...] = ()
    """What is done, in this order, to each update before it leaves."""
    frozen: Frozen = Frozen()

    @property
    def labelled(self) -> bool:
        return self.holding is None or self.holding.labelled


@dataclass(frozen=True)
class Describe:
    """Say which tensors the network has that may be shared: asked where sites have plans of their own."""


@dataclass(frozen=True)
class Share:
    """From now on share exactly these tensors, and keep the others."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Train:
    """Take `steps` optimiser steps of `model`, starting at `first_step` of `total_steps`.

    `weights` replace the site's own, by name: all that are shared; without them the site goes on from where it is.
    """

    model: str
    round: int
    first_step: int
    steps: int
    total_steps: int
    weights: Tensors
    send_weights: bool
    control: Tensors = field(default_factory=dict)
    """What a local update exchanges beside the weights: the server's total."""
    alone: bool = False
    """Whether nothing of this model is shared: a local update that needs the shared weights then gives way to `plain`."""
    begins: bool = False
    """Whether the site has not answered for this model yet: what it keeps then begins as the site draws it, or as sent."""
    seconds: float | None = None
    """By when the site answers, with the steps that it has taken by then; `None`: when all are taken."""
    shown: bool = False
    """Whether other sites will be sent the update as it is, to judge it."""


@dataclass(frozen=True)
class Front:
    """Run the front of a network that is split at `cut` on the batch of this step, and send the maps that the body reaches.

    With the first step of a round come the weights of front and tail; with every other one the gradients of the maps sent in the
    step before, with which the site first finishes that step. Maps are in the order of the stack, the lowest first; gradients in
    that of the float maps. Both, in all four messages of a step, are tensors as `transport.encode` makes them of `transport`.
    """

    model: str
    round: int
    cut: tuple[str, ...]
    reveal_labels: bool
    """Whether heads may act on maps that the server made (`Policy.labels`)."""
    step: int
    """Within the round, from 0."""
    steps: int
    first_step: int
    """Of the round, among `total_steps`."""
    total_steps: int
    weights: Tensors
    gradients: tuple[Tensor, ...]
    begins: bool = False
    """As in `Train`."""
    transport: str = "float32"
    """As what maps and gradients travel (`transport.KINDS`)."""
    party: bool = False
    """Whether the network is one of several parties (`vertical`): then `cut` is the stage after which the tail begins, weights
    are those of the site's own part, and steps in which it is not asked are left out."""
    absent: bool = False
    """Of a party: draw the batch, and send no maps. Where nothing is annotated in it, whoever has the labels answers `Done`."""
    places: tuple[Tensor, ...] = ()
    """Of a party without labels, with the first step that it takes in a round, where patches follow them: of every step of the
    round as in `Placed`."""


@dataclass(frozen=True)
class Where:
    """Say where the patches of these steps of a round lie: to whoever has the labels, where patches follow them."""

    model: str
    round: int
    steps: int


@dataclass(frozen=True)
class Tail:
    """Run the tail on what the body left, and send the loss's gradients with respect to the float maps that come with this."""

    model: str
    round: int
    step: int
    maps: tuple[Tensor, ...]
    order: tuple[int, ...]
    """For each map that the body left: its place among those it was sent, if it left it unchanged; or -1, the next of `maps`."""
    absent: tuple[str, ...] = ()
    """Parties whose maps are missing, where they meet at the site."""


@dataclass(frozen=True)
class Finish:
    """Finish the last step of a round with these gradients, and send the weights of front and tail."""

    model: str
    round: int
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Introduce:
    """Show the site's card, before a round of `model` in which weights are passed on."""

    model: str
    round: int


@dataclass(frozen=True)
class Pass:
    """Train as `train` says, from what `sender` sealed for this site, and seal the weights for the turn of `to` in `to_round`.

    Without a sender from the weights in `train`, or where there are none from the site's own. Without `to` nothing is sealed.
    From the first such request on, the model's weights leave this site sealed or not at all.
    """

    train: Train
    sender: Card | None
    sealed: Tensor
    to: Card | None
    to_round: int
    reveal: bool
    """Whether the server is to have the finished model (`Policy.reveal`)."""

    @property
    def model(self) -> str:
        return self.train.model

    @property
    def round(self) -> int:
        return self.train.round


@dataclass(frozen=True)
class Hand:
    """Seal the weights of `model` for the site `to` once more: to go on from in this round, or after it (`final`) to keep.
    Without `to`: send them in the open, where that was said from the start (`reveal`)."""

    model: str
    round: int
    to: Card | None
    final: bool
    reveal: bool


@dataclass(frozen=True)
class Take:
    """Store what `sender` sealed for this site as the finished model."""

    model: str
    round: int
    sender: Card
    sealed: Tensor
    reveal: bool


@dataclass(frozen=True)
class Hold:
    """Train as `train` says, hold the update back, and show keys for this round. `threshold` and the rest hold for all of it."""

    train: Train
    masking: Masking

    @property
    def model(self) -> str:
        return self.train.model

    @property
    def round(self) -> int:
        return self.train.round


@dataclass(frozen=True)
class Deal:
    """Divide the secrets behind this site's masks among the sites of this round, each share sealed for its holder.
    `weight` and `cases` are what all these sites' updates count together, and how many training cases they have."""

    model: str
    round: int
    keys: tuple[Keys, ...]
    weight: int
    cases: int


@dataclass(frozen=True)
class Mask:
    """Send the update that was held back, masked towards the sites whose shares (sender -> sealed for this site) these are."""

    model: str
    round: int
    shares: Mapping[str, Tensor]


@dataclass(frozen=True)
class Agree:
    """Sign that these sites' masked updates, and no others, are in the sum."""

    model: str
    round: int
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Unmask:
    """Send what this site holds of the survivors' own masks, and of the keys of those that were lost: never both of one site."""

    model: str
    round: int
    agreed: tuple[Card, ...]
    """What other survivors answered to `Agree`."""


@dataclass(frozen=True)
class Evaluate:
    """Segment the cases of `subset` (`training`, `validation`, `all` or `test`) with finished models kept here, and score them.

    The logits of the `members` (one per fold) are averaged; without any, `model` is one model.
    """

    model: str
    subset: str
    metrics: tuple[PlugIn, ...]
    members: tuple[str, ...] = ()
    final: bool = True
    """Whether the model is done, so that the site may keep what it found for its own report."""
    own: bool = False
    """Whether the layers that make its logits are this site's own: they know no label that nobody looked for here."""
    unknown: tuple[str, ...] = ()
    """Labels that no site which trained it looked for."""
    defended: bool = False
    """Whether it was trained with the defences of `Prepare.guard`, and so segments with them."""


@dataclass(frozen=True)
class Look:
    """Run the site's front of a finished model on windows of one of its cases, and send the maps.

    Windows are those of nnU-Net's sliding window with its mirrorings, in that order: `count` of them from `start` on.
    """

    model: str
    subset: str
    case: int
    """Its place among the cases of the subset, the same at every party; of new ones, which not all may have, as in `Align`."""
    start: int
    count: int
    transport: str = "float32"


@dataclass(frozen=True)
class Conclude:
    """Run the tail of a finished model on the maps of these windows; after the last of a case score it (one that is `new`: write
    its label map; without any map: set it aside), and after the last case answer as to `Evaluate`."""

    evaluate: Evaluate
    case: int
    start: int
    maps: tuple[tuple[Tensor, ...], ...]
    """For each window the maps that the tail takes."""
    last: bool
    """Whether these are the case's last windows."""
    after: str
    """The stage after which the tail begins."""
    absent: tuple[str, ...] = ()
    transport: str = "float32"

    @property
    def model(self) -> str:
        return self.evaluate.model


@dataclass(frozen=True)
class Judge:
    """Say how well these weights, another site's update of `model` in this round, fit the first `cases` validation cases."""

    model: str
    round: int
    weights: Tensors
    cases: int


@dataclass(frozen=True)
class Keep:
    """Store these weights as the finished model; without weights, those of the finished model `source`, or of what is trained.

    With `merge` the weights are the shared ones, and those that the site keeps of the model in training are added.
    """

    model: str
    weights: Tensors
    source: str = ""
    personal: str = ""
    """The model in training whose second network, the site's own, is meant; else it is the one that is called so."""
    merge: bool = False


@dataclass(frozen=True)
class Personalize:
    """Train the finished model `source` for `steps` more on the site's own cases, and store it as the finished model `model`.

    Only `tensors` (by role or pattern; empty: all) change. The answer holds no weights.
    """

    model: str
    source: str
    round: int
    """One that no round of training had: batches are drawn by it."""
    steps: int
    learning_rate: float
    deep_supervision: bool
    """Whether the heads below full resolution were trained, and train on."""
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reestimate:
    """Estimate the running statistics of this finished model anew, on the site's own images without their label maps."""

    model: str


@dataclass(frozen=True)
class Fetch:
    """Send the tensors that the site keeps of this model in training, for a network that serves elsewhere (`Policy.kept`)."""

    model: str


@dataclass(frozen=True)
class Snapshot:
    """Write the state of a model to disk under this number; older ones than the one before may go."""

    model: str
    number: int


@dataclass(frozen=True)
class Restore:
    """Go back to the snapshot of this number; number 0 is a model never trained here."""

    model: str
    number: int


@dataclass(frozen=True)
class Forget:
    """Drop the state and the snapshots of a model; with `finished` its finished weights too."""

    model: str
    finished: bool = False


Request: TypeAlias = (
    Examine | Offer | Blind | Align | Prepare | Describe | Share | Train | Where | Front | Tail | Finish | Introduce | Pass
    | Hand | Take | Hold | Deal | Mask | Agree | Unmask | Evaluate | Look | Conclude | Judge | Keep | Personalize | Reestimate
    | Fetch | Snapshot | Restore | Forget
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- replies


@dataclass(frozen=True)
class Examined:
    fingerprint: Fingerprint
    channels: tuple[str, ...]
    labels: Labels
    file_ending: str
    excluded: tuple[Excluded, ...]
    annotated: tuple[str, ...] | None = None
    """The labels that were looked for in some case; `None`: all, in some case."""
    partly: bool = False
    """Whether in some case not all of its labels were looked for."""


@dataclass(frozen=True)
class Offered:
    """The site's own cases, in an order that tells nothing: by name, and by name and geometry. Points, uint8 (n, 32)."""

    cases: Tensor
    geometry: Tensor
    """(2 n, 32): two ways of rounding, one after the other."""
    unusable: tuple[int, ...] = ()
    """Rows of cases that cannot be read or prepared here: nobody trains on them."""


@dataclass(frozen=True)
class Blinded:
    points: tuple[Tensor, ...]


@dataclass(frozen=True)
class Aligned:
    """How many cases; where the labels are, a number for the patient of each, in the order that all sites share."""

    n_cases: int
    patients: tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """Of each step int32 (B, axes): the first voxel of each patch in its case, negative where it begins outside. Patches that
    follow the labels lie around them."""

    places: tuple[Tensor, ...]


@dataclass(frozen=True)
class Looked:
    """For each window the maps that the front left, none of a case that cannot be read; how many windows and cases there are."""

    maps: tuple[tuple[Tensor, ...], ...]
    n_windows: int
    n_cases: int


@dataclass(frozen=True)
class Prepared:
    n_training: int
    n_validation: int
    n_patients: int
    excluded: tuple[Excluded, ...]
    warnings: tuple[str, ...]
    """Sentences from a fixed list, without names."""
    shapes: int = 0
    """With a `holding`: a digest of the shapes of all preprocessed cases, which must be the same at all parties."""


@dataclass(frozen=True)
class Described:
    """Names, shapes and types of the tensors of a site's network, those left out that it keeps anyway."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    n_values: int
    """Of the whole network."""


@dataclass(frozen=True)
class Trained:
    """An update after `n_steps`, fewer than asked for where time was short, or nothing annotated in a batch; after none it does
    not count. `loss` is the mean over the steps; `weights` is empty where they were not asked for."""

    weights: Tensors
    n_cases: int
    n_steps: int
    loss: float
    seconds: float
    control: Tensors = field(default_factory=dict)
    """What the local update adds to the server's total."""
    memory: int = 0
    """Most bytes that its process ever held, or that it took of its GPU; 0: not known."""
    spent: Spent | None = None
    """Of a local update with differential privacy: the account after this round."""


@dataclass(frozen=True)
class Introduced:
    card: Card


@dataclass(frozen=True)
class Passed:
    """What `Train` answers, without weights; those are `sealed` for the next site, where there is one."""

    trained: Trained
    sealed: Tensor


@dataclass(frozen=True)
class Handed:
    """The weights once more: `sealed`, or in the open where the server is to have them."""

    sealed: Tensor
    weights: Tensors


@dataclass(frozen=True)
class Held:
    """What `Train` answers, without weights; the tensors that were held back beside them, and keys for this round."""

    trained: Trained
    beside: tuple[str, ...]
    keys: Keys


@dataclass(frozen=True)
class Dealt:
    """Sealed shares by the site that can open them, and a digest by which a mask put together again is known."""

    shares: Mapping[str, Tensor]
    commitment: Tensor


@dataclass(frozen=True)
class Masked:
    """An update under masks: whole numbers (n,) that look drawn at random."""

    values: Tensor


@dataclass(frozen=True)
class Agreed:
    card: Card
    """Its signature is of who is in the sum."""


@dataclass(frozen=True)
class Unmasked:
    """Shares by site: of the survivors' own masks, and of the mask keys of those that were lost."""

    own: Mapping[str, Tensor]
    lost: Mapping[str, Tensor]


@dataclass(frozen=True)
class Maps:
    """Activations of the front: float maps, whose gradients come back, or whole numbers, which have none. No map at all where
    nothing is annotated in the batch: then no part of the network takes a step."""

    maps: tuple[Tensor, ...]


@dataclass(frozen=True)
class Gradients:
    """Gradients of the loss with respect to the float maps that the tail was sent."""

    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Evaluated:
    """Scores of every case; or where the site keeps them back, what they are on average."""

    scores: tuple[Score, ...]
    excluded: tuple[Excluded, ...]
    seconds: float
    averages: tuple[Average, ...] = ()


@dataclass(frozen=True)
class Judged:
    """The mean soft Dice over cases, and how many; none where the site has none, or too few to tell an average of them."""

    score: float
    n_cases: int


@dataclass(frozen=True)
class Fetched:
    """Tensors that otherwise stay at the site, and how many cases they were trained on."""

    weights: Tensors
    n_cases: int


@dataclass(frozen=True)
class Done:
    pass


# A failure is a value: it travels, is recorded and is shown. None holds the text of an exception.


@dataclass(frozen=True)
class SiteTimeout:
    """No reply by the deadline."""

    seconds: float


@dataclass(frozen=True)
class SiteLost:
    """The site, or the connection to it, is gone."""


@dataclass(frozen=True)
class SiteRefused:
    """The site's own policy forbids it; `rule` names the rule."""

    rule: str


@dataclass(frozen=True)
class SiteError:
    """Something failed at the site: the exception's class, our code, and where to look in the site's own log."""

    exception: str
    code: str
    reference: str


Failure: TypeAlias = SiteTimeout | SiteLost | SiteRefused | SiteError
Reply: TypeAlias = (
    Examined | Offered | Blinded | Aligned | Prepared | Described | Placed | Trained | Introduced | Passed | Handed | Held | Dealt
    | Masked | Agreed | Unmasked | Maps | Gradients | Evaluated | Looked | Judged | Fetched | Done
)  # fmt: skip

REQUESTS: tuple[type, ...] = get_args(Request)
REPLIES: tuple[type, ...] = get_args(Reply)
FAILURES: tuple[type, ...] = get_args(Failure)


HINTS = {
    "out_of_memory": "; in training, a smaller micro_batch at the site may help",
    "out_of_range": "; a value changed by more than [collect] range: raise it, and with it bits",
    "no_weights": "; its site.toml must name a copy of the file that the study starts from (weights = 'PATH')",
    "case_failed": "; a case of before cannot be prepared any more: put its files back, then go on with --resume",
    "cases_changed": "; other cases are at all sites than when the run began: put the data back, or start a new run",
    "frozen_differs": "; what does not train differs from the server's: use one version everywhere, or [network] weights",
    "no_epsilon": "; differential privacy promises nothing any more: more noise ([local_update] noise), or fewer rounds",
    "below_threshold": "; fewer sites than [collect] threshold were left, and nothing was unmasked",
}


def as_failure(reply: Reply | Failure) -> Failure:
    """A failure as it is; for a reply of a type that was not asked for, the failure that it is."""
    return reply if isinstance(reply, Failure) else SiteError("ContractError", "wrong_reply", "")


def describe(failure: Failure) -> str:
    """One line for a person."""
    match failure:
        case SiteTimeout(seconds):
            return f"no reply within {seconds:.0f} s"
        case SiteLost():
            return "lost"
        case SiteRefused(rule):
            return f"refused by its policy ({rule})"
        case SiteError(exception, code, reference):
            where = f"; reference {reference} in the site's own log" if reference else ""
            return f"{code} ({exception}{where}){HINTS.get(code, '')}"
