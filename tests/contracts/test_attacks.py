"""What every attack keeps to (see `concilium.attacks`)."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from concilium import catalog
from concilium.attacks import Auxiliary, Cases, Guess, Known, Release, about, only, releases, stacked
from concilium.errors import ContractError
from concilium.messages import Finish, Front, Gradients, Maps, Train, Trained
from concilium.networks import Stage, Stages
from concilium.transport import encode

SIZE = {2: (12, 12), 3: (8, 8, 6)}
QUICK = {"steps": 2, "width": 4}
every_attack = pytest.mark.parametrize("name", catalog.names("attacks"))
in_2d_and_3d = pytest.mark.parametrize("dims", [2, 3], ids=["2D", "3D"])


class Convolved(Stage):
    """A convolution, and below it the map that it took if `keeps`."""

    takes = 1

    def __init__(self, before: int, after: int, dims: int, *, stride: int = 1, keeps: bool = False) -> None:
        super().__init__()
        convolve = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.conv = convolve(before, after, 3, padding=1, stride=stride)
        self.leaves = 2 if keeps else 1

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        (x,) = maps
        y = torch.tanh(self.conv(x))
        return (x, y) if self.leaves == 2 else (y,)


def scene(dims: int, n: int = 6) -> tuple[tuple[Release, ...], Known, Auxiliary]:
    """Two releases of two patches with two maps each, and all that any attack asks for."""
    generator = torch.Generator().manual_seed(dims)
    torch.manual_seed(0)
    front = Stages({"down0": Convolved(2, 3, dims), "down1": Convolved(3, 4, dims, stride=2, keeps=True)})
    whole = Stages({"head0": Convolved(2, 3, dims)})

    def cases(k: int) -> Cases:
        images = torch.randn(k, 2, *SIZE[dims], generator=generator)
        labels = (images[:, 0] > 0.5).long()
        sent = []
        for i in range(0, k, 2):
            with torch.no_grad():
                maps = front.run((images[i : i + 2],))
            sent.append(Release("a", 1, i, maps, (maps[1] * 1e-4,)))
        return Cases(images, labels, tuple(sent))

    victims, own, asked = cases(4), cases(n), cases(8)
    update = {name: torch.randn(p.shape, generator=generator) for name, p in whole.named_parameters()}
    sent = tuple(replace(r, update=update) for r in victims.sent)

    def loss(logits: Any, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits[0], labels)

    def steer(answer: Any) -> tuple[Release, ...]:
        """A site that takes no step, whatever it gets."""
        for r in sent:
            given = answer(r)
            assert [g.shape for g in given] == [m.shape for m in r.maps if m.is_floating_point()]
            assert not any(g.requires_grad for g in given)
        return sent

    return sent, Known(front, (0, 1), whole, loss, steer), Auxiliary(own, asked, victims.labels)


def run(name: str, dims: int, seed: int = 0) -> Guess:
    sent, known, auxiliary = scene(dims)
    options = {key: value for key, value in QUICK.items() if key in catalog.options("attacks", name)}
    guess: Guess = catalog.load("attacks", name)(sent, known, auxiliary, seed=seed, **options)
    return guess


def test_the_attacks_are_found() -> None:
    assert {"inversion", "inversion_white", "reidentify", "membership"} <= set(catalog.names("attacks"))


@every_attack
@in_2d_and_3d
def test_it_guesses_what_it_says_one_for_each_patch_or_candidate(name: str, dims: int) -> None:
    _, guesses, _ = about(vars(importlib.import_module(f"concilium.attacks.{name}")))
    guess = run(name, dims)
    given = {key: value for key, value in vars(guess).items() if value is not None}
    assert list(given) == [guesses]
    shapes = {
        "images": (4, 2, *SIZE[dims]),
        "labels": (4, *SIZE[dims]),
        "members": (8,),
        "patients": (4, 8),
    }
    assert given[guesses].shape == shapes[guesses]
    assert given[guesses].isfinite().all()
    assert not given[guesses].requires_grad


@every_attack
def test_the_seed_decides_and_nothing_global_is_drawn_from(name: str) -> None:
    _, guesses, _ = about(vars(importlib.import_module(f"concilium.attacks.{name}")))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = getattr(run(name, 2), guesses)
    torch.manual_seed(2)
    assert torch.equal(getattr(run(name, 2), guesses), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


@every_attack
def test_what_was_sent_stays_as_it_is(name: str) -> None:
    sent, known, auxiliary = scene(2)
    copies = [m.clone() for r in (*sent, *auxiliary.own.sent) for m in (*r.maps, *r.gradients)]
    options = {key: value for key, value in QUICK.items() if key in catalog.options("attacks", name)}
    catalog.load("attacks", name)(sent, known, auxiliary, seed=0, **options)
    after = [m for r in (*sent, *auxiliary.own.sent) for m in (*r.maps, *r.gradients)]
    assert all(torch.equal(a, b) for a, b in zip(copies, after, strict=True))


def test_the_black_box_never_looks_at_a_weight() -> None:
    sent, _, auxiliary = scene(2)
    guess = catalog.load("attacks", "inversion")(sent, Known(), auxiliary, seed=0, **QUICK)
    assert torch.equal(guess.images, run("inversion", 2).images)


def test_without_a_weight_and_a_pair_an_image_is_what_channels_have_in_common() -> None:
    """Behind a layer that was drawn, whichever way up its filters show the image; and nothing behind noise."""
    generator = torch.Generator().manual_seed(0)
    images = functional.interpolate(torch.randn(24, 1, 3, 3, generator=generator), 12, mode="bicubic").exp()
    own = Auxiliary(Cases(5 * images[:12] + 3, torch.zeros(12, 12, 12, dtype=torch.long)))
    for seed in range(6):
        torch.manual_seed(seed)
        front = Stages({"down0": Convolved(1, 8, 2)})
        with torch.no_grad():
            maps = front.run((0.1 * images[12:],))
        noise = tuple(torch.randn(m.shape, generator=generator) for m in maps)
        for sent, low, high in ((maps, 0.75, 1.0), (noise, -0.3, 0.3)):
            guess = catalog.load("attacks", "inversion_blind")((Release("a", 1, 0, sent),), Known(), own, seed=0)
            alike = float(torch.corrcoef(torch.stack([guess.images.flatten(), images[12:].flatten()]))[0, 1])
            assert low <= alike <= high, (seed, alike)
            assert float(guess.images.mean()) == pytest.approx(float(own.own.images.mean()), rel=1e-3)


def test_the_white_box_needs_them() -> None:
    sent, _, auxiliary = scene(2)
    with pytest.raises(ContractError, match="weights of the front"):
        catalog.load("attacks", "inversion_white")(sent, Known(), auxiliary, seed=0)


def test_an_attack_that_does_not_say_what_it_does_is_refused() -> None:
    with pytest.raises(ContractError, match="SEES = ''"):
        about({"GUESSES": "images"})


def test_gradient_inversion_finds_a_small_image_behind_the_gradient_of_a_small_network() -> None:
    """One patch of 12 x 12 and one step of SGD; of a U-Net and a batch it finds nothing (docs/explanation/leakage.md)."""
    generator = torch.Generator().manual_seed(0)
    image = functional.interpolate(torch.randn(1, 1, 5, 5, generator=generator), 12, mode="bicubic")
    labels = (image[:, 0] > 0.3).long()
    torch.manual_seed(1)
    whole = Stages({"down0": Convolved(1, 16, 2), "down1": Convolved(16, 16, 2), "head0": Convolved(16, 2, 2)})

    def loss(logits: Any, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits[0], labels)

    gradients = torch.autograd.grad(loss(whole(image), labels), list(whole.parameters()))
    update = {name: 0.01 * g for (name, _), g in zip(whole.named_parameters(), gradients, strict=True)}
    other = {n: torch.randn(u.shape, generator=generator) for n, u in update.items()}
    own = Cases(torch.randn(8, 1, 12, 12, generator=generator), torch.zeros(8, 12, 12, dtype=torch.long))
    attack = catalog.load("attacks", "gradient_inversion")
    for aim, low, high in ((update, 0.85, 1.0), (other, -1.0, 0.5)):
        sent = (Release("a", 1, 0, update=aim),)
        guess = attack(sent, Known(whole=whole, loss=loss), Auxiliary(own, labels=labels), seed=0, steps=200)
        both = torch.stack([guess.images.flatten(), image.flatten()])
        assert low <= float(torch.corrcoef(both)[0, 1]) <= high


def test_reidentify_finds_whose_maps_they_are_and_not_those_of_strangers() -> None:
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(6, 4, 16, 16, generator=generator)
    noise = 0.3 * torch.randn(6, 4, 16, 16, generator=generator)
    candidates = Cases(gallery, gallery[:, 0].long(), (Release("a", 1, 0, (gallery,)),))
    order = [3, 1, 5, 0, 2, 4]
    attack = catalog.load("attacks", "reidentify")
    guess = attack(
        (Release("a", 1, 0, ((gallery + noise)[order],)),), Known(), Auxiliary(candidates, candidates), seed=0
    )
    assert guess.patients.argmax(1).tolist() == order
    assert float(guess.patients.max(1).values.min()) > 0.5
    strangers = attack((Release("a", 1, 0, (noise,)),), Known(), Auxiliary(candidates, candidates), seed=0)
    assert float(strangers.patients.max()) < 0.5


@pytest.mark.parametrize("calibrate", [True, False])
def test_membership_tells_cases_that_the_network_knows_by_heart(calibrate: bool) -> None:
    """Labels as the network says them are known by heart; four tenths of other ones is what a stranger's case has."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    whole = Stages({"head0": Convolved(1, 2, 2)})
    with torch.no_grad():
        whole["head0"].conv.weight.mul_(10)  # type: ignore[union-attr, operator]

    def cases(n: int, wrong: float) -> Cases:
        images = torch.randn(n, 1, 12, 12, generator=generator)
        with torch.no_grad():
            labels = whole(images)[0].argmax(1)
        return Cases(images, torch.where(torch.rand(labels.shape, generator=generator) < wrong, 1 - labels, labels))

    known, strange, own = cases(10, 0.0), cases(10, 0.4), cases(40, 0.4)
    asked = Cases(torch.cat([known.images, strange.images]), torch.cat([known.labels, strange.labels]))
    attack = catalog.load("attacks", "membership")
    guess = attack((), Known(whole=whole), Auxiliary(own, asked), seed=0, calibrate=calibrate)
    assert guess.members[:10].min() > guess.members[10:].max()


