"""Steps in micro-batches are the steps of the whole batch: the same loss, gradient and weights, and less in memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from concilium import catalog
from concilium.answers.micro_batch import layers_that_mix, must_be_divisible, must_be_whole
from concilium.answers.objective import Teacher, make_objective
from concilium.data.patches import Batch
from concilium.errors import DataError
from concilium.local_updates import Local, descend, is_more_than_a_step, logits_of
from concilium.local_updates._besides import draws_patients
from concilium.messages import PlugIn, Training
from concilium.networks.unet import build
from concilium.optimization import autocast, make_optimizer

CPU = torch.device("cpu")
BATCH = 6
TRAINING = Training(
    "sgd", 0.05, 3e-5, 0.9, "float32", 0.33, True, "nnunet", 12.0, True, 0, PlugIn("dice_ce"), PlugIn("plain")
)  # fmt: skip
STRIDES = {2: [[1, 1], [2, 2], [2, 2], [2, 2]], 3: [[1, 1, 1], [2, 2, 2], [1, 2, 2], [2, 2, 2]]}
PATCH = {2: (16, 24), 3: (8, 16, 16)}
MIXED = torch.tensor([[True, True, False], [True, True, True], [True, False, True], [False] * 3] * 2)[:BATCH]
"""What was looked for in each patch: one label, all, the other, nothing."""
UPDATES = [n for n in catalog.names("local_updates") if not (is_more_than_a_step(n) or draws_patients(n))]
in_2d_and_3d = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])


def network(dims: int, *, norm: str = "instance", features: int = 4) -> nn.Module:
    torch.manual_seed(1)
    plan = {"architecture": {"arch_kwargs": {"strides": STRIDES[dims]}}}
    return build(
        n_channels=1, n_labels=3, plan=plan, deep_supervision=True, levels=4, base_features=features, norm=norm
    )


class Smooth(nn.Module):
    """Logits of two scales by functions without a kink: beside one, a last digit may decide, and steps then go apart."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
        self.fine = nn.Sequential(conv(1, 6, 3, padding=1), norm(6, affine=True), nn.Softplus())
        self.coarse = nn.Sequential(conv(6, 8, 3, stride=2, padding=1), norm(8, affine=True), nn.Softplus())
        self.heads = nn.ModuleList([conv(6, 3, 1), conv(8, 3, 1)])

    def forward(self, image: Tensor) -> Sequence[Tensor]:
        fine = self.fine(image)
        return self.heads[0](fine), self.heads[1](self.coarse(fine))


def smooth(dims: int) -> nn.Module:
    torch.manual_seed(1)
    return Smooth(dims)


