"""Split training is training of the whole network: `splitfed`, a real site behind packed messages, and the same arithmetic."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from concilium import catalog, wire
from concilium.aggregation import must_see_updates, weight_of
from concilium.aggregation.mean import rule as mean
from concilium.answers import Job, Settings, split
from concilium.answers.objective import make_objective
from concilium.answers.train import Cut, Learner
from concilium.collect.plain import collect as plain
from concilium.data.draws import digest
from concilium.data.patches import Batch
from concilium.engines import SiteInfo, Traffic
from concilium.errors import EngineError, StudyError
from concilium.forecast import split_bytes
from concilium.messages import (
    Failure,
    Front,
    Gradients,
    Maps,
    PlugIn,
    Reply,
    Request,
    Tail,
    Tensors,
    Train,
    Trained,
    Training,
)
from concilium.networks import Stack, Stage, Stages, cut_apart
from concilium.networks.nnunet import build as nnunet
from concilium.networks.unet import build as unet
from concilium.protocols import WEIGHTS, Round, start_with
from concilium.protocols._body import Body
from concilium.protocols.federated import federated
from concilium.protocols.splitfed import splitfed
from concilium.sharing import Sharing
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


# ---------------------------------------------------------------------------------------- one site: every pair of split points

ENOUGH = {
    ("down0", "up0"), ("down1", "up1"), ("down1", "down2"), ("up2", "up0"), ("up1", "up0"), ("down0", "encode0"),
    ("encode0", "decode0"), ("encode0", "down1"), ("encode1", "down2"), ("encode2", "up1"), ("up0", "decode0"),
}  # fmt: skip


def pairs(name: str, dims: int, *, fast: Container[tuple[str, str]]) -> list[Any]:
    """Every pair of split points; those that are not among `fast` only with `./test --all`."""
    return [
        pytest.param(
            name, dims, pair, id=f"{name} {dims}D {' '.join(pair)}",
            marks=[] if pair in fast else [pytest.mark.exhaustive],
        )
        for pair in itertools.combinations(POINTS[name], 2)
    ]  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])
@pytest.mark.parametrize("name", POINTS)
def test_these_are_all_split_points(name: str, dims: int) -> None:
    assert network(name, dims, True).split_points == POINTS[name]


@pytest.mark.parametrize(
    ("name", "dims", "cut"),
    [
        *pairs("nnunet", 2, fast=ENOUGH),
        *pairs("nnunet", 3, fast=ENOUGH),
        *pairs("unet", 2, fast=ENOUGH),
        *pairs("unet", 3, fast=ENOUGH),
    ],
)
def test_split_equals_whole(name: str, dims: int, cut: tuple[str, str], tmp_path: Path) -> None:
    weights, engine = trained_apart(job_of(name, dims), cut, tmp_path)
    assert difference(weights, whole(name, dims, True)) <= EQUAL
    assert difference(weights, first_weights(job_of(name, dims))) > 1e-3, "nothing was trained"
    assert len(engine.up) == 2 * STEPS + 1


@pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])
@pytest.mark.parametrize("name", POINTS)
def test_a_body_of_the_sites_own_is_the_same_for_one_site(name: str, dims: int, tmp_path: Path) -> None:
    weights, _ = trained_apart(job_of(name, dims), ("shallow",), tmp_path, variant="v1")
    assert difference(weights, whole(name, dims, True)) <= EQUAL


@pytest.mark.parametrize("cut", [("deep",), ("shallow",), ("down2", "up0"), ("up2", "up0")], ids=" ".join)
def test_split_equals_whole_without_deep_supervision(cut: tuple[str, ...], tmp_path: Path) -> None:
    weights, _ = trained_apart(job_of(deep_supervision=False), cut, tmp_path)
    assert difference(weights, whole("nnunet", 2, False)) <= EQUAL


@pytest.mark.parametrize("variant", ["v1", "v2", "sequential"])
def test_optimisers_are_carried_over_rounds(variant: str, tmp_path: Path) -> None:
    """Two rounds, against as many steps of the whole network, with their learning rates."""
    batches_by_round = trained_whole(job_of(), rounds=2, steps=STEPS // 2)
    weights, _ = trained_apart(job_of(), ("deep",), tmp_path, variant=variant, rounds=2, steps={"a": STEPS // 2})
    assert difference(weights, batches_by_round) <= EQUAL


# ------------------------------------------------------------------------------------------------- mistakes that are noticed

CROSSED = ("down1", "up0")
"""Up go the skip of `down0` and the map below; down come three maps, of which the coarsest has no part in the loss."""


def tampered(monkeypatch: pytest.MonkeyPatch, who: str, change: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
    """Let `change` have the gradients that the site sends, or those that the body returns."""
    tail, backward = split.Session.tail, Body.backward
    if who == "site":
        monkeypatch.setattr(
            split.Session, "tail", lambda self, request: Gradients(tuple(change([*tail(self, request).gradients])))
        )
    else:
        monkeypatch.setattr(Body, "backward", lambda self, g, **about: tuple(change([*backward(self, g, **about)])))


@pytest.mark.parametrize("factor", [0.0, 2.0], ids=["dropped", "doubled"])
@pytest.mark.parametrize(("who", "position"), [("site", 1), ("site", 2), ("body", 0), ("body", 1)])
def test_a_wrong_gradient_of_one_map_is_noticed(
    who: str, position: int, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(gradients: list[Tensor]) -> list[Tensor]:
        assert len(gradients) == {"site": 3, "body": 2}[who]
        assert gradients[position].any()
        return [g * factor if i == position else g for i, g in enumerate(gradients)]

    tampered(monkeypatch, who, change)
    weights, _ = trained_apart(job_of(), CROSSED, tmp_path)
    assert difference(weights, whole("nnunet", 2, True)) > 1e-6


def test_a_gradient_that_does_not_return_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up0` reaches the maps of coarser heads, which only pass through: the body has no gradient for them but zero."""
    tampered(monkeypatch, "body", lambda gradients: [g for g in gradients if g.any()])
    with pytest.raises(EngineError, match="0 of 1 sites answered"):
        trained_apart(job_of(), ("up1", "up0"), tmp_path)


