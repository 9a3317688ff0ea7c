"""Answers to `Look` and `Conclude`: a party's share in segmenting a case with a vertical model.

Windows are those that nnU-Net's predictor asks a network for, in its order, mirrored ones included: every party's predictor asks
for the same, since images have one size. At a party it is given zeros for logits; at the labels, in the end, those computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from concilium.answers import Check, Entry, Job, Settings, noise_key
from concilium.answers._aligned import forget_failed
from concilium.answers.evaluate import Scorer, segment, subset_of
from concilium.answers.new_patients import NEW, note_without
from concilium.answers.split import image_would_leave, shows
from concilium.answers.statistics import Exclusions, count
from concilium.answers.vertical import set_absent
from concilium.data.dataset import reader
from concilium.data.draws import drawn_from
from concilium.data.labels import n_heads
from concilium.data.preprocess import preprocess
from concilium.data.windows import Some, predict_logits
from concilium.errors import ContractError, DataError
from concilium.messages import Conclude, Done, Evaluate, Evaluated, Look, Looked, Tensors
from concilium.networks import Stack
from concilium.networks._fusion import FRONTS, Own, own_part
from concilium.optimization import autocast, floats_of
from concilium.transport import decode, encode

SEGMENTED = "segmented"
"""Folder of a site for label maps of new patients."""
Finished: TypeAlias = Callable[[str], Tensors]
"""Model -> the weights that the site keeps of it."""


class Service:
    """What a party must know between the messages about one case, and about the cases of one evaluation."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._image: tuple[str, NDArray[Any]] | None = None
        self._own: dict[tuple[str, str], Own] = {}
        """Model and kind of message -> the site's part of it, built as an evaluation begins: there are many messages in one."""
        self._logits: list[Tensor] = []
        self._lost: Exclusions = {}
        """The last case that could not be read here, and why."""
        self._noise: tuple[str, ...] = ()
        """What draws the noise of the front that was last built."""
        self._scorer: Scorer | _Writer | None = None
        self._began = 0.0
        forget_failed(settings)

    def look(self, job: Job, finished: Finished, request: Look) -> tuple[Looked, Exclusions]:
        """The maps of these windows; none of a case that cannot be read, which is set aside.

        Raises:
            ContractError: there is no such case, or the weights are not those of this party.
            PrivacyError: the image itself would leave the site.
        """
        entries, _ = subset_of(self._settings, job, request.subset)
        if not entries:
            return Looked((), 0, 0), {}
        entry = _chosen(entries, request.case, self._settings.name)
        own = self._part(job, finished, request, after=FRONTS, labelled=False)
        if self._image is None or self._image[0] != entry.key:
            try:
                self._image = (entry.key, preprocess(entry.case, entry.dataset, job.plan)[0])
            except DataError as e:
                self._lost = {entry.key: (e.code, str(e))}
                return Looked((), 0, len(entries)), self._lost
        some = Some(request.start, request.count)
        window = Windows(own.front, some, n_heads(job.labels))
        with drawn_from(job.seed, "look", entry.key, request.start, *self._noise):  # what defences draw
            _predict(window.to(self._device), self._image[1], job, self._device, some)
        sent = tuple(encode(maps, request.transport) for maps in window.maps)
        return Looked(sent, some.n_windows, len(entries)), {}

    def conclude(
        self, job: Job, finished: Finished, request: Conclude, cancelled: Check
    ) -> tuple[Done | Evaluated, Exclusions]:
        """Take in the maps of these windows; with the last of a case score it, and with the last case answer.

        Raises:
            ContractError: the labels are not here, or the maps are not what the tail needs.
            DataError: the case cannot be read.
        """
        if not job.labelled:
            raise ContractError(
                f"{self._settings.name} was asked to conclude. Only who has the labels can. Report this."
            )
        if request.case == 0 and request.start == 0:
            kind = _Writer if request.evaluate.subset == NEW else Scorer
            self._scorer, self._began = kind(self._settings, job, request.evaluate, self._device), time.monotonic()
        if request.start == 0:
            self._logits = []
        if self._scorer is None:
            raise ContractError(
                f"Case {request.case} came to {self._settings.name} before the first. Start the evaluation again."
            )
        entries, _ = subset_of(self._settings, job, request.evaluate.subset)
        entry = _chosen(entries, request.case, self._settings.name)
        if request.maps:
            self._logits += self._run_tail(job, finished, request)
        else:
            text = f"Case {entry.case.name}: another party cannot use it."
            self._scorer.excluded[entry.key] = self._lost.get(entry.key, ("unusable_elsewhere", text))
        if request.last and request.maps:
            self._scorer.add(entry, [_Replay(self._logits)])
            self._logits = []
            if request.absent:
                note_without(self._settings, request.evaluate.model, entry.case.name, request.absent)
        if not (request.last and request.case == len(entries) - 1):
            return Done(), {}
        scorer, self._scorer = self._scorer, None
        return scorer.reply(time.monotonic() - self._began), scorer.excluded

    def _part(self, job: Job, finished: Finished, request: Look | Conclude, *, after: str, labelled: bool) -> Own:
        """The site's part of the finished model; built anew as an evaluation begins, which may be of other weights."""
        key = (request.model, type(request).__name__)
        if (request.case, request.start) == (0, 0) or key not in self._own:
            whole = job.network(deep_supervision=job.training.deep_supervision and labelled and after == FRONTS)
            own = own_part(whole, self._settings.name, tail_after=after, labelled=labelled)
            names = own.held.state_dict().keys()
            weights = finished(request.model)
            own.held.load_state_dict({n: t for n, t in weights.items() if labelled or n in names})
            self._noise = self._noise if labelled else noise_key(job, request.model, own.front.state_dict())
            self._own = {k: v for k, v in self._own.items() if k[0] == request.model} | {key: own}
        return self._own[key]

    def _run_tail(self, job: Job, finished: Finished, request: Conclude) -> list[Tensor]:
        """The finest logits of each window."""
        tail = self._part(job, finished, request, after=request.after, labelled=True).tail
        if tail is None:
            raise ContractError(f"{self._settings.name} has no tail of {request.model}. Keep it first.")
        tail.to(self._device).eval()
        set_absent(tail, request.absent)
        made = []
        with torch.no_grad(), autocast(self._device, job.training.precision):
            for window in request.maps:
                maps = decode(window, request.transport, dtype=floats_of(tail))
                made.append(tail.run(tuple(m.to(self._device) for m in maps))[-1].float().cpu())
        return made


