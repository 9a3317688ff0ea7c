"""One optimisation step of ours against one `nnUNetTrainer.train_step` of the installed nnU-Net."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor

from concilium.answers.objective import make_objective
from concilium.data.fingerprint import fingerprint_of_case, merge
from concilium.data.labels import to_nnunet
from concilium.data.patches import Batch
from concilium.data.plan import Plan, make_plans, open_plan
from concilium.errors import ContractError
from concilium.local_updates import Local
from concilium.local_updates.plain import step
from concilium.messages import Labels, PlugIn, Training
from concilium.networks.nnunet import build, to_library
from concilium.optimization import make_optimizer

TRAINING = Training(
    "sgd", 0.01, 3e-5, 0.99, "float32", 0.33, True, "nnunet", 12.0, True, 0, PlugIn("dice_ce"), PlugIn("plain")
)  # fmt: skip
LABELS: Labels = {"background": 0, "a": 1, "b": 2}


def plan_for(configuration: str, planner: str, labels: Labels | None = None) -> Plan:
    """A small plan by nnU-Net's planner."""
    rng = np.random.default_rng(0)
    shape = (1, 40, 36) if configuration == "2d" else (24, 40, 36)
    image = rng.normal(100, 20, (2, *shape)).astype(np.float32)
    label = np.zeros((1, *shape), np.float32)
    label[..., 10:20, 10:20] = 1
    label[..., 22:30, 12:20] = 2
    fingerprint = merge([fingerprint_of_case(image, label, (2.0, 1.0, 1.0), exact_geometry=False)] * 6)
    plans = make_plans(
        fingerprint, channels=("T1", "T2"), labels=labels or LABELS, file_ending=".nii.gz",
        configuration=configuration, planner=planner, base_features=4, batch_size=2,
    )  # fmt: skip
    return open_plan(plans, configuration)