def batch(dims: int, seed: int = 0, *, annotated: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(BATCH, 1, *PATCH[dims], generator=generator)
    lowest = torch.linspace(-0.5, 2.5, BATCH).view(-1, *[1] * (dims + 1))  # little in one patch, much in another
    label = (image > lowest).float() + (image > lowest + 0.5).float()
    scales = [label]
    for stride in STRIDES[dims][1:-1]:
        size = [n // s for n, s in zip(scales[-1].shape[2:], stride, strict=True)]
        scales.append(nn.functional.interpolate(label, size=size))
    return Batch(image, tuple(s.short() for s in scales), MIXED if annotated else None)


def lent(
    dims: int,
    micro_batch: int | None,
    *,
    loss: str = "dice_ce",
    batch_dice: bool = True,
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
    momentum: float = 0.9,
    made: Callable[[], nn.Module] | None = None,
    scaler: Any = None,
) -> Local:
    training = replace(TRAINING, loss=PlugIn(loss), precision=precision, momentum=momentum)
    plan = SimpleNamespace(
        batch_dice=batch_dice, strides=STRIDES[dims], configuration=SimpleNamespace(pool_op_kernel_sizes=STRIDES[dims])
    )
    job: Any = SimpleNamespace(plan=plan, training=training, labels={"background": 0, "a": 1, "b": 2})
    build_one = made or partial(network, dims)
    one, own = build_one().to(dtype), build_one().to(dtype)
    received = {n: t.clone() for n, t in one.state_dict().items()}
    compute = partial(autocast, CPU, precision)
    objective = make_objective(job)
    personal = Local(own, make_optimizer(own, training), objective, compute, received, 12.0, micro_batch=micro_batch)
    return Local(
        one, make_optimizer(one, training), objective, compute, received, 12.0, scaler=scaler,
        teacher=Teacher(lambda: build_one().to(dtype), received, CPU, compute, micro_batch),
        personal=personal, labels=job.labels, micro_batch=micro_batch,
    )  # fmt: skip


def steps(local: Local, dims: int, n: int, *, update: str = "plain", annotated: bool = False) -> list[float]:
    options = catalog.fill("local_updates", update, {}, "")[0]
    take = partial(catalog.load("local_updates", update), **options)
    dtype = next(local.network.parameters()).dtype
    drawn = [batch(dims, i, annotated=annotated) for i in range(n)]
    return [float(take(local, b._replace(image=b.image.to(dtype)))) for b in drawn]


def apart(one: Local, other: Local) -> float:
    """The largest difference of two weights."""
    a, b = one.network.state_dict(), other.network.state_dict()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@in_2d_and_3d
@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize(
    ("loss", "batch_dice", "annotated"),
    [("dice_ce", True, False), ("dice_ce", False, False), ("marginal", True, True), ("marginal", False, True)],
)
def test_steps_are_those_of_the_whole_batch(dims: int, n: int, loss: str, batch_dice: bool, annotated: bool) -> None:
    """Also of batches of which some patches are annotated in part, and one not at all."""
    make = partial(lent, dims, loss=loss, batch_dice=batch_dice, made=partial(smooth, dims))
    whole = make(None)
    losses = steps(whole, dims, n, annotated=annotated)
    for size in (1, 4):  # 4 and 2 are no equal parts
        parts = make(size)
        assert steps(parts, dims, n, annotated=annotated) == pytest.approx(losses, abs=1e-5)
        assert apart(whole, parts) < 1e-5
    for size in (BATCH, BATCH + 1):
        as_ever = make(size)
        assert steps(as_ever, dims, n, annotated=annotated) == losses
        assert apart(whole, as_ever) == 0, "to the bit"


@pytest.mark.slow
@in_2d_and_3d
@pytest.mark.parametrize(("loss", "annotated"), [("dice_ce", False), ("marginal", True)])
def test_in_double_precision_they_are_equal_to_its_last_digits(dims: int, loss: str, annotated: bool) -> None:
    """Of a U-Net with its kinks and poolings."""
    whole, parts = (lent(dims, size, loss=loss, dtype=torch.float64) for size in (None, 1))
    losses = steps(whole, dims, 5, annotated=annotated)
    assert steps(parts, dims, 5, annotated=annotated) == pytest.approx(losses, abs=1e-12)
    assert apart(whole, parts) < 1e-12


@in_2d_and_3d
def test_adding_up_the_gradients_of_parts_is_something_else(dims: int) -> None:
    """Dice counts overlap over the whole batch: with what is usually done, the tests above would fail."""
    whole, parts = (lent(dims, None, made=partial(smooth, dims)) for _ in range(2))
    drawn = batch(dims)
    loss = whole.objective(logits_of(whole, drawn), drawn)
    loss.backward()  # type: ignore[no-untyped-call]
    parts.optimizer.zero_grad()
    for i in range(BATCH):
        part = Batch(drawn.image[i : i + 1], tuple(y[i : i + 1] for y in drawn.labels))
        (parts.objective(parts.network(part.image), part) / BATCH).backward()  # type: ignore[no-untyped-call]
    grads = [[p.grad for p in local.network.parameters() if p.grad is not None] for local in (whole, parts)]
    assert max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True)) > 1e-3


@pytest.mark.parametrize("update", UPDATES)
def test_every_local_update_takes_them(update: str) -> None:
    """The site's own network too."""
    whole, parts = (lent(2, size, loss="marginal", dtype=torch.float64) for size in (None, 2))
    losses = steps(whole, 2, 5, update=update, annotated=True)
    assert steps(parts, 2, 5, update=update, annotated=True) == pytest.approx(losses, abs=1e-12)
    assert apart(whole, parts) < 1e-12
    assert whole.personal is not None
    assert parts.personal is not None
    assert apart(whole.personal, parts.personal) < 1e-12