class Windows(nn.Module):
    """A front in place of a network: keeps what it leaves of some of the windows that it is asked about."""

    def __init__(self, front: nn.Module, some: Some, n_heads: int) -> None:
        super().__init__()
        self.front, self.some, self.n_heads = front, some, n_heads
        self.seen = 0
        self.maps: list[Stack] = []

    def forward(self, image: Tensor) -> Tensor:
        if 0 <= self.some.first + self.seen - self.some.start < self.some.count:
            maps, names = cast(Any, self.front).run((image,)), cast(Any, self.front).names
            if (
                names and not self.maps and any(shows(image, m) for m in maps)
            ):  # a server may have sent weights that copy
                raise image_would_leave(names[-1])
            self.maps.append(maps)
        self.seen += 1
        return image.new_zeros(image.shape[0], self.n_heads, *image.shape[2:])


class _Writer:
    """Label maps of new patients, written where the label holder finds them: `segmented/MODEL` in its folder."""

    def __init__(self, settings: Settings, job: Job, request: Evaluate, device: torch.device) -> None:
        self.excluded: Exclusions = {}
        self._job, self._unknown, self._device = job, request.unknown, device
        self._folder = settings.folder / SEGMENTED / request.model

    def add(self, entry: Entry, networks: Sequence[nn.Module]) -> None:
        """Segment a case and write its label map; one that cannot be is set aside."""
        job, t = self._job, self._job.training
        try:
            label_map, properties = segment(
                entry.case, entry.dataset, plan=job.plan, labels=job.labels, networks=networks, device=self._device,
                mirror=t.mirror, precision=t.precision, unknown=self._unknown,
            )  # fmt: skip
            self._folder.mkdir(parents=True, exist_ok=True)
            ending = entry.dataset.file_ending
            reader(ending)().write_seg(label_map, str(self._folder / f"{entry.case.name}{ending}"), properties)
        except DataError as e:
            self.excluded[entry.key] = (e.code, str(e))

    def reply(self, seconds: float) -> Evaluated:
        """No scores: nobody knows what is right."""
        return Evaluated((), count(self.excluded), seconds)


class _Replay(nn.Module):
    """Logits that were computed already, in place of a network."""

    def __init__(self, logits: Sequence[Tensor]) -> None:
        super().__init__()
        self.logits = iter(logits)

    def forward(self, image: Tensor) -> Tensor:
        return next(self.logits).to(image.device)


def _predict(network: nn.Module, image: NDArray[Any], job: Job, device: torch.device, some: Some) -> None:
    t = job.training
    predict_logits(
        network, image, job.plan, labels=job.labels, device=device, mirror=t.mirror, precision=t.precision, some=some
    )


def _chosen(entries: Sequence[Entry], place: int, site: str) -> Entry:
    if not 0 <= place < len(entries):
        raise ContractError(f"Case {place} was asked for at {site}, which has {len(entries)}. Ask for one of these.")
    return entries[place]
