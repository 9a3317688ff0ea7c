"""Batches are those of nnU-Net's loader and depend on their key alone; predictions are those of nnU-Net's predictor."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from concilium.data.dataset import open_dataset, read_case
from concilium.data.draws import seed_all
from concilium.data.patches import Batch, Batches, stream
from concilium.data.plan import Plan
from concilium.data.preprocess import Prepared, prepare, preprocess, restore
from concilium.data.windows import predict_logits
from concilium.errors import ContractError, DataError

MakePlan = Callable[..., Plan]
Site = tuple[dict[str, Prepared], Plan, dict[str, int]]
CPU = torch.device("cpu")
KEYS = [(7, "north", 1, step) for step in range(6)]


def site(folder: Path, plan: Plan, cache: Path) -> Site:
    dataset = open_dataset(folder)
    return {c.name: prepare(c, dataset, plan, cache) for c in dataset.cases}, plan, dict(dataset.labels)


@pytest.fixture
def site_3d(volumes: Path, make_plan: MakePlan, tmp_path: Path) -> Site:
    return site(volumes, make_plan(n_dims=3, n_channels=2), tmp_path)


@pytest.fixture
def site_2d(pictures: Path, make_plan: MakePlan, tmp_path: Path) -> Site:
    return site(pictures, make_plan(n_dims=2, n_channels=3), tmp_path)


@pytest.fixture
def site_slices(volumes: Path, make_plan: MakePlan, tmp_path: Path) -> Site:
    """Volumes, trained on slices."""
    changes: dict[str, Any] = {"patch_size": [24, 16], "spacing": [1.0, 1.0], "strides": [[1, 1], [2, 2], [2, 2]]}
    return site(volumes, make_plan(n_dims=3, n_channels=2, **changes), tmp_path)


def batches_of(made: Site, **options: Any) -> Batches:
    prepared, plan, labels = made
    given = {"batch_size": 2, "foreground": 0.33, "mirror": True, "augmentation": "nnunet", "deep_supervision": True}
    return Batches(prepared, plan=plan, labels=labels, **{**given, **options})


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a[0], b[0]) and len(a[1]) == len(b[1]) and all(map(torch.equal, a[1], b[1]))


def all_same(a: Iterable[Batch], b: Iterable[Batch]) -> bool:
    return all(same(x, y) for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------------------- training


class InMemory:
    """Cases as nnU-Net's own data sets give them: each patch is cut from fresh arrays."""

    def __init__(self, prepared: dict[str, Prepared]) -> None:
        self.identifiers = sorted(prepared)
        self.prepared = prepared

    def load_case(self, name: str) -> tuple[Any, Any, None, dict[str, Any]]:
        case = self.prepared[name]
        return np.array(case.image), np.array(case.label), None, {"class_locations": case.locations}


def stock_loader(made: Site, *, batch_size: int, foreground: float) -> nnUNetDataLoader:
    """As `nnUNetTrainer.get_dataloaders` makes it, with the blur's benchmark off."""
    prepared, plan, labels = made
    trainer = object.__new__(nnUNetTrainer)
    trainer.configuration_manager, trainer.enable_deep_supervision = plan.configuration, True
    trainer.print_to_log_file = lambda *_, **__: None
    rotation, flat, initial, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transforms = trainer.get_training_transforms(
        plan.configuration.patch_size,
        rotation,
        trainer._get_deep_supervision_scales(),
        axes,
        flat,
        use_mask_for_norm=plan.configuration.use_mask_for_norm,
    )
    for part in transforms.transforms:
        if isinstance(getattr(part, "transform", None), GaussianBlurTransform):
            part.transform.benchmark = False
    rules = plan.manager.get_label_manager({"labels": labels})
    return nnUNetDataLoader(
        InMemory(prepared),
        batch_size,
        initial,
        plan.configuration.patch_size,
        rules,
        oversample_foreground_percent=foreground,
        transforms=transforms,
    )


