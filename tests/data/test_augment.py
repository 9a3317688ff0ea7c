"""The transforms are those of nnU-Net's trainer, but for the blur that chooses its algorithm by timing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from concilium.data.augment import deep_supervision_scales, deep_supervision_weights, mirror_axes, training_transforms
from concilium.data.draws import digest, drawn_from, seed_all
from concilium.data.plan import Plan
from concilium.errors import ContractError

MakePlan = Callable[..., Plan]


def kinds(transforms: Any) -> list[str]:
    return [type(getattr(t, "transform", t)).__name__ for t in transforms.transforms]


def trainer(plan: Plan) -> Any:
    """nnU-Net's trainer with what its set-up of transforms reads, made without its environment."""
    made = object.__new__(nnUNetTrainer)
    made.configuration_manager, made.enable_deep_supervision = plan.configuration, True
    made.print_to_log_file = lambda *_, **__: None
    return made


def build(plan: Plan, **options: Any) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    given = {"mirror": True, "augmentation": "nnunet", "deep_supervision": True, **options}
    return training_transforms(plan, **given)


@pytest.mark.parametrize(("n_dims", "patch"), [(3, [8, 24, 16]), (3, [4, 24, 16]), (2, [32, 24]), (2, [64, 24])])
def test_same_as_the_trainer(n_dims: int, patch: list[int], make_plan: MakePlan) -> None:
    plan = make_plan(n_dims=n_dims, n_channels=2, patch_size=patch)
    transforms, initial, axes = build(plan)
    stock = trainer(plan)
    rotation, flat, stock_initial, stock_axes = stock.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    expected = stock.get_training_transforms(
        patch, rotation, stock._get_deep_supervision_scales(), stock_axes, flat, use_mask_for_norm=[True, False]
    )
    assert initial == tuple(stock_initial)
    assert axes == tuple(stock_axes) == mirror_axes(plan)
    assert kinds(transforms) == kinds(expected)
    assert flat == (patch == [4, 24, 16])
    assert ("Convert3DTo2DTransform" in kinds(transforms)) == flat

    made = []
    for chain in (transforms, expected):
        for part in chain.transforms:
            if isinstance(getattr(part, "transform", None), GaussianBlurTransform):
                part.transform.benchmark = False if chain is expected else part.transform.benchmark
        seed_all("augment", n_dims)
        image, label = torch.randn(2, *initial), torch.randint(-1, 3, (1, *initial), dtype=torch.int16)
        made.append([chain(image=image.clone(), segmentation=label.clone()) for _ in range(12)])
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        assert all(torch.equal(a, b) for a, b in zip(ours["segmentation"], theirs["segmentation"], strict=True))
        assert [tuple(s.shape[1:]) for s in ours["segmentation"]] == sizes(patch, plan)


def sizes(patch: list[int], plan: Plan) -> list[tuple[int, ...]]:
    return [tuple(round(n * s) for n, s in zip(patch, scale, strict=True)) for scale in deep_supervision_scales(plan)]


def test_blur_is_not_timed(make_plan: MakePlan) -> None:
    transforms, _, _ = build(make_plan(n_dims=3, n_channels=2))
    inner = [getattr(t, "transform", t) for t in transforms.transforms]
    blurs = [t for t in inner if isinstance(t, GaussianBlurTransform)]
    assert [blur.benchmark for blur in blurs] == [False]


def test_mirroring_can_be_dropped(make_plan: MakePlan) -> None:
    plan = make_plan(n_dims=3, n_channels=2)
    with_mirror, _, _ = build(plan)
    without, _, axes = build(plan, mirror=False)
    assert axes == ()
    assert [k for k in kinds(with_mirror) if k != MirrorTransform.__name__] == kinds(without)
    assert MirrorTransform.__name__ in kinds(with_mirror)


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_no_augmentation(deep_supervision: bool, make_plan: MakePlan) -> None:
    plan = make_plan(n_dims=3, n_channels=2)
    transforms, initial, axes = build(plan, augmentation="none", deep_supervision=deep_supervision)
    assert (initial, axes) == ((8, 24, 16), ())
    image, label = torch.randn(2, *initial), torch.randint(-1, 3, (1, *initial), dtype=torch.int16)
    out = transforms(image=image.clone(), segmentation=label.clone())
    assert torch.equal(out["image"], image)
    finest = out["segmentation"][0] if deep_supervision else out["segmentation"]
    assert torch.equal(finest, label.clamp(min=0))


def test_unknown_augmentation_is_refused(make_plan: MakePlan) -> None:
    with pytest.raises(ContractError, match="Known are: nnunet, none"):
        build(make_plan(n_dims=3, n_channels=2), augmentation="strong")


def test_deep_supervision_scales(make_plan: MakePlan) -> None:
    plan = make_plan(n_dims=3, n_channels=2)  # strides 1, (1, 2, 2), 2: the deepest level has no output
    assert deep_supervision_scales(plan) == ((1, 1, 1), (1, 0.5, 0.5))


@pytest.mark.parametrize(
    ("n_stages", "weights"), [(5, (4 / 7, 2 / 7, 1 / 7, 0)), (4, (2 / 3, 1 / 3, 0)), (3, (1, 0)), (2, (1,))]
)
def test_deep_supervision_weights(n_stages: int, weights: tuple[float, ...], make_plan: MakePlan) -> None:
    plan = make_plan(n_dims=3, n_channels=2, strides=[[1, 1, 1], *[[2, 2, 2]] * (n_stages - 1)])
    assert deep_supervision_weights(plan) == pytest.approx(weights)


def test_digest_tells_keys_apart() -> None:
    numbers: list[tuple[str | int, ...]] = [(), (1,), (1, 2), (12,), (2, 1), (-1,)]
    keys = [*numbers, ("1",), ("1", "2"), ("1,2",), ("a", ""), ("", "a")]
    assert len({digest(*key) for key in keys}) == len(keys)
    # hashlib.blake2b(b'[7, "north", 1, 3]', digest_size=8), little-endian
    assert digest(7, "north", 1, 3) == 0x3D84C5BAE8B2D943
    with pytest.raises(ContractError, match="float"):
        digest(1.5)  # type: ignore[arg-type]


def test_drawing_leaves_the_generators_alone() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.random(), torch.rand(1).item()

    assert seed_all("a", 1) == digest("a", 1)
    seeded = draw()
    seed_all("before")
    expected = draw()
    seed_all("before")
    with drawn_from("a", 1):
        assert draw() == seeded
    assert draw() == expected
