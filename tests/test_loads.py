"""What a step asks of a machine, told from shapes: beside what PyTorch's allocator saw where the step was really taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from concilium.errors import StudyError
from concilium.freezing import freezing, front_of
from concilium.loads import Load, split_loads, whole_load
from concilium.messages import PlugIn
from concilium.network_sizes import plan_for
from concilium.networks import Stages, make_network
from concilium.optimization import autocast, clip_and_step, make_optimizer
from concilium.study.tables import TrainingTable

Build = Callable[..., Stages]
NETWORKS = [("nnunet", (24, 24, 16), 1), ("unet", (64, 64), 3), ("cgnet", (64, 64), 3), ("segnet", (64, 64), 3)]
of_each_network = pytest.mark.parametrize(("name", "size", "channels"), NETWORKS, ids=[n for n, *_ in NETWORKS])


def built(name: str, size: tuple[int, ...], channels: int) -> Build:
    options = {} if name in ("nnunet", "cgnet") else {"base_features": 8}
    plan = plan_for(size, base_features=8)
    return partial(make_network, PlugIn(name, options), n_channels=channels, n_labels=3, plan=plan)


def training(**changes: Any) -> Any:
    return TrainingTable(**{"optimizer": "adamw", "learning_rate": 1e-3, "deep_supervision": False} | changes)


def allocated(build: Build, batch: tuple[int, ...], told: Any) -> int:
    """Most bytes that PyTorch's allocator had given out while a model was built and took two steps."""
    images, labels = torch.rand(batch), torch.randint(0, 3, (batch[0], *batch[2:]))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network = build(deep_supervision=False)
        received = {name: t.clone() for name, t in network.state_dict().items()}
        optimizer = make_optimizer(network, told)
        for _ in range(2):
            optimizer.zero_grad()
            with autocast(torch.device("cpu"), told.precision):
                (logits,) = network(images)
            p, truth = logits.float().softmax(1), functional.one_hot(labels, 3).movedim(-1, 1).float()
            overlap = 2 * (p * truth).sum() / (p.sum() + truth.sum())
            torch.autograd.backward(functional.cross_entropy(logits.float(), labels) - overlap)
            clip_and_step(network.parameters(), optimizer, 12.0)
        assert received
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@of_each_network
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_memory_is_what_a_step_takes(name: str, size: tuple[int, ...], channels: int, precision: str) -> None:
    """Within a seventh: kernels hold a little more than the tensors that can be seen."""
    build, batch = built(name, size, channels), (4, channels, *size)
    told = training(precision=precision)
    found = whole_load(build, batch, told).memory / allocated(build, batch, told)
    assert 0.85 <= found <= 1.1


@pytest.mark.slow
@of_each_network
def test_a_network_that_is_cut_asks_for_the_same_work_in_two_places(
    name: str, size: tuple[int, ...], channels: int
) -> None:
    build, batch = built(name, size, channels), (2, channels, *size)
    whole = whole_load(build, batch, training())
    for cut in ("shallow", "deep"):
        site, server = split_loads(build, (cut,), batch, training(), reveal_labels=False)
        assert site.flops + server.flops == whole.flops, cut
        assert max(site.memory, server.memory) < whole.memory < 1.3 * (site.memory + server.memory)
    shallow, deep = (
        split_loads(build, (cut,), batch, training(), reveal_labels=False)[0].flops for cut in ("shallow", "deep")
    )
    assert shallow < deep, "a deep cut leaves more of the network at the site"


def test_work_is_arithmetic_on_shapes() -> None:
    """One convolution of 2 to 4 channels, 3×3, over 8×8: forward, and back to the weights but not to the image."""
    from concilium.networks import Stage

    class One(Stage):
        takes = leaves = 1

        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False)

        def forward(self, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.convolution(*maps),)

    told = whole_load(lambda **_: Stages({"head0": One()}), (5, 2, 8, 8), training(optimizer="sgd", momentum=0.0))
    assert told.flops == 2 * (2 * 2 * 4 * 9 * 8 * 8 * 5)


def test_what_is_computed_at_a_time_takes_memory_and_no_more_work() -> None:
    build, batch = built("unet", (64, 64), 3), (8, 3, 64, 64)
    whole, parts = whole_load(build, batch, training()), whole_load(build, batch, training(), at_once=2)
    assert parts.flops == whole.flops
    assert parts.memory < 0.5 * whole.memory
    assert whole_load(build, batch, training(), at_once=100) == whole


@pytest.mark.parametrize(("optimizer", "momentum", "n"), [("sgd", 0.0, 0), ("sgd", 0.9, 1), ("adam", 0.9, 2)])
def test_the_optimisers_state_is_in_it(optimizer: str, momentum: float, n: int) -> None:
    build, batch = built("unet", (16, 16), 3), (1, 3, 16, 16)
    weights = sum(4 * p.numel() for p in build(deep_supervision=False).parameters())
    without = whole_load(build, batch, training(optimizer="sgd", momentum=0.0)).memory
    found = whole_load(build, batch, training(optimizer=optimizer, momentum=momentum)).memory
    assert found - without == n * weights


def test_a_network_that_would_fill_any_memory_is_told_at_once() -> None:
    build = built("unet", (256, 256), 3)
    told = whole_load(build, (4096, 3, 256, 256), training())
    assert isinstance(told, Load)
    assert told.memory > 100e9
    assert type(torch.empty(1)) is torch.Tensor  # nothing of the pretence is left


def test_a_cut_that_is_not_possible_is_refused() -> None:
    with pytest.raises(StudyError, match=r"cut = \['nowhere'\] is not possible"):
        split_loads(built("unet", (16, 16), 3), ("nowhere",), (1, 3, 16, 16), training(), reveal_labels=False)


def test_maps_that_are_kept_cost_nothing_again() -> None:
    """Of a front that does not train, where cases have a fixed number of views."""
    size = (2, 3, 64, 64)
    build = freezing(partial(built("unet", size[2:], 3), deep_supervision=False), ["decode*", "heads"])
    divided = front_of(build(deep_supervision=False))
    assert divided is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        divided[0].run((torch.rand(size),))
    once, kept = (whole_load(build, size, training(views=views)) for views in (0, 4))
    assert once.flops - kept.flops == counter.get_total_flops() > 0


def test_the_memory_of_maps_that_are_kept_is_what_making_them_takes() -> None:
    """The front is run on each view once: that may be the most that is ever held, although nothing is kept for the way back."""
    size = (1, 3, 256, 256)
    build = freezing(partial(built("unet", size[2:], 3), deep_supervision=False), ["heads"])
    divided = front_of(build(deep_supervision=False))
    assert divided is not None
    largest = 0
    with torch.no_grad():
        for name in divided[0].names:
            for module in divided[0][name].modules():
                module.register_forward_hook(lambda m, i, out: sizes.append(max(t.nbytes for t in _tensors(out))))
        sizes: list[int] = []
        divided[0].run((torch.rand(size),))
    largest = max(sizes)
    assert whole_load(build, size, training(views=4)).memory > 2 * largest  # what goes into a layer, and what it leaves


def _tensors(out: object) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [t for t in out if isinstance(t, torch.Tensor)]  # type: ignore[attr-defined]