def test_in_bfloat16_they_are_equal_to_its_digits() -> None:
    """The weights are float32 throughout; a plain step in bfloat16 is as far from one in float32."""
    whole, parts, full = (
        lent(2, size, precision=precision)
        for size, precision in ((None, "bfloat16"), (2, "bfloat16"), (None, "float32"))
    )
    for local in (whole, parts, full):
        steps(local, 2, 3)
    assert apart(whole, parts) < max(apart(whole, full), 1e-6)


def test_the_scale_of_a_loss_is_taken_out_again_and_a_step_that_overflows_left_out() -> None:
    whole, parts = (lent(2, size, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8)) for size in (None, 2))
    assert steps(parts, 2, 3) == pytest.approx(steps(whole, 2, 3), abs=1e-5)
    assert apart(whole, parts) < 1e-5
    before = {n: t.clone() for n, t in parts.network.state_dict().items()}
    drawn = batch(2)
    loss = parts.objective(logits_of(parts, drawn), drawn)
    descend(parts, loss * math.inf)
    assert all(torch.equal(t, before[n]) for n, t in parts.network.state_dict().items())
    assert parts.scaler is not None
    assert parts.scaler.get_scale() == 2.0**7


class Dropping(nn.Module):
    """Dropout that keeps what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 3, 1)
        self.drawn: list[Tensor] = []

    def forward(self, image: Tensor) -> Sequence[Tensor]:
        y = self.drop(self.conv(image))
        self.drawn.append(y == 0)
        return (self.head(y),)


def test_dropout_draws_the_same_in_both_passes_and_other_numbers_in_each_part() -> None:
    local = lent(2, 2, made=Dropping)
    net: Any = local.network
    drawn = batch(2)
    loss = local.objective(logits_of(local, drawn), drawn)
    assert len(net.drawn) == 3
    after = torch.get_rng_state()
    descend(local, loss)
    assert torch.equal(torch.get_rng_state(), after), "whoever draws next is not disturbed"
    first, second = net.drawn[:3], net.drawn[:2:-1]
    assert all(any(torch.equal(a, b) for b in second) for a in first)
    assert not torch.equal(first[0], first[1])


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakKeyDictionary[Any, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and (storage := t.untyped_storage()) not in self.known:
                self.known[storage] = size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self._gone, size)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


def held(size: int | None) -> int:
    """The most that a step holds at once."""
    local = lent(2, size, momentum=0.0)
    drawn = batch(2)
    with Alive() as alive:
        descend(local, local.objective(logits_of(local, drawn), drawn))
    return alive.most


def test_a_step_holds_the_graph_of_one_part_at_a_time() -> None:
    """And of the whole batch the logits, with what the loss makes of them."""
    whole, parts = held(None), held(1)
    assert parts < 0.6 * whole


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_a_network_that_looks_at_whole_batches_is_refused(norm: str) -> None:
    net: Any = network(2, norm=norm)
    assert bool(layers_that_mix(net)) == (norm == "batch")
    for fits in (None, BATCH, BATCH + 1):
        must_be_divisible(fits, BATCH, "plain", net)
    if norm != "batch":
        must_be_divisible(1, BATCH, "plain", net)
        return
    with pytest.raises(DataError, match=r"micro_batch = 1 is not allowed .* of which 14 layers") as e:
        must_be_divisible(1, BATCH, "plain", net)
    assert e.value.code == "micro_batch"


def test_statistics_that_are_kept_would_be_kept_twice() -> None:
    assert layers_that_mix(nn.Sequential(nn.InstanceNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True))) == ["1"]


def test_whoever_runs_whole_batches_is_refused() -> None:
    net: Any = network(2)
    with pytest.raises(DataError, match=r"micro_batch = 2 is not allowed with .*nnunet_trainer"):
        must_be_divisible(2, BATCH, "nnunet_trainer", net)
    must_be_divisible(BATCH, BATCH, "nnunet_trainer", net)
    must_be_whole(BATCH, BATCH, "splitfed")
    must_be_whole(None, BATCH, "splitfed")
    with pytest.raises(DataError, match="micro_batch = 2 is not allowed in split training") as e:
        must_be_whole(2, BATCH, "splitfed")
    assert e.value.code == "micro_batch"
