"""Each defence does what it says: amounts of noise, levels, the distance correlation; and where they must be, they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.protocols.splitting import (
    CHANNELS,
    CPU,
    EQUAL,
    PATCH,
    difference,
    first_weights,
    job_of,
    trained_apart,
    trained_whole,
)
from torch import Tensor

from concilium.answers import Job, Settings, secret_of
from concilium.answers.split import Session
from concilium.answers.train import Cut, Learner
from concilium.data import draws
from concilium.defences import dropout, gaussian, guarded, laplace, nopeek, quantise
from concilium.errors import ContractError, StudyError
from concilium.messages import Finish, Front, Guard, PlugIn, Tail
from concilium.networks import Stages

# ---------------------------------------------------------------------------------------------------- each does as it says


@pytest.mark.parametrize(("module", "deviation"), [(gaussian, 0.5), (laplace, 0.5 * math.sqrt(2))])
def test_noise_has_the_deviation_that_was_asked_for_around_the_clipped_map(module: Any, deviation: float) -> None:
    m = torch.linspace(-6, 6, 200_000).reshape(1, 2, 100, 1000)
    torch.manual_seed(0)
    noise = module.defend(n_channels=2, n_axes=2, scale=0.5, bound=3.0).send(m) - m.clamp(-3, 3)
    assert float(noise.std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(noise.mean())) < 0.01
    kurtosis = float((noise**4).mean() / noise.var() ** 2)
    assert kurtosis == pytest.approx(3 if module is gaussian else 6, rel=0.1)


def test_dropout_drops_values_or_whole_channels_and_keeps_the_mean() -> None:
    m = torch.ones(8, 50, 10, 10)
    torch.manual_seed(0)
    for whole in (False, True):
        sent = dropout.defend(n_channels=50, n_axes=2, share=0.25, whole=whole).send(m)
        assert float((sent == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
        assert float(sent.max()) == pytest.approx(4 / 3)
        of_a_channel = (sent == 0).flatten(2).float().mean(2)
        assert bool(((of_a_channel == 0) | (of_a_channel == 1)).all()) == whole


def test_quantised_channels_have_as_many_values_as_the_bits_give_and_keep_their_range() -> None:
    m = (
        torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 10, 100])[:, None, None]
    )
    m[0, 0] = 7.0
    sent = quantise.defend(n_channels=3, n_axes=2, bits=3).send(m)
    assert all(len(sent[i, c].unique()) <= 8 for i, c in itertools.product(range(2), range(3)))
    assert torch.equal(sent[0, 0], m[0, 0])
    assert torch.allclose(sent.amax((2, 3)), m.amax((2, 3)))
    assert torch.allclose(sent.amin((2, 3)), m.amin((2, 3)))
    step = (m.amax((2, 3)) - m.amin((2, 3))) / 7
    assert bool(((sent - m).abs().amax((2, 3)) <= step / 2 * 1.001 + 1e-6).all())


def slowly(a: Tensor, b: Tensor) -> float:
    """The distance correlation, by its definition (Szekely et al. 2007, eq. 2.8 to 2.10), an element at a time."""
    n = len(a)
    centred = []
    for sample in (a.flatten(1).double(), b.flatten(1).double()):
        d = [[float((sample[i] - sample[j]).norm()) for j in range(n)] for i in range(n)]
        rows = [sum(row) / n for row in d]
        mean = sum(rows) / n
        centred.append([[d[i][j] - rows[i] - rows[j] + mean for j in range(n)] for i in range(n)])
    x, y = centred
    products = [sum(p[i][j] * q[i][j] for i in range(n) for j in range(n)) / n**2 for p, q in ((x, y), (x, x), (y, y))]
    return math.sqrt(products[0] / math.sqrt(products[1] * products[2]))


def test_the_distance_correlation_is_that_of_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    a, noise = torch.randn(9, 2, 4, 4, generator=g), torch.randn(9, 3, 2, 2, generator=g)
    b = a[:, :1, ::2, ::2].repeat(1, 3, 1, 1) ** 2 + noise
    assert float(nopeek.distance_correlation(a, b)) == pytest.approx(slowly(a, b), rel=1e-5)
    assert float(nopeek.distance_correlation(a, 3 * a)) == pytest.approx(1, rel=1e-5)
    assert float(nopeek.distance_correlation(a, torch.ones_like(a))) == 0


def test_nopeek_refuses_batches_of_which_it_learns_nothing() -> None:
    with pytest.raises(StudyError, match="batches of 2"):
        nopeek.check(batch_size=2, weight=0.1)
    nopeek.check(batch_size=4, weight=0.1)


# ------------------------------------------------------------------------------------------------------ in split training


def guarded_job(*defences: PlugIn, cut: tuple[str, ...] = ("deep",), **changes: Any) -> Job:
    """A site whose network has these defences; the models that train there in one place have them too, to be compared."""
    job = job_of("nnunet", deep_supervision=False, **changes)
    guard = Guard(defences, cut, reveal_labels=True)
    bare = lambda **how: job.network(**how).float()  # noqa: E731
    build: Callable[..., Stages] = guarded(bare, guard, image=(1, CHANNELS, *PATCH[2]))
    return replace(job, network=lambda **how: build(**how).double(), guard=guard)


@pytest.mark.parametrize(
    "defences",
    [
        [PlugIn("gaussian", {"scale": 0.5, "bound": 1.0})],
        [PlugIn("dropout", {"share": 0.5, "whole": False})],
        [PlugIn("project", {"channels": 2}), PlugIn("quantise", {"bits": 3})],
        [PlugIn("laplace", {"scale": 0.2, "bound": 2.0}), PlugIn("project", {"channels": 3})],
    ],
    ids=lambda ds: " ".join(d.name for d in ds),
)
def test_split_equals_whole_with_defences(defences: list[PlugIn], tmp_path: Path) -> None:
    job = guarded_job(*defences)
    weights, engine = trained_apart(job, ("deep",), tmp_path)
    assert difference(weights, trained_whole(job)) <= EQUAL
    plain = trained_whole(job_of("nnunet", deep_supervision=False))
    assert difference({n: t for n, t in weights.items() if n in plain}, plain) > 1e-3, "the defence changed nothing"
    sent = [reply for _, reply in engine.up if hasattr(reply, "maps")]
    assert len(sent) > 1


def session_of(job: Job, *, secret: str = "") -> Session:
    job = replace(job, secret=secret)
    learner = Learner(job, CPU, Cut(("deep",), True))
    return Session(learner, front_of(first_weights(job), learner), site="a")


def front_of(weights: Any, learner: Learner) -> Front:
    own = {n: t for n, t in weights.items() if n in learner.network.state_dict()}
    return Front("m", 1, ("deep",), True, 0, 1, 0, 1, own, ())


def test_noise_is_the_same_for_one_secret_and_another_for_another() -> None:
    """Whoever knows the study's seed can draw the noise again, and take it off, if nothing else is in it."""
    job = guarded_job(PlugIn("gaussian", {"scale": 0.5, "bound": 1.0}))

    def sent(secret: str) -> tuple[Tensor, ...]:
        session = session_of(job, secret=secret)
        request = front_of(first_weights(job), session.learner)
        return session.front(request, lambda: False).maps

    known, first, again, other = sent(""), sent("north's"), sent("north's"), sent("south's")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in itertools.combinations((known, first, other), 2):
        assert all(
            float((x - y).std()) == pytest.approx(0.5 * math.sqrt(2), rel=0.1) for x, y in zip(a, b, strict=True)
        )