def test_label_inference_reads_labels_where_gradients_hold_them_and_nothing_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = functional.interpolate(torch.randn(24, 1, 4, 4, generator=generator), 16)[:, 0].gt(0.5).long()
    mask, noise = labels.unsqueeze(1).float(), torch.randn(24, 2, 16, 16, generator=generator)
    scale = torch.logspace(-6, -3, 24).view(-1, 1, 1, 1)  # as of batches of very different loss
    found = []
    for gradients in (scale * (torch.cat([mask, -mask], 1) + 0.3 * noise), scale * noise):
        sent = tuple(Release("a", 1, i, (), (g.unsqueeze(0),)) for i, g in enumerate(gradients))
        own = Cases(noise[:16], labels[:16], sent[:16])
        guess = catalog.load("attacks", "label_inference")(
            sent[16:], Known(), Auxiliary(own), seed=0, steps=60, width=8
        )
        found.append(float(((guess.labels > 0.5) == labels[16:].bool()).float().mean()))
    assert found[0] > 0.95
    assert found[1] < 0.85


def test_who_was_in_a_step_points_where_its_update_does() -> None:
    _, known, _ = scene(2)
    whole, loss = known.open_whole, known.loss
    assert loss is not None
    asked = Cases(torch.randn(8, 2, 12, 12), torch.randint(2, (8, 12, 12)))
    updates = []
    for i in (0, 2):  # two in each of two steps: the first four
        gradients = torch.autograd.grad(
            loss(whole(asked.images[i : i + 2]), asked.labels[i : i + 2]), list(whole.parameters())
        )
        updates.append({n: 0.01 * g for (n, _), g in zip(whole.named_parameters(), gradients, strict=True)})
    attack = catalog.load("attacks", "membership_of_updates")
    own = Cases(torch.randn(8, 2, 12, 12), torch.randint(2, (8, 12, 12)))
    came = tuple(Release("a", 1, 0, update=u) for u in updates)
    guess = attack(came, known, Auxiliary(own, asked), seed=0)
    assert guess.members[:4].min() > guess.members[4:].max()


