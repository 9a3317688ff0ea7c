"""What tests of split training share: small networks and jobs, a real site behind packed messages, and training of the whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from concilium import catalog, wire
from concilium.aggregation import weight_of
from concilium.aggregation.mean import rule as mean
from concilium.answers import Job, Settings
from concilium.answers.train import Learner
from concilium.collect.plain import collect as plain
from concilium.data.draws import digest
from concilium.data.patches import Batch
from concilium.engines import SiteInfo, Traffic
from concilium.messages import (
    Failure,
    PlugIn,
    Reply,
    Request,
    Tensors,
    Train,
    Training,
)
from concilium.networks import Stack, Stage, Stages
from concilium.networks.nnunet import build as nnunet
from concilium.networks.unet import build as unet
from concilium.protocols import WEIGHTS, Round, start_with
from concilium.protocols.splitfed import splitfed
from concilium.site import Site
from concilium.wire import Envelope, part

CPU = torch.device("cpu")
SEED, STEPS, LONG, EQUAL = 7, 8, 20, 1e-9
TRAINING = Training(
    "sgd", 0.01, 1e-3, 0.9, "float32", 0.33, True, "none", 1e9, True, 0, PlugIn("dice_ce"), PlugIn("plain")
)  # fmt: skip
CHANNELS, LABELS = 2, 3
PATCH = {2: (16, 16), 3: (4, 16, 16)}
STRIDES = {2: [[1, 1], [2, 2], [2, 2], [2, 2]], 3: [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]}
POINTS = {
    "nnunet": ("down0", "down1", "down2", "down3", "up2", "up1", "up0"),
    "unet": ("down0", "encode0", "down1", "encode1", "down2", "encode2", "up1", "decode1", "up0", "decode0"),
}

# --------------------------------------------------------------------------------------------- a network, data and sites


def plan_of(dims: int) -> dict[str, Any]:
    """As nnU-Net's planner writes it; four levels, so that deep supervision trains a head besides the finest."""
    arguments = {
        "n_stages": 4,
        "features_per_stage": [4, 8, 8, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * 4,
        "strides": STRIDES[dims],
        "n_conv_per_stage": [1] * 4,
        "n_conv_per_stage_decoder": [1] * 3,
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    requires = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    architecture = {"network_class_name": name, "arch_kwargs": arguments, "_kw_requires_import": requires}
    return {"patch_size": [*PATCH[dims]], "architecture": architecture}


def network(name: str, dims: int, deep_supervision: bool) -> Stages:
    """In float64, with weights that are drawn anew each time: what trains must have come in a message."""
    return built(name, dims, deep_supervision).double()


def built(name: str, dims: int, deep_supervision: bool) -> Stages:
    known: dict[str, Any] = {"n_channels": CHANNELS, "n_labels": LABELS, "plan": plan_of(dims)}
    match name:
        case "nnunet":
            return nnunet(**known, deep_supervision=deep_supervision)
        case "unet":
            return unet(**known, base_features=4, levels=3)
        case "unet batch":
            return unet(**known, base_features=4, levels=3, norm="batch")
        case "pooling":
            return pooling_network()
    name, _, norm = name.partition(" ")
    build: Callable[..., Stages] = catalog.load("networks", name)
    return build(**known, deep_supervision=deep_supervision, **small(name), **({"norm": norm} if norm else {}))


def small(name: str) -> dict[str, Any]:
    """Options that make a network of the zoo as small as it gets."""
    if name == "sam":
        encoder = {"width": 8, "depth": 3, "heads": 2, "window": 3, "patch": 4, "image_size": 16}
        return encoder | {"decoder_features": 16, "adapt": "adapters"}
    few = {"base_features": 4, "refine_features": 4, "head_features": 4, "window": 3}
    options = catalog.options("networks", name)
    blocks = {"blocks": tuple(min(n, 4) for n in options["blocks"].default)} if "blocks" in options else {}
    levels = {"levels": 2} if name == "ducknet" else {}  # its blocks are large
    return {option: n for option, n in few.items() if option in options} | blocks | levels


class Noise:
    """Batches of noise in float64, a function of their key."""

    views_in = None

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def draw(self, *key: str | int) -> Batch:
        generator = torch.Generator().manual_seed(digest(*key))
        image = torch.randn(1, CHANNELS, *PATCH[self.dims], generator=generator, dtype=torch.float64)
        labels = [torch.randint(0, LABELS, (1, 1, *PATCH[self.dims]), generator=generator).short()]
        for stride in STRIDES[self.dims][1:-1]:
            labels.append(labels[-1][(..., *(slice(None, None, s) for s in stride))])
        return Batch(image, tuple(labels))


def job_of(
    name: str = "nnunet", dims: int = 2, deep_supervision: bool = True, *, n_cases: int = 1, **changes: Any
) -> Job:
    """A site that is ready to train, without a file."""
    strides = SimpleNamespace(pool_op_kernel_sizes=STRIDES[dims])
    plan: Any = SimpleNamespace(batch_dice=False, batch_size=2, configuration=strides)
    batches: Any = Noise(dims)
    entries: Any = {"training": (None,) * n_cases, "validation": ()}
    training = Training(**{**vars(TRAINING), "deep_supervision": deep_supervision, **changes})
    labels = {"background": 0, "a": 1, "b": 2}
    build = lambda deep_supervision=deep_supervision: network(name, dims, deep_supervision)  # noqa: E731
    return Job(plan, labels, CHANNELS, build, training, SEED, entries, batches)


class Engine:
    """Delivers in memory what was packed, to real sites; the order of replies is drawn from `seed`."""

    def __init__(self, jobs: Mapping[str, Job], folder: Path, seed: int = 0) -> None:
        self.sites = {name: SiteInfo(name, "site") for name in jobs}
        self.traffic = {name: Traffic() for name in jobs}
        self.members: dict[str, Site] = {}
        self.down: list[tuple[str, Any]] = []
        self.up: list[tuple[str, Any]] = []
        self._outstanding: dict[str, bytes] = {}
        self._random = random.Random(seed)
        for name, job in jobs.items():
            settings = Settings(name, "site", {}, None, folder / name, folder, torch.get_num_threads(), "cpu")
            self.members[name] = Site(settings, run="r", epoch=0)
            self.members[name]._job = job

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        assert not self._outstanding.keys() & requests.keys(), "one request outstanding per site"
        for name, request in requests.items():
            self._outstanding[name] = wire.pack(request)
            self.traffic[name].down += len(self._outstanding[name])
            self.down.append((name, request))

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        while self._outstanding:
            name = self._random.choice(sorted(self._outstanding))
            packed = self._outstanding.pop(name)
            back = self.members[name].handle(packed, Envelope("r", 0, len(self.up)), lambda: False)
            self.traffic[name].up += len(back)
            self.up.append((name, wire.unpack(back)))
            yield self.up[-1]

    def cancel(self, sites: Iterable[str]) -> None:
        raise AssertionError("nobody cancels here")

    def close(self) -> None:
        self._outstanding.clear()


def first_weights(job: Job) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {n: t.clone() for n, t in job.network().state_dict().items()}


WEIGH = weight_of("mean")


def running(
    protocol: Any, engine: Engine, jobs: Mapping[str, Job], *, start: Tensors | None = None, **changes: Any
) -> Iterator[Round]:
    """The rounds of a protocol with what `line.py` supplies."""
    job = next(iter(jobs.values()))
    supplied: dict[str, Any] = {
        "model": "m", "collect": partial(plain, weigh=WEIGH), "rule": mean, "rounds": 1,
        "steps": dict.fromkeys(jobs, STEPS), "min_sites": len(jobs), "deadline_s": None, "network": job.network,
        "training": job.training, "seed": SEED, "reveal_labels": True, "device": CPU, "weigh": WEIGH,
        "cases": {n: len(j.entries["training"]) for n, j in jobs.items()},
    }  # fmt: skip
    rounds: Iterator[Round] = protocol(engine, start_with(start or first_weights(job)), **supplied | changes)
    return rounds


def trained_apart(job: Job, cut: Sequence[str], folder: Path, **changes: Any) -> tuple[dict[str, Tensor], Engine]:
    """The weights after split training at one site, and the engine with all that was said."""
    engine = Engine({"a": job}, folder)
    options = {"variant": "v2", "cut": tuple(cut), **changes}
    *_, last = running(splitfed, engine, {"a": job}, **options)
    return part(last.tensors, WEIGHTS), engine


def trained_whole(
    job: Job, *, rounds: int = 1, steps: int = STEPS, site: str = "a", start: Tensors | None = None
) -> Tensors:
    """The weights after the site's own training of the whole network on the same batches."""
    learner = Learner(job, CPU)
    weights: Tensors = start or first_weights(job)
    for number in range(1, rounds + 1):
        request = Train("m", number, (number - 1) * steps, steps, rounds * steps, weights, True)
        weights = learner.train(request, site=site, cancelled=lambda: False).weights
    return weights


@cache
def whole(name: str, dims: int, deep_supervision: bool, *, steps: int = STEPS) -> Tensors:
    return trained_whole(job_of(name, dims, deep_supervision), steps=steps)


def difference(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys()
    assert all(t.dtype == torch.float64 or not t.is_floating_point() for t in (*a.values(), *b.values()))
    return max(float((a[n] - b[n]).abs().max()) for n in a)


# --------------------------------------------------------------------------------------------- networks with whole numbers


class Convolve(Stage):
    takes = leaves = 1

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(n_in, n_out, 3, padding=1)

    def forward(self, *maps: Tensor) -> Stack:
        return (self.convolution(maps[0]).tanh(),)


class Pool(Convolve):
    """Leaves the places of the maxima, whole numbers, beneath the map."""

    takes, leaves = 1, 2
    kinds = ("places", "features")

    def forward(self, *maps: Tensor) -> Stack:
        pooled, places = functional.max_pool2d(maps[0], 2, return_indices=True)
        return (places.to(torch.uint8), *super().forward(pooled))


class Unpool(Convolve):
    takes, leaves = 2, 1

    def forward(self, *maps: Tensor) -> Stack:
        places, y = maps
        return (functional.max_unpool2d(*super().forward(y), places.long(), 2),)


class Between(Convolve):
    """Works on the map above places that it has to reach past."""

    takes = leaves = 2
    kinds = ("places", "features")

    def forward(self, *maps: Tensor) -> Stack:
        return (maps[0], *super().forward(maps[1]))


def pooling_network() -> Stages:
    """A small SegNet (Badrinarayanan et al. 2017): the decoder puts each value where the encoder found its maximum."""
    return Stages({
        "down0": Convolve(CHANNELS, 4), "down1": Pool(4, 4), "between1": Between(4, 4), "down2": Pool(4, 4),
        "up1": Unpool(4, 4), "up0": Unpool(4, 4), "head0": Convolve(4, LABELS),
    })  # fmt: skip


def said(messages: Sequence[tuple[str, Any]], kind: type) -> list[Any]:
    return [message for _, message in messages if isinstance(message, kind)]
