"""nnU-Net's augmentation as its trainer sets it up (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z), without the trainer.

One setting differs: nnU-Net's Gaussian blur times two algorithms and takes the faster, whose results differ in the last bits.
Here it always convolves directly, so that a batch does not depend on the load of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from concilium.data.draws import drawn_from
from concilium.data.labels import Labels, foreground, has_regions, ignored
from concilium.data.plan import Plan
from concilium.errors import ContractError
from concilium.nnunet_parts import GaussianBlurTransform, nnUNetTrainer

Transforms: TypeAlias = Callable[..., dict[str, Any]]
"""Called with `image` float32 (C, *patch) and `segmentation` int16 (1, *patch); returns both, augmented, under these names."""

AUGMENTATIONS = ("nnunet", "none")


def training_transforms(
    plan: Plan, *, mirror: bool, augmentation: str, deep_supervision: bool, labels: Labels | None = None
) -> tuple[Transforms, tuple[int, ...], tuple[int, ...]]:
    """The transforms, the size of the patch they must be given [voxels], and the axes that they mirror.

    `augmentation` is `nnunet` or `none` (patches as they are; nnU-Net's validation transforms). With deep supervision the
    label map comes out as a list, one per `deep_supervision_scales`. If `labels` hold regions it comes out as bool (R, *patch),
    with a last channel for `ignore` where there is one.
    """
    if augmentation not in AUGMENTATIONS:
        raise ContractError(
            f"Augmentation {augmentation!r}. Known are: {', '.join(AUGMENTATIONS)}. Choose one of them."
        )
    scales = [list(scale) for scale in deep_supervision_scales(plan)] if deep_supervision else None
    final = tuple(int(n) for n in plan.configuration.patch_size)
    apart: dict[str, Any] = {}
    if labels is not None and has_regions(labels):
        apart = {"regions": list(foreground(labels).values()), "ignore_label": ignored(labels)}
    if augmentation == "none":
        return nnUNetTrainer.get_validation_transforms(scales, **apart), final, ()
    trainer = _trainer(plan)
    rotation, flat, initial, axes = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(trainer)
    axes = axes if mirror else ()
    transforms = nnUNetTrainer.get_training_transforms(
        final,
        rotation,
        scales,
        axes,
        flat,
        use_mask_for_norm=plan.configuration.use_mask_for_norm,
        **apart,
    )
    return repeatable(transforms), tuple(int(n) for n in initial), tuple(axes)


def repeatable(transforms: Transforms) -> Transforms:
    """The same transforms, with one algorithm for each blur (see the module's text)."""
    for part in _tree(transforms):
        if isinstance(part, GaussianBlurTransform):
            part.benchmark = False
    return transforms


GEOMETRIC = ("Spatial", "Mirror", "Transpose", "Rot90", "Convert2D", "Convert3D")
"""How the names of transforms begin that move voxels."""


class in_step:
    """The same transforms for a party of several that have other channels of the same patches.

    Every transform draws from a generator of its own: one that moves voxels from what all parties share, any other from what is
    the party's. So no party's number of channels changes what another draws.
    """

    def __init__(self, transforms: Transforms, party: str) -> None:
        self._parts = list(getattr(transforms, "transforms", [transforms]))
        self._party = party

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        number = int(np.random.randint(2**31))
        for i, part in enumerate(self._parts):
            inner = getattr(part, "transform", part)
            shared = type(inner).__name__.startswith(GEOMETRIC)
            with drawn_from(number, i, "" if shared else self._party):
                arrays = part(**arrays)
        return arrays


def deep_supervision_scales(plan: Plan) -> tuple[tuple[float, ...], ...]:
    """Size of each supervised output relative to the patch, per axis, finest first (the deepest level has no output)."""
    scales = nnUNetTrainer._get_deep_supervision_scales(_trainer(plan))
    return tuple(tuple(float(s) for s in scale) for scale in scales)


def deep_supervision_weights(plan: Plan) -> tuple[float, ...]:
    """Weight of each supervised output in the loss: halved from level to level, 0 for the coarsest, summing to 1.

    After nnU-Net (`nnUNetTrainer._build_loss`); a network with a single output keeps it, where nnU-Net divides 0 by 0.
    """
    n = len(deep_supervision_scales(plan))
    halves = [2.0**-level for level in range(max(1, n - 1))]
    return (*(half / sum(halves) for half in halves), *[0.0] * (n - len(halves)))


def mirror_axes(plan: Plan) -> tuple[int, ...]:
    """The spatial axes along which nnU-Net mirrors: all of them."""
    return tuple(range(len(plan.configuration.patch_size)))


def _trainer(plan: Plan) -> SimpleNamespace:
    """What the methods of nnU-Net's trainer that are called here ask of it."""
    return SimpleNamespace(
        configuration_manager=plan.configuration, enable_deep_supervision=True, print_to_log_file=lambda *_, **__: None
    )


def _tree(transform: Any) -> Iterator[Any]:
    yield transform
    inner = [*getattr(transform, "transforms", ()), *getattr(transform, "list_of_transforms", ())]
    if hasattr(transform, "transform"):
        inner.append(transform.transform)
    for part in inner:
        yield from _tree(part)
