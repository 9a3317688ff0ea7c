"""What of the label maps a server can read in the gradients that sites send it in split training.

The server is honest but curious: it follows the protocol, keeps every reply, and knows the weights of front and tail, since it
averages and sends them. Four labels in smooth regions, so that a guess can be right for about 40 % of the voxels by their share.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from concilium import wire
from concilium.aggregation import weight_of
from concilium.aggregation.mean import rule as mean
from concilium.answers import Job, Settings
from concilium.answers.objective import make_objective
from concilium.collect.plain import collect as plain
from concilium.data.draws import digest
from concilium.data.patches import Batch
from concilium.engines import SiteInfo, Traffic
from concilium.errors import StudyError
from concilium.messages import Failure, Finish, Front, Gradients, Maps, PlugIn, Reply, Request, Trained, Training
from concilium.networks import Stages
from concilium.networks.nnunet import build
from concilium.optimization import make_optimizer
from concilium.protocols import start_with
from concilium.protocols.splitfed import splitfed
from concilium.site import Site
from concilium.wire import Envelope

CHANNELS, LABELS, LEVELS, SIZE = 2, 4, 5, 32
FEATURES = [8, 16, 32, 32, 32]
SEED, STEPS = 7, 5
TRAINING = Training(
    "sgd", 0.01, 3e-5, 0.99, "float32", 0.33, True, "none", 12.0, True, 0, PlugIn("dice_ce"), PlugIn("plain")
)  # fmt: skip

# ------------------------------------------------------------------------------------------- data, a network, an engine


WEIGH = weight_of("mean")
COLLECT = partial(plain, weigh=WEIGH)


class Blobs:
    """Smooth regions of four labels and images that show them in noise; label maps at four scales."""

    def draw(self, *key: str | int) -> Batch:
        generator = torch.Generator().manual_seed(digest(*key))
        fields = functional.interpolate(torch.randn(2, LABELS, 8, 8, generator=generator), SIZE, mode="bilinear")
        fields[:, 0] += 0.4
        label = fields.argmax(1, keepdim=True).short()
        noise = 0.7 * torch.randn(2, CHANNELS, SIZE, SIZE, generator=generator)
        image = torch.cat((label.float(), (label == 2).float()), 1) + noise
        return Batch(image, tuple(label[..., :: 2**level, :: 2**level] for level in range(LEVELS - 1)))


@cache
def label_maps(step: int) -> tuple[Tensor, ...]:
    return Blobs().draw(SEED, "a", 1, step).labels


def truth(step: int, like: Tensor) -> Tensor:
    """The label map (B, X, Y) of a step, at the scale of a map."""
    return next(y[:, 0].long() for y in label_maps(step) if y.shape[2:] == like.shape[2:])


def network(deep_supervision: bool) -> Stages:
    arguments = {
        "n_stages": LEVELS,
        "features_per_stage": FEATURES,
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": [[3, 3]] * LEVELS,
        "strides": [[1, 1], *[[2, 2]] * (LEVELS - 1)],
        "n_conv_per_stage": [2] * LEVELS,
        "n_conv_per_stage_decoder": [2] * (LEVELS - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    imported = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    plan = {"architecture": {"network_class_name": name, "arch_kwargs": arguments, "_kw_requires_import": imported}}
    return build(n_channels=CHANNELS, n_labels=LABELS, plan=plan, deep_supervision=deep_supervision)


def job_of(deep_supervision: bool) -> Job:
    strides = SimpleNamespace(pool_op_kernel_sizes=[[1, 1], *[[2, 2]] * (LEVELS - 1)])
    plan: Any = SimpleNamespace(batch_dice=False, batch_size=2, configuration=strides)
    batches: Any = Blobs()
    entries: Any = {"training": (None,), "validation": ()}
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    training = Training(**{**vars(TRAINING), "deep_supervision": deep_supervision})
    return Job(
        plan,
        labels,
        CHANNELS,
        lambda deep_supervision=deep_supervision: network(deep_supervision),
        training,
        SEED,
        entries,
        batches,
    )


class Listening:
    """Delivers packed messages to one real site, and keeps both sides of what the server says and hears."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.sites = {"a": SiteInfo("a", "site")}
        self.traffic = {"a": Traffic()}
        self.said: list[Any] = []
        self.heard: list[Any] = []
        self._waiting: list[bytes] = []
        self._site = Site(Settings("a", "site", {}, None, folder / "a", folder, 1, "cpu"), run="r", epoch=0)
        self._site._job = job

    def send(self, requests: Mapping[str, Request], *, deadline_s: float | None = None) -> None:
        self.said.append(requests["a"])
        self._waiting.append(wire.pack(requests["a"]))

    def replies(self) -> Iterator[tuple[str, Reply | Failure]]:
        while self._waiting:
            packed = self._site.handle(self._waiting.pop(), Envelope("r", 0, len(self.heard)), lambda: False)
            self.heard.append(wire.unpack(packed))
            yield "a", self.heard[-1]

    def cancel(self, sites: Iterable[str]) -> None: ...

    def close(self) -> None: ...