def test_a_front_that_is_steered_makes_maps_that_the_attackers_decoder_reads() -> None:
    """A front that is trained by the gradients that come tells the attacker more than one that is left as it was drawn."""
    generator = torch.Generator().manual_seed(0)
    images = functional.interpolate(torch.randn(40, 1, 4, 4, generator=generator), 12, mode="bicubic").exp()
    torch.manual_seed(3)
    start = Stages({"down0": Convolved(1, 3, 2)})
    own, theirs, last = images[:16], images[16:32], images[32:]
    errors = []
    for rate in (0.0, 0.02):
        front = copy.deepcopy(start)
        optimizer = torch.optim.Adam(front.parameters(), rate)

        def steer(
            answer: Any, front: Stages = front, optimizer: torch.optim.Optimizer = optimizer
        ) -> tuple[Release, ...]:
            for step in range(100):
                chosen = [(step * 4 + i) % len(theirs) for i in range(4)]
                (m,) = front.run((theirs[chosen],))
                optimizer.zero_grad()
                torch.autograd.backward([m], list(answer(Release("a", 1, step, (m.detach(),)))))
                optimizer.step()
            with torch.no_grad():
                return (Release("a", 1, 100, front.run((last,))),)

        known = Known(start, (0,), steer=steer)
        cases = Cases(own, torch.zeros(16, 12, 12, dtype=torch.long))
        attack = catalog.load("attacks", "feature_hijack")
        guess = attack((), known, Auxiliary(cases), seed=0, steps=80, width=8, critic_rate=3e-3)
        errors.append(float((guess.images - last).abs().mean()))
    assert errors[1] < 0.6 * errors[0], errors