def forget_what_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on fronts step without the gradients that the tail gave maps which never left the site."""
    finish = split.Session._finish_step

    def too_early(session: split.Session, gradients: Sequence[Tensor]) -> None:
        assert session._own
        session._own = {}
        finish(session, gradients)

    monkeypatch.setattr(split.Session, "_finish_step", too_early)


@pytest.mark.parametrize("cut", [("down1", "down2"), ("deep",), ("up1", "up0")], ids=" ".join)
def test_a_front_that_steps_without_what_the_tail_gave_its_maps_is_noticed(
    cut: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skip that stayed at home (`deep`), or maps that came back unchanged, get a gradient from the tail as well."""
    forget_what_stayed(monkeypatch)
    weights, _ = trained_apart(job_of(), cut, tmp_path)
    assert difference(weights, whole("nnunet", 2, True)) > 1e-6


@pytest.mark.parametrize("variant", ["v1", "v2", "sequential"])
def test_a_body_that_forgets_its_optimiser_between_rounds_is_noticed(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Body.load
    monkeypatch.setattr(Body, "load", lambda self, weights, moments, numbers: load(self, weights, {}, "{}"))
    weights, _ = trained_apart(job_of(), ("deep",), tmp_path, variant=variant, rounds=2, steps={"a": STEPS // 2})
    assert difference(weights, trained_whole(job_of(), rounds=2, steps=STEPS // 2)) > 1e-6


# ------------------------------------------------------------------------------------------------------- what crosses a cut


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


POOLING = [
    # whole numbers pass through the body, stay at home, are made by it, are taken by it
    (("down1", "between1"), (0, -1)),
    (("down1", "up1"), (0, -1)),
    (("down1", "down2"), (0, -1, -1)),
    (("down0", "down2"), (-1, -1, -1)),
    (("down2", "up0"), (-1,)),
]


@pytest.mark.parametrize(("cut", "order"), POOLING, ids=lambda value: " ".join(map(str, value)))
def test_maps_of_whole_numbers_cross_cuts(cut: tuple[str, str], order: tuple[int, ...], tmp_path: Path) -> None:
    weights, engine = trained_apart(job_of("pooling", 2, False), cut, tmp_path)
    assert difference(weights, whole("pooling", 2, False)) <= EQUAL
    tail = said(engine.down, Tail)[0]
    assert tail.order == order
    crossing = (*said(engine.up, Maps)[0].maps, *tail.maps)
    assert any(m.dtype == torch.uint8 for m in crossing)


def said(messages: Sequence[tuple[str, Any]], kind: type) -> list[Any]:
    return [message for _, message in messages if isinstance(message, kind)]


@pytest.mark.parametrize(
    ("name", "cut", "n_up", "order"),
    [
        ("nnunet", ("down1", "up1"), 1, (-1, -1)),  # the skip of down0 stays at home
        ("nnunet", ("down1", "down2"), 1, (0, -1)),  # the body's input is a skip
        ("nnunet", ("up1", "up0"), 3, (1, 2, -1)),  # maps for coarser heads ride along
        ("unet", ("shallow",), 1, (-1,)),
        ("unet", ("encode0", "down1"), 1, (0, -1)),
    ],
)
def test_a_map_that_the_body_leaves_unchanged_is_not_sent_back(
    name: str, cut: tuple[str, ...], n_up: int, order: tuple[int, ...], tmp_path: Path
) -> None:
    _, engine = trained_apart(job_of(name), cut, tmp_path, steps={"a": 2})
    n_down = order.count(-1)
    assert [len(reply.maps) for reply in said(engine.up, Maps)] == [n_up] * 2
    assert [(len(request.maps), request.order) for request in said(engine.down, Tail)] == [(n_down, order)] * 2
    assert [len(reply.gradients) for reply in said(engine.up, Gradients)] == [n_down] * 2
    assert [len(request.gradients) for _, request in engine.down if not isinstance(request, Tail)] == [0, n_up, n_up]


# ---------------------------------------------------------------------------------------------------------- every network

ZOO = [
    n for n in catalog.names("networks") if n not in ("fused", "nnunet", "nnunet_trainer", "unet")
]  # others have tests of their own


def one_more(name: str) -> tuple[str, str]:
    """The middle one of all other cuts that are allowed."""
    net = built(name, 2, False)
    named = {tuple(cut_apart(net, (cut,)).__dict__[part].names[-1] for part in ("front", "body")) for cut in net.cuts}
    last = net.split_points[: -1 if net.names[-2] == net.split_points[-1] else None]  # not right before the head
    others = [pair for pair in itertools.combinations(last, 2) if pair not in named]
    return others[len(others) // 2]


def cuts_of(name: str) -> list[tuple[str, ...]]:
    return [("shallow",), ("deep",), one_more(name)]


EVERY = [*ZOO, "unet", "nnunet"]
EVERY_CUT = [
    pytest.param(name, cut, id=f"{name} {' '.join(cut)}", marks=() if cut == ("deep",) else pytest.mark.slow)
    for name in EVERY
    for cut in cuts_of(name)
]


Apart = Callable[[str, tuple[str, ...]], tuple[dict[str, Tensor], Engine]]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """Split training of a network of the zoo, once for each cut."""

    @cache
    def train(name: str, cut: tuple[str, ...]) -> tuple[dict[str, Tensor], Engine]:
        folder = tmp_path_factory.mktemp("apart")
        return trained_apart(job_of(name, 2, False), cut, folder, reveal_labels=False, steps={"a": LONG})

    return train


@pytest.mark.parametrize(("name", "cut"), EVERY_CUT)
def test_split_equals_whole_for_every_network(name: str, cut: tuple[str, ...], apart: Apart) -> None:
    weights, engine = apart(name, cut)
    assert difference(weights, whole(name, 2, False, steps=LONG)) <= EQUAL
    assert difference(weights, first_weights(job_of(name, 2, False))) > 1e-4, "nothing was trained"
    assert all(map(torch.isfinite, map(torch.sum, weights.values())))
    assert len(engine.up) == 2 * LONG + 1


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["shallow", "deep"])
@pytest.mark.parametrize("name", ["unet", "segnet", "attention_unet", "sunet"])
def test_split_equals_whole_in_3d(name: str, cut: str, tmp_path: Path) -> None:
    job = job_of(name, 3, False)
    weights, _ = trained_apart(job, (cut,), tmp_path, reveal_labels=False, steps={"a": LONG})
    assert difference(weights, whole(name, 3, False, steps=LONG)) <= EQUAL
    assert difference(weights, first_weights(job)) > 1e-4, "nothing was trained"


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_doubled_gradient_is_noticed_in_every_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(monkeypatch, "body", lambda gradients: [2 * g for g in gradients])
    weights, _ = trained_apart(job_of(name, 2, False), ("deep",), tmp_path)
    assert difference(weights, whole(name, 2, False)) > 1e-6


WITH_SKIPS = [
    n for n in EVERY if n not in ("deeplabv3", "sam", "segnet")
]  # two have none, the third's are whole numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SKIPS)
def test_a_skip_that_stays_at_home_without_its_gradient_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_what_stayed(monkeypatch)
    weights, _ = trained_apart(job_of(name, 2, False), ("deep",), tmp_path)
    assert difference(weights, whole(name, 2, False)) > 1e-6


NORMED = [n for n in ZOO if "norm" in catalog.options("networks", n) and n not in ("deeplabv3", "deeplabv3plus")]


@pytest.mark.parametrize("name", NORMED)
def test_running_statistics_are_those_of_the_whole_network(name: str, tmp_path: Path) -> None:
    weights, _ = trained_apart(job_of(f"{name} batch", 2, False), ("deep",), tmp_path)
    assert difference(weights, whole(f"{name} batch", 2, False)) <= EQUAL
    counts = [int(t) for n, t in weights.items() if n.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {STEPS}


@pytest.mark.parametrize(("name", "cut"), EVERY_CUT)
def test_what_travels_is_what_was_forecast(name: str, cut: tuple[str, ...], apart: Apart) -> None:
    """To the byte in every step, whole numbers among it: one byte each, and nothing back."""
    _, engine = apart(name, cut)
    torch.set_default_dtype(torch.float64)
    try:
        network = lambda deep_supervision: built(name, 2, deep_supervision)  # noqa: E731
        forecast = split_bytes(network, cut, batch=(1, CHANNELS, *PATCH[2]), precision="float32")
    finally:
        torch.set_default_dtype(torch.float32)
    returned = [request.gradients for _, request in engine.down if not isinstance(request, Tail)][1:]
    steps = zip(said(engine.up, Maps), said(engine.down, Tail), said(engine.up, Gradients), returned, strict=True)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    for maps, tail, grads, back in steps:
        assert forecast.step_up == size(maps.maps) + size(grads.gradients)
        assert forecast.step_down == size(tail.maps) + size(back)
        floats = [m for m in (*maps.maps, *tail.maps) if m.is_floating_point()]
        assert len(grads.gradients) + len(back) == len(floats)


SMALLER: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x.clone(),
    "means": lambda x: functional.avg_pool2d(x, 2),
    "maxima": lambda x: functional.max_pool2d(x, 4),
    "single": lambda x: x[..., ::2, ::2],
    "among others": lambda x: torch.cat(
        (functional.avg_pool2d(x, 2).tanh(), functional.avg_pool2d(x, 2)[:, :1]), dim=1
    ),
}


class Leak(Convolve):
    """Says nothing of the image that it leaves, made smaller."""

    def __init__(self, how: str) -> None:
        super().__init__(CHANNELS, CHANNELS)
        self.how = how

    def forward(self, *maps: Tensor) -> Stack:
        return (SMALLER[self.how](maps[0]) + 0 * self.convolution.bias.sum(),)


class Back(Convolve):
    """As large as the image, whatever came."""

    def forward(self, *maps: Tensor) -> Stack:
        (y,) = super().forward(maps[0][:, :CHANNELS])
        return (functional.interpolate(y, PATCH[2]),)


@pytest.mark.parametrize("how", SMALLER)
def test_a_site_sends_no_image_and_none_made_smaller(how: str, tmp_path: Path) -> None:
    stages = {"down0": Leak(how), "up1": Back(CHANNELS, 4), "up0": Convolve(4, 4), "head0": Convolve(4, LABELS)}
    job = replace(job_of("unet", 2, False), network=lambda deep_supervision=False: Stages(stages).double())
    with pytest.raises(EngineError, match=r"refused by its policy \(image\)"):
        trained_apart(job, ("down0", "up1"), tmp_path)


@pytest.mark.parametrize("kept", [(), (1,)], ids=["all of air", "one channel of air"])
def test_a_patch_of_air_shows_nothing(kept: tuple[int, ...], tmp_path: Path) -> None:
    """Dead features of a channel that is the same everywhere are no image; a channel that is not, is."""

    class Air(Noise):
        def draw(self, *key: Any) -> Batch:
            batch = super().draw(*key)
            there = torch.tensor([float(i in kept) for i in range(CHANNELS)])
            return batch._replace(image=batch.image * there[:, None, None])

    class Dead(Leak):
        def forward(self, *maps: Tensor) -> Stack:
            return (super().forward(maps[0])[0] * torch.tensor([1.0, 0.0])[:, None, None],)

    stages = {
        "down0": Dead("itself"),
        "up1": Convolve(CHANNELS, 4),
        "up0": Convolve(4, 4),
        "head0": Convolve(4, LABELS),
    }
    job = replace(
        job_of("unet", 2, False),
        network=lambda deep_supervision=False: Stages(stages).double(),
        batches=Air(2),  # type: ignore[arg-type]
    )
    trained_apart(job, ("down0", "up1"), tmp_path)
    stages["down0"] = Leak("itself")
    if kept:
        with pytest.raises(EngineError, match=r"refused by its policy \(image\)"):
            trained_apart(job, ("down0", "up1"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.int8], ids=str)
def test_places_of_another_type_are_refused_at_both_ends(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(maps: Iterable[Tensor]) -> tuple[Tensor, ...]:
        assert any(m.dtype == torch.uint8 for m in maps)
        return tuple(m.to(dtype) if m.dtype == torch.uint8 else m for m in maps)

    forward, front = Body.forward, split.Session.front
    job = job_of("segnet", 2, False)
    with monkeypatch.context() as patch:
        patch.setattr(
            Body, "forward", lambda body, *a: (lambda maps, order: (changed(maps), order))(*forward(body, *a))
        )
        with pytest.raises(EngineError, match="0 of 1 sites answered"):
            trained_apart(job, ("shallow",), tmp_path / "server")
    with monkeypatch.context() as patch:
        patch.setattr(split.Session, "front", lambda own, *a: Maps(changed(front(own, *a).maps)))
        with pytest.raises(EngineError, match="0 of 1 sites answered"):
            trained_apart(job, ("down2", "up0"), tmp_path / "site", reveal_labels=True)


# ------------------------------------------------------------------------------------------------------------------ clipping


def test_site_and_server_each_clip_their_own_gradient(tmp_path: Path) -> None:
    clip, rate = 0.1, 0.5
    job = job_of(clip_norm=clip, learning_rate=rate, momentum=0.0, weight_decay=0.0)
    weights, _ = trained_apart(job, ("deep",), tmp_path, steps={"a": 1})
    net = job.network()
    start = first_weights(job)
    net.load_state_dict(start)
    drawn = job.batches.draw(SEED, "a", 1, 0)
    make_objective(job)(net(drawn.image), drawn).backward()
    body = set(cut_apart(net, ("deep",), reveal_labels=True).body.state_dict())
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}

    def norm(names: Iterable[str]) -> float:
        return float(torch.cat([gradients[n].flatten() for n in names]).norm())

    norms = {"body": norm(body), "site": norm(gradients.keys() - body)}
    assert min(norms.values()) > clip, "both are clipped"
    factor = {n: clip / (norms["body" if n in body else "site"] + 1e-6) for n in gradients}
    assert difference(weights, {n: start[n] - rate * factor[n] * gradients[n] for n in start}) <= EQUAL
    together = clip / (norm(gradients) + 1e-6)
    assert difference(weights, {n: start[n] - rate * together * gradients[n] for n in start}) > 1e-6


# ---------------------------------------------------------------------------------------------------------------- many sites

CASES = {"a": 1, "b": 2, "c": 5}
UNEQUAL = {"a": 4, "b": 2, "c": 4}


def three(name: str = "nnunet") -> dict[str, Job]:
    return {site: job_of(name, n_cases=n) for site, n in CASES.items()}


def one_body_by_hand(jobs: Mapping[str, Job], orders: Sequence[Sequence[str]], cut: tuple[str, ...]) -> Tensors:
    """Each site has a whole network, whose body is one and the same; fronts and tails are averaged after each round."""
    start = first_weights(jobs["a"])
    shared = jobs["a"].network()
    shared.load_state_dict(start)
    body = cut_apart(shared, cut, reveal_labels=True).body
    nets: dict[str, Stages] = {}
    for site in jobs:
        own = copy.deepcopy(shared)
        nets[site] = Stages({n: body[n] if n in body.names else own[n] for n in own.names})
    mine = {site: cut_apart(net, cut, reveal_labels=True).at_site for site, net in nets.items()}

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)

    steppers = {site: [sgd(mine[site])] for site in jobs}
    of_body = sgd(body)
    for number, order in enumerate(orders, start=1):
        for step in range(max(UNEQUAL.values())):
            for site in order:
                n = UNEQUAL[site]
                if step >= n:
                    continue
                both = [*steppers[site], of_body]
                for optimizer in both:
                    optimizer.param_groups[0]["lr"] = 0.01 * (1 - ((number - 1) * n + step) / (len(orders) * n)) ** 0.9
                    optimizer.zero_grad()
                drawn = jobs[site].batches.draw(SEED, site, number, step)
                make_objective(jobs[site])(nets[site](drawn.image), drawn).backward()
                for optimizer in both:
                    optimizer.step()
        states = {site: module.state_dict() for site, module in mine.items()}
        average = {n: sum(CASES[s] * states[s][n] for s in jobs) / sum(CASES.values()) for n in states["a"]}
        for module in mine.values():
            module.load_state_dict(average)
    return nets["a"].state_dict()


@pytest.mark.parametrize("cut", [("shallow",), ("deep",)], ids=" ".join)
def test_one_body_serves_the_sites_batch_by_batch_in_the_drawn_order(cut: tuple[str, ...], tmp_path: Path) -> None:
    jobs = three()
    engine = Engine(jobs, tmp_path)
    *_, last = running(splitfed, engine, jobs, variant="v2", cut=cut, rounds=3, steps=UNEQUAL)
    orders = []
    for number in (1, 2, 3):
        served = [site for site, r in engine.down if isinstance(r, Tail) and r.round == number]
        orders.append(tuple(served[:3]))
        assert sorted(orders[-1]) == sorted(jobs)
        assert served == [s for step in range(4) for s in orders[-1] if step < UNEQUAL[s]]
    assert len(set(orders)) > 1, "drawn for each round"
    assert difference(part(last.tensors, WEIGHTS), one_body_by_hand(jobs, orders, cut)) <= EQUAL
    assert difference(part(last.tensors, WEIGHTS), one_body_by_hand(jobs, [sorted(jobs)] * 3, cut)) > 1e-6


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_the_order_of_arrival_changes_no_bit(variant: str, tmp_path: Path) -> None:
    jobs = three()
    ends = []
    for seed in (0, 1):
        engine = Engine(jobs, tmp_path / str(seed), seed)
        *_, last = running(splitfed, engine, jobs, variant=variant, rounds=2, steps=UNEQUAL)
        ends.append((last.tensors, [site for site, _ in engine.up]))
    assert ends[0][1] != ends[1][1]
    assert all(torch.equal(t, ends[1][0][n]) for n, t in ends[0][0].items())


@pytest.mark.parametrize("name", ["nnunet", "unet batch", "segnet batch", "cgnet batch"])
def test_a_body_for_each_site_is_federated_averaging(name: str, tmp_path: Path) -> None:
    jobs = three(name)
    ends: dict[str, Tensors] = {}
    for protocol in (federated, splitfed):
        engine = Engine(jobs, tmp_path / protocol.__name__)
        *_, last = running(protocol, engine, jobs, rounds=2, steps=UNEQUAL)
        ends[protocol.__name__] = part(last.tensors, WEIGHTS)
    assert difference(ends["splitfed"], ends["federated"]) <= EQUAL


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("median", {}),
        ("trimmed_mean", {"share": 0.2}),
        ("krum", {}),
        ("fednova", {}),
        ("agreement", {}),
        ("momentum", {}),
    ],
)
def test_rules_that_see_updates_see_those_of_whole_networks(rule: str, options: dict[str, Any], tmp_path: Path) -> None:
    """As in federated training, whatever the rule makes of them: front, tail and the site's own body are one update."""
    jobs = three("unet batch")
    sees = must_see_updates(rule)
    how = {"rule": partial(catalog.load("aggregation", rule), **options)}
    how["collect"] = partial(plain, weigh=weight_of(rule), see_updates=sees, spool=tmp_path)
    ends: dict[str, Tensors] = {}
    for protocol in (federated, splitfed):
        engine = Engine(jobs, tmp_path / protocol.__name__)
        *_, last = running(protocol, engine, jobs, rounds=2, steps=UNEQUAL, **how)
        ends[protocol.__name__] = part(last.tensors, WEIGHTS)
    assert difference(ends["splitfed"], ends["federated"]) <= EQUAL
    engine = Engine(jobs, tmp_path / "v2")
    *_, last = running(splitfed, engine, jobs, variant="v2", rounds=1, steps=UNEQUAL, **how)
    assert all(t.isfinite().all() for t in part(last.tensors, WEIGHTS).values())


def test_one_body_is_not_federated_averaging(tmp_path: Path) -> None:
    jobs = three()
    ends: list[Tensors] = []
    for variant in ("v1", "v2"):
        *_, last = running(splitfed, Engine(jobs, tmp_path / variant), jobs, variant=variant, rounds=2, steps=UNEQUAL)
        ends.append(part(last.tensors, WEIGHTS))
    assert difference(*ends) > 1e-6


def one_after_the_other_by_hand(jobs: Mapping[str, Job], orders: Sequence[Sequence[str]]) -> Tensors:
    """One whole network that goes from site to site; what an optimiser keeps of front and tail stays at the site."""
    cut = ("deep",)
    net = jobs["a"].network()
    net.load_state_dict(first_weights(jobs["a"]))
    parts = cut_apart(net, cut, reveal_labels=True)

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)

    of_body, at_site = sgd(parts.body), {site: sgd(parts.at_site) for site in jobs}
    for number, order in enumerate(orders, start=1):
        for site in order:
            for step in range(n := UNEQUAL[site]):
                for optimizer in (both := [at_site[site], of_body]):
                    optimizer.param_groups[0]["lr"] = 0.01 * (1 - ((number - 1) * n + step) / (len(orders) * n)) ** 0.9
                    optimizer.zero_grad()
                drawn = jobs[site].batches.draw(SEED, site, number, step)
                make_objective(jobs[site])(net(drawn.image), drawn).backward()
                for optimizer in both:
                    optimizer.step()
    return net.state_dict()


def test_in_sequence_one_network_goes_from_site_to_site(tmp_path: Path) -> None:
    """With unequal numbers of steps; each site begins where the one before ended."""
    jobs = three()
    engine = Engine(jobs, tmp_path)
    rounds = list(running(splitfed, engine, jobs, variant="sequential", rounds=3, steps=UNEQUAL))
    orders = []
    for done in rounds:
        served = [site for site, r in engine.down if isinstance(r, Tail) and r.round == done.number]
        orders.append(list(dict.fromkeys(served)))
        assert served == [site for site in orders[-1] for _ in range(UNEQUAL[site])], "a turn is not interrupted"
        assert set(done.answers) == set(jobs)
        assert done.n_tensors > 0
    assert len(set(map(tuple, orders))) > 1, "drawn for each round"
    assert difference(part(rounds[-1].tensors, WEIGHTS), one_after_the_other_by_hand(jobs, orders)) <= EQUAL
    assert difference(part(rounds[-1].tensors, WEIGHTS), one_after_the_other_by_hand(jobs, [sorted(jobs)] * 3)) > 1e-6


@pytest.mark.parametrize("steps", [{"a": 1, "b": 7, "c": 3}, {"a": 5, "b": 1, "c": 1}], ids=str)
@pytest.mark.parametrize("variant", ["v1", "v2", "sequential"])
def test_sites_with_unequal_numbers_of_batches_do_not_wait_for_each_other(
    variant: str, steps: dict[str, int], tmp_path: Path
) -> None:
    jobs = three()
    engine = Engine(jobs, tmp_path)
    *_, last = running(splitfed, engine, jobs, variant=variant, rounds=2, steps=steps)
    assert last.failures == {}
    assert {site: answer.n_steps for site, answer in last.answers.items()} == steps


def test_for_one_site_a_sequence_is_the_whole_network(tmp_path: Path) -> None:
    weights, _ = trained_apart(job_of(), ("deep",), tmp_path, variant="sequential", rounds=2, steps={"a": STEPS // 2})
    assert difference(weights, trained_whole(job_of(), rounds=2, steps=STEPS // 2)) <= EQUAL


def keeping(jobs: Mapping[str, Job], cut: tuple[str, ...]) -> tuple[dict[str, Job], Sharing]:
    """The same sites, which keep front and tail."""
    net = jobs["a"].network()
    held = frozenset(cut_apart(net, cut, reveal_labels=True).at_site.state_dict())
    size = sum(t.numel() for t in net.state_dict().values())
    keep = frozenset(net.state_dict())
    return {s: replace(j, kept=keep) for s, j in jobs.items()}, Sharing(kept=held, sizes=dict.fromkeys(jobs, size))


@pytest.mark.parametrize("variant", ["v3", "v2", "sequential"])
def test_front_and_tail_that_stay_are_in_no_message_and_the_body_is_trained_by_all(
    variant: str, tmp_path: Path
) -> None:
    jobs, sharing = keeping(three(), ("deep",))
    engine = Engine(jobs, tmp_path)
    start = first_weights(jobs["a"])
    rounds = list(running(splitfed, engine, jobs, variant=variant, rounds=2, steps=UNEQUAL, sharing=sharing))
    assert all(r.failures == {} and set(r.answers) == set(jobs) for r in rounds)
    assert all(not request.weights for request in said(engine.down, Front))
    assert all(not reply.weights for reply in said(engine.up, Trained))
    body = {n: t for n, t in part(rounds[-1].tensors, WEIGHTS).items() if n not in sharing.kept}
    assert max(float((t - start[n]).abs().max()) for n, t in body.items()) > 1e-4
    cut = Cut(("deep",), True)
    own = {site: engine.members[site]._models.learner(jobs[site], "m", cut).weights() for site in jobs}
    assert own["a"].keys() == sharing.kept
    assert all(difference(own["a"], own[site]) > 1e-4 for site in ("b", "c")), "each has its own"


def test_v3_with_a_front_that_is_shared_is_refused(tmp_path: Path) -> None:
    jobs = three()
    with pytest.raises(StudyError, match=r"variant = 'v3' is not possible .* keep = \['ends'\]"):
        next(running(splitfed, Engine(jobs, tmp_path), jobs, variant="v3"))
