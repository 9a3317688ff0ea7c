"""Patches out of prepared cases for training, nnU-Net's way."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from concilium.data.augment import Transforms, in_step, training_transforms
from concilium.data.draws import drawn_from
from concilium.data.kept import kept
from concilium.data.labels import Labels
from concilium.data.places import Key, Placing, places_of
from concilium.data.plan import Plan
from concilium.data.preprocess import Array, Prepared, label_rules, open_prepared
from concilium.errors import ContractError, DataError
from concilium.nnunet_parts import nnUNetDataLoader

View: TypeAlias = tuple[str, int]
"""A case, and the number of the view."""


class Batch(NamedTuple):
    """Patches to train on."""

    image: Tensor
    """float32 (B, C, *patch)."""
    labels: tuple[Tensor, ...]
    """int16 (B, 1, *patch), one per supervised scale, finest first. With regions bool (B, R, *patch), one channel per region, and
    a last one where voxels are to be ignored."""
    annotated: Tensor | None = None
    """bool (B, L), by channel of the logits: which labels (background among them) or regions somebody looked for in each patch's
    case. `None`: all of them, in all cases."""
    patients: Tensor | None = None
    """int64 (B,), where patients were drawn, not patches: whose each patch is. Such a batch may be empty, and is a step all the
    same."""
    views: tuple[View, ...] = ()
    """Where cases have a fixed number of views: which each patch is. Never leaves the site."""

    @property
    def is_unknown(self) -> bool:
        """Whether nothing is annotated in any patch."""
        return self.patients is None and self.annotated is not None and not bool(self.annotated.any())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        annotated = None if self.annotated is None else self.annotated.to(device)
        labels = tuple(x.to(device) for x in self.labels)
        return Batch(self.image.to(device), labels, annotated, self.patients, self.views)


Augment: TypeAlias = tuple[Transforms, tuple[int, ...]]
"""Transforms, and the size of the patch that they must be given [voxels]."""


class Batches:
    """Batches of random patches, each a function of its key alone: in any order, in any process, on any thread count.

    Args:
        prepared: the cases by name, or the files they lie in.
        foreground: share of the patches of a batch that are centred on a foreground voxel (the last ones, rounded).
        mirror, augmentation, deep_supervision: as in `augment.training_transforms`.
        augment: in place of these three.
        probabilistic: `foreground` is the chance of every patch, in place of a share of the batch.
        annotated: by channel of the logits what was looked for, of cases where that is not everything.
        party: who draws, where several parties draw the same patches of the same cases, each of its own channels: then places,
            rotations and mirrorings depend on the key alone, and noise on the party too.
        labelled: of a party, whether it has the labels. Where `foreground` is not 0 another must be told the places (`tell`).
        views: how many patches there are of each case, each a function of its number and the first part of the key alone; 0: of
            every key others. Each is centred on foreground by chance.
        views_in: folder in which views are kept, for nothing else; omitted: each is drawn whenever it is needed.
    """

    def __init__(  # noqa: PLR0913  (options of the study)
        self,
        prepared: Mapping[str, Path | Prepared],
        *,
        plan: Plan,
        labels: Labels,
        batch_size: int,
        foreground: float,
        mirror: bool = True,
        augmentation: str = "nnunet",
        deep_supervision: bool = True,
        augment: Augment | None = None,
        probabilistic: bool = False,
        annotated: Mapping[str, tuple[bool, ...]] | None = None,
        party: str | None = None,
        labelled: bool = True,
        views: int = 0,
        views_in: Path | None = None,
    ) -> None:
        if not prepared:
            raise DataError("There are 0 cases to train on. At least one is needed. Add cases, or use fewer folds.")
        transforms, initial = (
            augment
            or training_transforms(
                plan, mirror=mirror, augmentation=augmentation, deep_supervision=deep_supervision, labels=labels
            )[:2]
        )
        if party is not None:
            transforms = in_step(transforms, party)
        self._annotated, self._views, self.views_in = dict(annotated or {}), views, views_in
        files = {name: p.path if isinstance(p, Prepared) else p for name, p in prepared.items()}
        self._files = files
        self._load = partial(
            nnUNetDataLoader,
            patch_size=initial,
            final_patch_size=tuple(plan.configuration.patch_size),
            label_manager=label_rules(plan, labels),
            oversample_foreground_percent=foreground,
            transforms=transforms,
        )
        cases = _Cases(sorted(files), files)
        self._loader = self._load(cases, batch_size, probabilistic_oversampling=probabilistic)
        self._placing = None if party is None else Placing(self._loader, follows=foreground > 0, labelled=labelled)

    def places(self, keys: Sequence[Key]) -> tuple[Tensor, ...]:
        """Of a party: where the patches of these batches lie, each int32 (B, axes of the prepared image)."""
        return tuple(places_of(self._loader, key) for key in keys)

    def tell(self, places: Mapping[Key, Tensor]) -> None:
        """Of a party: take the patches of these batches there."""
        if self._placing is not None:
            self._placing.tell(places)

    def only(self, cases: Sequence[str], batch_size: int) -> Batches:
        """Batches of this size from these cases alone; each patch is centred on foreground by chance."""
        part = copy.copy(self)
        part._loader = self._load(_Cases(sorted(cases), self._files), batch_size, probabilistic_oversampling=True)
        return part

    def draw(self, *key: str | int) -> Batch:
        """The batch of this key. The global random generators and torch's thread count are left as they were."""
        return self.draw_named(*key)[0]

    def draw_named(self, *key: str | int) -> tuple[Batch, tuple[str, ...]]:
        """The same, and the case of each patch: for whoever owns the cases, since a batch that names them must not travel."""
        if self._views:
            batch = self._of_views(key)
            return batch, tuple(case for case, _ in batch.views)
        if self._placing is not None:
            self._placing.begin(key)
        image, labels, cases = _drawn(self._loader, key)
        return Batch(image, labels, self._mask(cases)), cases

    def _of_views(self, key: Key) -> Batch:
        """Of the cases that would be drawn without views, views that are drawn."""
        with drawn_from(*key):
            cases = [str(case) for case in self._loader.get_indices()]
            views = tuple((case, int(np.random.randint(self._views))) for case in cases)
        each = [self._view(key[0], *view) for view in views]
        image, *labels = (torch.cat(tensors) for tensors in zip(*each, strict=True))
        return Batch(image, tuple(labels), self._mask(cases), None, views)

    def _view(self, seed: str | int, case: str, number: int) -> list[Tensor]:
        """Image and label maps of a view, kept or drawn."""

        def make() -> list[Tensor]:
            alone = self._load(_Cases([case], self._files), 1, probabilistic_oversampling=True)
            image, labels, _ = _drawn(alone, (seed, "view", case, number))
            return [image, *labels]

        return kept(self.views_in, (seed, case, number, self._files[case].stem), make)

    def _mask(self, cases: Sequence[str]) -> Tensor | None:
        """What was looked for in each of these cases; `None` where that is everything in all that there are."""
        if not self._annotated:
            return None
        every = (True,) * len(next(iter(self._annotated.values())))
        return torch.tensor([self._annotated.get(case, every) for case in cases])