def test_sites_that_cannot_be_steered_are_not_guessed() -> None:
    sent, known, auxiliary = scene(2)
    with pytest.raises(ContractError, match="Sites were to be steered"):
        catalog.load("attacks", "feature_hijack")(sent, replace(known, steer=None), auxiliary, seed=0, **QUICK)


# ---------------------------------------------------------------------------------------------------------- what arrived


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_maps_and_gradients_are_read_as_the_receiver_decodes_them(kind: str) -> None:
    m, g = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    first = Front("m", 5, ("down0",), False, 0, 2, 0, 2, {}, (), transport=kind)
    said = [
        ("a", first), ("a", Maps(encode((m,), kind))), ("b", first), ("b", Maps(())), ("a", Gradients(encode((g,), kind))),
        ("a", replace(first, step=1)), ("a", Maps(encode((2 * m,), kind))),
    ]  # fmt: skip
    one, two = releases(said)
    assert [(r.site, r.round, r.step) for r in (one, two)] == [("a", 5, 0), ("a", 5, 1)]
    near = 0 if kind == "float32" else 0.05
    torch.testing.assert_close(one.maps[0], m, atol=near, rtol=0)
    torch.testing.assert_close(one.gradients[0], g, atol=near, rtol=0)
    torch.testing.assert_close(two.maps[0], 2 * m, atol=2 * near, rtol=0)
    assert two.gradients == ()
    assert stacked((one, replace(two, gradients=one.gradients)), "gradients")[0].shape == (4, 3, 4, 4)
    assert only((one,), [0])[0].maps[0] is one.maps[0]


def test_a_party_gets_its_gradients_with_what_it_is_asked_next_and_the_tail_returns_others() -> None:
    one, two, tail = (torch.randn(1, 2, 4, 4) for _ in range(3))
    first = Front("m", 1, ("fronts",), False, 0, 2, 0, 2, {}, (), party=True)
    said = [
        ("a", first), ("b", first), ("a", Maps((one,))), ("b", Maps((two,))), ("b", Gradients((tail,))),
        ("a", replace(first, step=1, gradients=(3 * one,))), ("a", Maps((2 * one,))), ("b", Finish("m", 1, (3 * two,))),
        ("a", Finish("m", 1, (4 * one,))),
    ]  # fmt: skip
    found = {(r.site, r.step, bool(r.maps)): r for r in releases(said)}
    assert found.keys() == {("a", 0, True), ("a", 1, True), ("b", 0, True), ("b", 0, False)}
    assert torch.equal(found["a", 0, True].gradients[0], 3 * one)
    assert torch.equal(found["a", 1, True].gradients[0], 4 * one)
    assert torch.equal(found["b", 0, True].gradients[0], 3 * two)
    assert torch.equal(found["b", 0, False].gradients[0], tail)


def test_an_update_is_what_the_weights_lost() -> None:
    asked = Train("m", 1, 0, 1, 1, {"w": torch.tensor([1.0, 2.0])}, True)
    (release,) = releases([("a", asked), ("a", Trained({"w": torch.tensor([0.5, 2.0])}, 3, 1, 0.1, 1.0))])
    assert release.update["w"].tolist() == [0.5, 0.0]