def first_weights(deep_supervision: bool, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return network(deep_supervision).state_dict()


@pytest.fixture(scope="module")
def overheard(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`overheard(cut, deep_supervision, seed, reveal)`: what a round of `splitfed` showed the server, each made once."""

    @cache
    def listen(cut: tuple[str, ...], deep_supervision: bool, seed: int = 0, reveal: bool = False) -> Listening:
        job = job_of(deep_supervision)
        engine = Listening(job, tmp_path_factory.mktemp("site"))
        list(
            splitfed(
                engine, start_with(first_weights(deep_supervision, seed)), model="m", collect=COLLECT, rule=mean, rounds=1,
                steps={"a": STEPS}, min_sites=1, deadline_s=None, network=job.network, training=job.training, seed=SEED,
                device=torch.device("cpu"), variant="v2", cut=cut, reveal_labels=reveal, weigh=WEIGH,
            )
        )  # fmt: skip
        return engine

    return listen


def gradients_by_map(engine: Listening) -> list[list[Tensor]]:
    """For each map that the body sends, coarsest first, its gradients step by step; without those that are zero."""
    steps = [reply.gradients for reply in engine.heard if isinstance(reply, Gradients)]
    assert len(steps) == STEPS
    return [list(of_map) for of_map in zip(*steps, strict=True) if of_map[0].any()]


# ------------------------------------------------------------------------------------------------------------ the attacks


def hits(guesses: Sequence[Tensor]) -> float:
    """Share of voxels, over all steps, whose label was guessed."""
    right = [(guess == truth(step, guess[:, None])).flatten() for step, guess in enumerate(guesses)]
    return float(torch.cat(right).double().mean())


def best_constant(of_map: Sequence[Tensor]) -> float:
    """Share of the most frequent label: what is right without looking."""
    return max(hits([torch.full_like(g[:, 0], label).long() for g in of_map]) for label in range(LABELS))


def argmin(of_map: Sequence[Tensor]) -> list[Tensor]:
    """The channel of the smallest gradient: where channels are labels, a loss pulls up that of the true one."""
    return [g.argmin(1) for g in of_map]


def through_a_head(of_map: Sequence[Tensor], head: Tensor) -> list[Tensor]:
    """A head y = W x gives x the gradient W^T g: its pseudo-inverse gives g, that of the logits, and so the label."""
    back = torch.linalg.pinv(head.flatten(1).T)
    return argmin([torch.einsum("lc,bcxy->blxy", back, g) for g in of_map])


def heads_of(engine: Listening) -> dict[int, Tensor]:
    """The heads' weights by level, as the server sent them at the start of the round."""
    sent = engine.said[0].weights
    return {level: sent[n] for level in range(LEVELS) if (n := f"head{level}.conv.weight") in sent}


def level_of(g: Tensor) -> int:
    return (SIZE // g.shape[-1]).bit_length() - 1


with_and_without = pytest.mark.parametrize("deep_supervision", [True, False], ids=["deep supervision", "finest only"])

# ------------------------------------------------------------------------------------------------------- what was promised


@with_and_without
def test_the_server_hears_maps_and_gradients_and_weights_of_the_sites_part(
    overheard: Any, deep_supervision: bool
) -> None:
    engine = overheard(("deep",), deep_supervision)
    assert [type(reply) for reply in engine.heard] == [*[Maps, Gradients] * STEPS, Trained]
    assert [type(r) for r in engine.said if isinstance(r, Front | Finish)] == [*[Front] * STEPS, Finish]
    shapes = {m.shape for reply in engine.heard if isinstance(reply, Gradients) for m in reply.gradients}
    assert not any(shape[1] == LABELS for shape in shapes), "no logits"


@with_and_without
def test_argmin_of_returned_gradients_does_not_recover_labels(overheard: Any, deep_supervision: bool) -> None:
    """Over three draws of the weights, right less often than the most frequent label, and than a draw of the channels' names."""
    for seed in range(3):
        maps = gradients_by_map(overheard(("deep",), deep_supervision, seed))
        assert len(maps) == 1, "no head acts on a map that the server made, whatever the study says of deep supervision"
        for of_map in maps:
            guesses = argmin(of_map)
            accuracy = hits(guesses)
            assert accuracy < best_constant(of_map)
            rng, names = random.Random(0), list(range(of_map[0].shape[1]))
            renamed = [torch.tensor(rng.sample(names, len(names))) for _ in range(200)]
            chance = sorted(hits([new[guess] for guess in guesses]) for new in renamed)
            assert accuracy <= chance[189], "within what 95 % of draws reach"


@with_and_without
def test_argmin_recovers_every_label_where_the_heads_are_the_servers(deep_supervision: bool) -> None:
    """Split in two: the server computes the logits, and the site returns the gradient of its loss with respect to them."""
    job = job_of(deep_supervision)
    net = network(deep_supervision)
    net.load_state_dict(first_weights(deep_supervision, 0))
    front, rest = net.split("down1")
    optimizer, objective = make_optimizer(net, job.training), make_objective(job)
    received: list[list[Tensor]] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        drawn = Blobs().draw(SEED, "a", 1, step)
        computed = rest.run(front.run((drawn.image,)))[::-1]
        logits = [y.detach().requires_grad_() for y in computed]
        objective(logits, drawn).backward()
        supervised = [(y, x.grad) for y, x in zip(computed, logits, strict=True) if x.grad is not None]
        received.append([g for _, g in supervised])
        torch.autograd.backward([y for y, _ in supervised], received[-1])
        optimizer.step()
    by_scale = list(zip(*received, strict=True))
    assert len(by_scale) == (LEVELS - 2 if deep_supervision else 1)
    assert [hits(argmin(scale)) for scale in by_scale] == [1.0] * len(by_scale)


def test_a_tail_of_heads_alone_is_refused(overheard: Any) -> None:
    with pytest.raises(StudyError, match="only with reveal_labels"):
        overheard(("down1", "up0"), False)


# ------------------------------------------------------------------------------------------------------- what is not kept


@with_and_without
@pytest.mark.parametrize("cut", [("shallow",), ("down1", "up0")], ids=" ".join)
def test_with_reveal_labels_a_tail_of_heads_alone_gives_every_label_away(
    overheard: Any, cut: tuple[str, ...], deep_supervision: bool
) -> None:
    """Between nnU-Net's `up0` and the loss is one linear map, whose weights the server sent."""
    engine = overheard(cut, deep_supervision, reveal=True)
    maps, heads = gradients_by_map(engine), heads_of(engine)
    assert [level_of(of_map[0]) for of_map in maps] == ([2, 1, 0] if deep_supervision else [0])
    assert [hits(through_a_head(of_map, heads[level_of(of_map[0])])) for of_map in maps] == [1.0] * len(maps)


def test_with_reveal_labels_deep_supervision_gives_coarse_labels_away(overheard: Any) -> None:
    """A quarter of the resolution: the map only rides along to its head. Half: `up0` adds its gradient, and few voxels hide."""
    for seed in range(3):
        engine = overheard(("deep",), True, seed, reveal=True)
        quarter, half = gradients_by_map(engine)
        heads = heads_of(engine)
        assert [level_of(of_map[0]) for of_map in (quarter, half)] == [2, 1]
        assert hits(through_a_head(quarter, heads[2])) == 1.0
        assert hits(through_a_head(half, heads[1])) > 0.85
        assert max(best_constant(quarter), best_constant(half)) < 0.5


def test_with_reveal_labels_deep_supervision_gives_regions_away_even_to_who_knows_no_weights(overheard: Any) -> None:
    """The channel of the smallest gradient tells labels apart; only their names remain to be guessed, once for all voxels."""
    quarter, half = gradients_by_map(overheard(("deep",), True, 0, reveal=True))
    for of_map in (quarter, half):
        pairs = torch.zeros(of_map[0].shape[1], LABELS)
        for step, guess in enumerate(argmin(of_map)):
            of_step = (guess.flatten(), truth(step, guess[:, None]).flatten())
            pairs.index_put_(of_step, torch.ones(guess.numel()), accumulate=True)
        named = float(pairs.max(1).values.sum() / pairs.sum())
        assert named > best_constant(of_map) + 0.1


@with_and_without
@pytest.mark.parametrize("cut", ["shallow", "deep"])
def test_at_named_cuts_no_head_fits_the_map_that_crosses(overheard: Any, cut: str, deep_supervision: bool) -> None:
    """`up0`, with its norms and ReLUs, lies between: the one head takes other channels, at another resolution."""
    engine = overheard((cut,), deep_supervision)
    (of_map,) = gradients_by_map(engine)
    (head,) = heads_of(engine).values()
    assert (of_map[0].shape[1], level_of(of_map[0])) == (FEATURES[1], 1)
    assert head.shape[1] == FEATURES[0]


def test_limit_at_the_default_cut_a_probe_trained_on_labels_reads_some(overheard: Any) -> None:
    """Even so a gradient is not free of labels: a linear probe, fitted to three steps whose labels it knows, guesses the rest."""
    (of_map,) = gradients_by_map(overheard(("deep",), False))
    rows = [functional.normalize(g.movedim(1, -1).flatten(0, 2), dim=1) for g in of_map]
    names = [truth(step, g).flatten() for step, g in enumerate(of_map)]
    fit = torch.linalg.lstsq(torch.cat(rows[:3]), functional.one_hot(torch.cat(names[:3]), LABELS).float()).solution
    guesses = (torch.cat(rows[3:]) @ fit).argmax(1)
    accuracy = float((guesses == torch.cat(names[3:])).double().mean())
    most = float(torch.cat(names[3:]).bincount().max() / len(guesses))
    assert most < accuracy < 0.75