@pytest.mark.parametrize("name", ["site_3d", "site_2d", "site_slices"])
def test_equals_stock_loader(name: str, request: pytest.FixtureRequest) -> None:
    made: Site = request.getfixturevalue(name)
    ours, theirs = batches_of(made, batch_size=3, foreground=0.5), stock_loader(made, batch_size=3, foreground=0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(12):
            image, labels, *_ = ours.draw(7, "north", 1, step)
            seed_all(7, "north", 1, step)
            expected = theirs.generate_train_batch()
            assert torch.equal(image, expected["data"])
            assert all(torch.equal(a, b) for a, b in zip(labels, expected["target"], strict=True))
    finally:
        torch.set_num_threads(threads)


def test_shapes_and_types(site_3d: Site, site_2d: Site, site_slices: Site) -> None:
    sizes = [((8, 24, 16), (8, 12, 8)), ((32, 24), (16, 12)), ((24, 16), (12, 8))]
    for made, (patch, coarse) in zip([site_3d, site_2d, site_slices], sizes, strict=True):
        image, labels, *_ = batches_of(made).draw("a")
        channels = next(iter(made[0].values())).image.shape[0]
        assert (image.shape, image.dtype) == ((2, channels, *patch), torch.float32)
        assert [(label.shape, label.dtype) for label in labels] == [((2, 1, *n), torch.int16) for n in (patch, coarse)]
        _, single, *_ = batches_of(made, deep_supervision=False).draw("a")
        assert [label.shape for label in single] == [(2, 1, *patch)]
        assert same((image, labels[:1]), (image, single))


def test_other_keys_give_other_batches(site_3d: Site) -> None:
    batches = batches_of(site_3d)
    drawn = [batches.draw(*key)[0] for key in [*KEYS, (7, "south", 1, 0), (8, "north", 1, 0), (7, "north", 2, 0)]]
    assert len({image.numpy().tobytes() for image in drawn}) == len(drawn)


def test_order_and_earlier_draws_do_not_matter(site_3d: Site) -> None:
    forward = [batches_of(site_3d).draw(*key) for key in KEYS]
    batches = batches_of(site_3d)
    backward = [batches.draw(*key) for key in reversed(KEYS)]
    assert all_same(forward, reversed(backward))


def test_order_of_cases_and_open_files_do_not_matter(site_3d: Site) -> None:
    prepared, plan, labels = site_3d
    paths = {name: prepared[name].path for name in reversed(prepared)}
    shuffled = Batches(
        paths,
        plan=plan,
        labels=labels,
        batch_size=2,
        foreground=0.33,
        mirror=True,
        augmentation="nnunet",
        deep_supervision=True,
    )
    assert all_same(stream(batches_of(site_3d), KEYS, workers=0), stream(shuffled, KEYS, workers=0))


def test_threads_do_not_matter(site_3d: Site) -> None:
    before, drawn = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            batches = batches_of(site_3d)
            drawn.append([batches.draw(*key) for key in KEYS])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all_same(*drawn)


def test_files_do_not_change(site_3d: Site) -> None:
    before = {name: p.path.read_bytes() for name, p in site_3d[0].items()}
    for augmentation in ("nnunet", "none"):
        batches = batches_of(site_3d, augmentation=augmentation)
        first = [batches.draw(*key) for key in KEYS]
        assert all_same(first, [batches.draw(*key) for key in KEYS])
    assert before == {name: p.path.read_bytes() for name, p in site_3d[0].items()}


def test_foreground_share(site_3d: Site) -> None:
    batches = batches_of(site_3d, augmentation="none", foreground=1.0)
    for key in KEYS:
        _, (label, *_), *_ = batches.draw(*key)
        assert all((part > 0).any() for part in label)


def test_no_cases_are_refused(site_3d: Site) -> None:
    with pytest.raises(DataError, match="0 cases"):
        batches_of(({}, *site_3d[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_do_not_matter(workers: int, site_3d: Site) -> None:
    batches = batches_of(site_3d)
    here, there = [], []
    for drawn, n in ((here, 0), (there, workers)):
        seed_all("before")
        for batch in stream(batches, KEYS, workers=n):
            drawn.append((batch, random.random(), np.random.random(), torch.rand(1).item()))
    assert all_same([d[0] for d in here], [d[0] for d in there])
    assert [d[1:] for d in here] == [d[1:] for d in there], "what the site draws between batches depends on the workers"


def test_negative_workers_are_refused(site_3d: Site) -> None:
    with pytest.raises(ContractError, match="-1 loader workers"):
        stream(batches_of(site_3d), KEYS, workers=-1)


# --------------------------------------------------------------------------------------------------------- prediction


def network_of(plan: Plan, n_channels: int, n_labels: int, *, deep_supervision: bool) -> Any:
    configuration = plan.configuration
    torch.manual_seed(0)
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        n_channels,
        n_labels,
        deep_supervision=deep_supervision,
    )


class Calls(nn.Module):
    """A network that notes what it is called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.shapes, self.dtypes = network, [], []

    def forward(self, image: Tensor) -> Any:
        out = self.network(image)
        self.shapes.append(tuple(image.shape))
        self.dtypes.append((out[0] if isinstance(out, list) else out).dtype)
        return out


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize(("folder", "n_dims", "n_channels"), [("volumes", 3, 2), ("pictures", 2, 3)])
def test_equals_stock_predictor(
    folder: str,
    n_dims: int,
    n_channels: int,
    mirror: bool,
    make_plan: MakePlan,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, dataset = make_plan(n_dims=n_dims, n_channels=n_channels), open_dataset(request.getfixturevalue(folder))
    case, labels = dataset.cases[0], dataset.labels
    stock_network = network_of(plan, n_channels, len(labels), deep_supervision=False).eval()
    predictor = nnUNetPredictor(use_mirroring=mirror, device=CPU, allow_tqdm=False, perform_everything_on_device=False)
    predictor.manual_initialization(
        stock_network,
        plan.manager,
        plan.configuration,
        [stock_network.state_dict()],
        {"labels": dict(labels)},
        "nnUNetTrainer",
        tuple(range(n_dims)),
    )
    raw, _, raw_properties = read_case(case, dataset)
    expected = predictor.predict_single_npy_array(raw, raw_properties)
    capsys.readouterr()

    # same seed, same weights, and logits finest first
    ours = network_of(plan, n_channels, len(labels), deep_supervision=True)
    image, properties = preprocess(case, dataset, plan)
    logits = predict_logits(ours, image, plan, labels=labels, device=CPU, mirror=mirror, precision="float32")
    assert logits.shape == (len(labels), *image.shape[1:])
    label = restore(logits, plan, labels, properties)
    assert capsys.readouterr().out == ""
    assert ours.training
    assert label.shape == raw.shape[1:]
    assert len(np.unique(label)) > 1, "one label everywhere: nothing is compared"
    assert np.array_equal(label, expected)


def test_windows_and_mirrors(site_3d: Site) -> None:
    prepared, plan, labels = site_3d
    image = prepared["c0"].image  # mapped, read-only
    network = Calls(network_of(plan, 2, 3, deep_supervision=True))
    network.network.encoder.eval()
    modes = [module.training for module in network.modules()]
    predict = partial(predict_logits, network, image, plan, labels=labels, device=CPU, precision="float32")
    plain = predict(mirror=False)
    n = len(network.shapes)
    assert set(network.shapes) == {(1, 2, 8, 24, 16)}
    predict(mirror=True)
    assert len(network.shapes) == n + 8 * n
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(plain, predict(mirror=False))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision(precision: str, site_3d: Site) -> None:
    prepared, plan, labels = site_3d
    network = Calls(network_of(plan, 2, 3, deep_supervision=True))
    predict = partial(predict_logits, image=prepared["c0"].image, plan=plan, labels=labels, device=CPU, mirror=False)
    reduced = predict(network, precision=precision)
    assert set(network.dtypes) == {getattr(torch, precision)}
    exact = predict(network.network, precision="float32")
    assert torch.equal(reduced, exact) == (precision == "float32")
    # not at the image's corners: nnU-Net sums in float16 with weights down to 6e-8, which leaves whole numbers of the logits
    assert (reduced - exact).abs().float().median() < 0.01


def test_unknown_precision_is_refused(site_3d: Site) -> None:
    _, plan, labels = site_3d
    with pytest.raises(ContractError, match="Known are: float32, bfloat16, float16"):
        predict_logits(
            nn.Identity(), torch.zeros(2, 8, 24, 16), plan, labels=labels, device=CPU, mirror=False, precision="int8"
        )