def batch(plan: Plan, n_ids: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Random patches and label maps at every scale."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(2, 2, *plan.patch_size, generator=generator)
    label = torch.randint(0, n_ids, (2, 1, *plan.patch_size), generator=generator).float()
    scales = [plan.patch_size // stride for stride in np.cumprod(np.array(plan.strides), axis=0)[:-1]]
    return image, [torch.nn.functional.interpolate(label, size=scale.tolist()) for scale in scales]


def trainer(plan: Plan, network: torch.nn.Module, rules: Any = None) -> Any:
    """nnU-Net's own trainer, without the folders its constructor wants."""
    made = object.__new__(nnUNetTrainer)
    made.device = torch.device("cpu")
    made.network = network
    made.grad_scaler = None
    made.is_ddp = False
    made.enable_deep_supervision = True
    made.configuration_manager = plan.configuration
    made.label_manager = rules or SimpleNamespace(has_regions=False, ignore_label=None)
    made.initial_lr, made.weight_decay, made.num_epochs = 0.01, 3e-5, 1000
    made.loss = made._build_loss()
    made.optimizer, _ = made.configure_optimizers()
    return made


@pytest.mark.parametrize("planner", ["default", "resenc_m"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_step_is_nnu_nets_step(configuration: str, planner: str) -> None:
    plan = plan_for(configuration, planner)
    network = plan.configuration
    torch.manual_seed(1)
    ours = build(n_channels=2, n_labels=3, plan=plan.architecture, deep_supervision=True)
    torch.manual_seed(1)
    theirs = get_network_from_plans(
        network.network_arch_class_name, network.network_arch_init_kwargs, network.network_arch_init_kwargs_req_import,
        2, 3, allow_init=True, deep_supervision=True,
    )  # fmt: skip
    image, labels = batch(plan)
    stock = trainer(plan, theirs)
    job: Any = SimpleNamespace(plan=plan, training=TRAINING, labels=LABELS)
    local = Local(ours, make_optimizer(ours, TRAINING), make_objective(job), nullcontext, {}, TRAINING.clip_norm)
    for _ in range(2):  # the second step has momentum
        expected = stock.train_step({"data": image, "target": labels})["loss"]
        loss = step(local, Batch(image, tuple(labels)))
        assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in ours.named_parameters()}
    mapped = to_library(gradients, plan=plan.architecture, n_channels=2, n_labels=3)
    for name, parameter in theirs.named_parameters():
        expected_gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(mapped[name], expected_gradient, rtol=0, atol=1e-5), name
    after = to_library(ours.state_dict(), plan=plan.architecture, n_channels=2, n_labels=3)
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(after[name], tensor, rtol=0, atol=1e-5), name


APART: dict[str, Labels] = {
    "regions": {"background": 0, "whole": (1, 2), "core": 2},
    "ignore": {"background": 0, "a": 1, "ignore": 2},
    "both": {"background": 0, "whole": (1, 2), "core": 2, "ignore": 3},
}


@pytest.mark.parametrize("space", APART)
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_step_with_regions_or_voxels_to_ignore_is_nnu_nets(configuration: str, space: str) -> None:
    labels = APART[space]
    plan = plan_for(configuration, "default", labels)
    n_heads = 2
    rules = plan.manager.get_label_manager(to_nnunet(labels))
    ours = build(n_channels=2, n_labels=n_heads, plan=plan.architecture, deep_supervision=True)
    network = plan.configuration
    theirs = get_network_from_plans(
        network.network_arch_class_name, network.network_arch_init_kwargs, network.network_arch_init_kwargs_req_import,
        2, rules.num_segmentation_heads, deep_supervision=True,
    )  # fmt: skip
    theirs.load_state_dict(to_library(ours.state_dict(), plan=plan.architecture, n_channels=2, n_labels=n_heads))
    stock = trainer(plan, theirs, rules)
    job: Any = SimpleNamespace(plan=plan, training=TRAINING, labels=labels)
    local = Local(ours, make_optimizer(ours, TRAINING), make_objective(job), nullcontext, {}, TRAINING.clip_norm)
    image, targets = batch(plan, 4 if space == "both" else 3)
    if rules.has_regions:
        regions = [*rules.foreground_regions, *([rules.ignore_label] if rules.ignore_label else [])]
        apart = ConvertSegmentationToRegionsTransform(regions=regions)
        targets = [torch.stack([apart(segmentation=x.short())["segmentation"] for x in scale]) for scale in targets]
    for _ in range(2):
        expected = stock.train_step({"data": image, "target": targets})["loss"]
        assert float(step(local, Batch(image, tuple(targets)))) == pytest.approx(float(expected), abs=1e-5)
    mapped = to_library(ours.state_dict(), plan=plan.architecture, n_channels=2, n_labels=n_heads)
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(mapped[name], tensor, rtol=0, atol=1e-5), name


def test_a_loss_that_knows_no_regions_is_refused() -> None:
    job: Any = SimpleNamespace(
        plan=SimpleNamespace(batch_dice=True),
        training=replace(TRAINING, loss=PlugIn("torch.nn.functional:cross_entropy")),
        labels=APART["both"],
    )
    with pytest.raises(ContractError, match="takes no regions and no ignore"):
        make_objective(job)


def test_clipping_is_part_of_it() -> None:
    """With another clip norm the step differs, so the test above would notice."""
    plan = plan_for("2d", "default")
    results = []
    for clip_norm in (12.0, 0.01):
        torch.manual_seed(1)
        ours = build(n_channels=2, n_labels=3, plan=plan.architecture, deep_supervision=True)
        job: Any = SimpleNamespace(plan=plan, training=TRAINING, labels=LABELS)
        local = Local(ours, make_optimizer(ours, TRAINING), make_objective(job), nullcontext, {}, clip_norm)
        image, labels = batch(plan)
        step(local, Batch(image, tuple(labels)))
        results.append(torch.cat([p.detach().flatten() for p in ours.parameters()]))
    assert not torch.allclose(results[0], results[1], rtol=0, atol=1e-5)