def _drawn(loader: Any, key: Key) -> tuple[Tensor, tuple[Tensor, ...], tuple[str, ...]]:
    """The batch of this key: image, label maps, and the case of each patch."""
    with drawn_from(*key), _one_thread():
        drawn = loader.generate_train_batch()
    target = drawn["target"]
    labels = tuple(target) if isinstance(target, list) else (target,)
    return drawn["data"], labels, tuple(str(case) for case in drawn["keys"])


def stream(batches: Batches, keys: Sequence[Key], *, workers: int) -> Iterator[Batch]:
    """The batches of these keys, in this order; with `workers` > 0 that many processes make them ahead of time.

    The bits are the same for every number of workers.
    """
    if workers == 0:
        return (batches.draw(*key) for key in keys)
    if workers < 0:
        raise ContractError(
            f"{workers} loader workers. 0 or more are allowed. Use 0 to make batches in the site's own process."
        )
    draws: Any = _Draws(batches, tuple(keys))
    loader: Iterable[Batch] = DataLoader(
        draws,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        multiprocessing_context=_context(),
        generator=torch.Generator(),  # else the loader draws a seed from the global one
    )
    return iter(loader)


@dataclass(frozen=True)
class _Cases:
    """All that nnU-Net's loader asks of a data set."""

    identifiers: list[str]
    files: Mapping[str, Path]

    def load_case(self, name: str) -> tuple[Array, Array, None, dict[str, Any]]:
        case = open_prepared(self.files[str(name)])
        return case.image.view(_Copied), case.label.view(_Copied), None, {"class_locations": case.locations}


class _Copied(np.ndarray[Any, np.dtype[Any]]):
    """An array whose parts are copies: nnU-Net's transforms work in place, and the file must not change under them."""

    def __getitem__(self, key: Any) -> Any:
        return np.array(super().__getitem__(key))


@dataclass(frozen=True)
class _Draws:
    batches: Batches
    keys: tuple[Key, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Batch:
        return self.batches.draw(*self.keys[i])


def _unchanged(batch: Any) -> Any:
    return batch


def _context() -> Any:
    """How loader workers start: never a bare fork, since the site's process has threads.

    A fork server imports nnU-Net once (8 s) for all workers of all rounds; where there is none each worker imports it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