def test_a_seed_that_was_guessed_does_not_take_the_noise_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has 2**32 seeds on the CPU, which can all be tried; here those of all secrets are the same."""
    monkeypatch.setattr(draws, "digest", lambda *key: 5)
    job = guarded_job(PlugIn("gaussian", {"scale": 0.5, "bound": 1.0}))

    def sent(secret: str) -> tuple[Tensor, ...]:
        session = session_of(job, secret=secret)
        return session.front(front_of(first_weights(job), session.learner), lambda: False).maps

    for a, b in itertools.combinations([sent(""), sent("north's"), sent("south's")], 2):
        assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_models_settings_and_weights_have_noise_of_their_own() -> None:
    """Two releases of one image under the same noise would tell by their difference what noise was to hide."""
    job = replace(guarded_job(PlugIn("gaussian", {"scale": 0.5, "bound": 1.0})), told="these")

    def sent(model: str = "m", told: str = "these", moved: float = 0.0) -> Tensor:
        session = session_of(replace(job, told=told), secret="north's")
        weights = {n: t + moved for n, t in first_weights(job).items()}
        own = {n: t for n, t in weights.items() if n in session.learner.network.state_dict()}
        request = replace(front_of(own, session.learner), model=model)
        session = Session(session.learner, request, site="a")
        return session.front(request, lambda: False).maps[0]

    first, *others = sent(), sent("other"), sent(told="those"), sent(moved=1e-6)
    assert torch.equal(first, sent())
    for other in others:
        assert float((first - other).std()) == pytest.approx(0.5 * math.sqrt(2), rel=0.1)


def test_a_sites_secret_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    def settings(name: str) -> Settings:
        return Settings(name, "site", {}, None, tmp_path / name, tmp_path, 1, "cpu", secret=tmp_path / name / "secret")

    north, south = secret_of(settings("north")), secret_of(settings("south"))
    assert north == secret_of(settings("north")) != south
    assert len(north) == 64
    assert (tmp_path / "north" / "secret").stat().st_mode & 0o077 == 0
    assert secret_of(replace(settings("west"), secret=None)) == ""


def test_maps_asked_for_elsewhere_than_where_the_defences_are_do_not_leave() -> None:
    job = guarded_job(PlugIn("gaussian", {"scale": 0.5, "bound": 1.0}))
    learner = Learner(job, CPU, Cut(("down0", "up0"), True))
    with pytest.raises(ContractError, match="defences are at"):
        Session(learner, replace(front_of(first_weights(job), learner), cut=("down0", "up0")), site="a")


def test_nopeek_adds_its_gradient_to_the_front_and_to_nothing_else() -> None:
    """Against the gradient of the whole loss, worked out in one piece."""
    weight = 3.0
    job = guarded_job(PlugIn("nopeek", {"weight": weight}))
    batches: Any = job.batches
    four = [batches.draw("x", i) for i in range(4)]
    image = torch.cat([b.image for b in four])
    labels = tuple(torch.cat([b.labels[i] for b in four]) for i in range(len(four[0].labels)))
    batch = four[0]._replace(image=image, labels=labels)
    batches.draw = lambda *key: batch
    session = session_of(job)
    session.front(front_of(first_weights(job), session.learner), lambda: False)
    sent = session._stack[session._home :]
    nothing = tuple(torch.zeros_like(m) for m in sent)
    n = session.parts.body.reach()
    left = session.parts.body.run(tuple(m.detach() for m in sent))
    session.tail(Tail("m", 1, 0, tuple(m.detach() for m in left), (-1,) * len(left)))
    session._own = {}
    grads: dict[str, Tensor] = {}
    tail = {name: p.grad.clone() for name, p in session.learner.network.named_parameters() if p.grad is not None}
    session.learner.optimizer.register_step_pre_hook(
        lambda *_: grads.update({k: p.grad.clone() for k, p in session.learner.network.named_parameters()})
    )
    session.finish(Finish("m", 1, nothing))
    twin = Learner(job, CPU, Cut(("deep",), True))
    twin.load_weights({k: t for k, t in first_weights(job).items() if k in twin.network.state_dict()})
    assert twin.parts is not None
    maps = twin.parts.front.run((image,))[-n:]
    expected = weight * torch.stack([nopeek.distance_correlation(image.float(), m.float()) for m in maps]).mean()
    expected.backward()
    own = dict(twin.network.named_parameters())
    names = set(twin.parts.front.state_dict())
    assert any(float(grads[k].abs().max()) > 1e-4 for k in names)
    for k in names:
        assert own[k].grad is not None
        assert torch.allclose(grads[k], own[k].grad, atol=1e-7)
    assert all(torch.equal(grads[k], tail[k]) for k in grads.keys() - names)
