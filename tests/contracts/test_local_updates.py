"""What every local update keeps to (see `concilium.local_updates`). Its signature: tests/test_catalog.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concilium import catalog
from concilium.answers.objective import make_objective
from concilium.data.patches import Batch
from concilium.errors import ContractError
from concilium.local_updates import Local, exchanges, finish_of, is_more_than_a_step, needs_others, when_alone
from concilium.local_updates._besides import draws_patients
from concilium.messages import PlugIn

FOUND = [n for n in catalog.names("local_updates") if not (is_more_than_a_step(n) or draws_patients(n))]
"""Those that draw patients have tests of their own."""
NEUTRAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "proximal": {"mu": 0.0},
    "scaffold": {},  # in a first round: nothing has been exchanged
    "ditto": {"weight": 3.0},  # the shared network is as ever, whatever the other is held to
    "distill": {"weight": 0.0},
    "condistfl": {},  # where everything is annotated
    "fedadamw": {},  # in a first round
}
"""Options under which a local update is `plain`, where nothing has been exchanged. A new one is added here."""
every_update = pytest.mark.parametrize("name", FOUND)


class Small(nn.Module):
    """Logits of two scales, finest first, from a convolution with a batch norm; and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        y: Tensor = self.norm(self.conv(image))
        return y, y[..., ::2, ::2]


def objective(logits: Sequence[Tensor], batch: Batch) -> Tensor:
    scales = zip(logits, batch.labels, strict=True)
    return torch.stack([nn.functional.cross_entropy(x, y[:, 0].long()) for x, y in scales]).mean()


def lent(
    *,
    clip_norm: float = 12.0,
    rate: float = 0.1,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    exchanged: bool = True,
) -> Local:
    """All that a step may ask for; `exchanged`: as in a later round, when the server has something of what sites sent."""
    torch.manual_seed(0)
    network, teacher = Small().train(), Small()
    received = {n: t.clone() for n, t in network.state_dict().items()}
    teacher.load_state_dict(received)
    teacher.eval().requires_grad_(requires_grad=False)
    control = {n: 0.01 * torch.randn_like(p) for n, p in network.named_parameters()} if exchanged else {}
    own = Small().train()
    return Local(
        network,
        optimizer(network.parameters(), rate),
        objective,
        autocast,
        received,
        clip_norm,
        teacher=teacher,
        control={n: t.detach() for n, t in control.items()},
        personal=Local(own, optimizer(own.parameters(), rate), objective, autocast, received, clip_norm),
        labels={"background": 0, "organ": 1},
    )


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 1, 8, 8, generator=generator)
    labels = (image > 0).float()
    return Batch(image, (labels, labels[..., ::2, ::2]))


def step_of(name: str, **given: Any) -> Callable[..., Tensor]:
    options, problems = catalog.fill("local_updates", name, given, "[local_update]")
    assert not problems
    return partial(catalog.load("local_updates", name), **options)


def weights(local: Local) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in local.network.state_dict().items()}


def test_plain_is_found() -> None:
    assert "plain" in catalog.names("local_updates")


@every_update
def test_a_step_changes_the_weights_and_gives_one_finite_number(name: str) -> None:
    local = lent()
    loss = step_of(name)(local, batch())
    assert loss.numel() == 1
    assert not loss.requires_grad
    assert math.isfinite(float(loss))
    after = weights(local)
    assert not torch.equal(after["conv.weight"], local.received["conv.weight"])
    assert torch.equal(after["unused"], local.received["unused"])
    assert after["norm.num_batches_tracked"] == 1, "one pass through the network in training mode"


@every_update
def test_steps_lower_the_loss(name: str) -> None:
    local = lent()
    step = step_of(name)
    losses = [float(step(local, batch())) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


@every_update
def test_the_gradient_of_the_last_step_does_not_count_again(name: str) -> None:
    """Two steps are those of two optimisers that each begin without a gradient."""
    local, fresh = lent(), lent()
    step = step_of(name)
    step(local, batch(0))
    step(fresh, batch(0))
    for parameter in fresh.network.parameters():
        parameter.grad = None
    step(local, batch(1))
    step(fresh, batch(1))
    assert all(torch.equal(weights(local)[n], t) for n, t in weights(fresh).items())


@every_update
def test_the_gradient_is_clipped(name: str) -> None:
    """With plain SGD the weights move by at most rate times `clip_norm`."""
    for clip_norm in (1e-3, 1e-2):
        local = lent(clip_norm=clip_norm, rate=1.0)
        step_of(name)(local, batch())
        moved = [(p.detach() - local.received[n]).flatten() for n, p in local.network.named_parameters()]
        assert float(torch.cat(moved).norm()) == pytest.approx(clip_norm, rel=1e-2)


@every_update
def test_the_same_step_from_the_same_state_is_the_same(name: str) -> None:
    local = lent()
    step = step_of(name)
    step(local, batch(0))
    other = copy.deepcopy(local)
    torch.manual_seed(5)
    a = step(local, batch(1))
    torch.manual_seed(5)
    b = step(other, batch(1))
    assert torch.equal(a, b)
    assert all(torch.equal(weights(local)[n], t) for n, t in weights(other).items())


@every_update
def test_what_it_is_given_stays_as_it_is(name: str) -> None:
    local = lent()
    teacher: Any = local.teacher
    given = (local.received, local.control, teacher.state_dict())
    copies = copy.deepcopy(given)
    image, labels, *_ = drawn = batch()
    before = image.clone(), [y.clone() for y in labels]
    for _ in range(2):
        step_of(name)(local, drawn)
    for tensors, as_it_was in zip(given, copies, strict=True):
        assert tensors.keys() == as_it_was.keys()
        assert all(torch.equal(tensors[n], t) for n, t in as_it_was.items())
    assert torch.equal(image, before[0])
    assert all(torch.equal(a, b) for a, b in zip(labels, before[1], strict=True))


@every_update
def test_the_forward_pass_is_in_the_precision_that_was_asked_for(name: str) -> None:
    """The objective gets the logits as they are; weights stay in float32."""
    seen: list[torch.dtype] = []
    local = lent(autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    local.network.conv.register_forward_hook(lambda *a: seen.append(a[2].dtype))

    def watched(logits: Sequence[Tensor], drawn: Batch) -> Tensor:
        seen.extend(x.dtype for x in logits)
        assert not torch.is_autocast_enabled("cpu"), "the loss computes in full"
        return objective([x.float() for x in logits], drawn)

    loss = step_of(name)(Local(**{**vars(local), "objective": watched}), batch())
    assert set(seen) == {torch.bfloat16}
    assert len(seen) >= 3
    assert loss.dtype == torch.float32
    assert all(t.dtype == local.received[n].dtype for n, t in weights(local).items())


@every_update
def test_a_batch_of_which_nothing_is_known_changes_nothing(name: str) -> None:
    """Also where momentum would go on: neither network, nor what is sent in the end."""
    local, other = (lent(optimizer=partial(torch.optim.SGD, momentum=0.9)) for _ in range(2))
    unknown = batch()._replace(annotated=torch.zeros(2, 2, dtype=torch.bool))
    step = step_of(name)
    for drawn in (unknown, batch(0), unknown, batch(1), unknown):
        loss = step(local, drawn)
        assert (float(loss) == 0) == (drawn is unknown)
    for drawn in (batch(0), batch(1)):
        step(other, drawn)
    assert all(torch.equal(weights(local)[n], t) for n, t in weights(other).items())
    own, others = local.personal, other.personal
    assert own is not None
    assert others is not None
    assert all(torch.equal(weights(own)[n], t) for n, t in weights(others).items())
    sent, expected = finish_of(PlugIn(name), local, steps=5), finish_of(PlugIn(name), other, steps=2)
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[n], t) for n, t in expected.items())


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, momentum=0.9, nesterov=True), torch.optim.AdamW])
@every_update
def test_the_neutral_setting_equals_plain(name: str, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """Bit for bit: weights, running statistics and losses."""
    local, plain = (lent(optimizer=optimizer, rate=0.01, exchanged=False) for _ in range(2))
    for number in range(3):
        a = step_of(name, **NEUTRAL[name])(local, batch(number))
        b = step_of("plain")(plain, batch(number))
        assert torch.equal(a, b)
    assert all(torch.equal(weights(local)[n], t) for n, t in weights(plain).items())


@every_update
def test_what_is_sent_beside_the_weights_is_named_and_shaped_as_they_are(name: str) -> None:
    """And what is kept can go to disk: tensors, of which none is of the round that is over."""
    local = lent(optimizer=torch.optim.AdamW)
    local.network.norm.bias.requires_grad_(requires_grad=False)
    step_of(name)(local, batch())
    sent = finish_of(PlugIn(name), local, steps=1)
    assert bool(sent) == exchanges(name)
    assert "norm.bias" not in sent, "what does not train has nothing to tell"
    for key, tensor in sent.items():
        assert (tensor.shape, tensor.dtype) == (local.received[key].shape, local.received[key].dtype)
        assert bool(torch.isfinite(tensor).all())
    kept = {n: t.shape for n, t in local.memory.items()}
    assert all(isinstance(t, Tensor) and not t.requires_grad for t in local.memory.values())
    step_of(name)(local, batch())
    finish_of(PlugIn(name), local, steps=1)
    assert {n: t.shape for n, t in local.memory.items()} == kept


@every_update
def test_a_model_that_trains_alone_takes_steps_that_need_no_others(name: str) -> None:
    assert when_alone(PlugIn(name)) == PlugIn("plain" if needs_others(name) else name)
    assert needs_others(name) == (name != "plain")


@pytest.mark.parametrize(("name", "lacks"), [("ditto", "personal"), ("distill", "teacher")])
def test_what_is_not_lent_is_missed(name: str, lacks: str) -> None:
    with pytest.raises(ContractError, match=name):
        step_of(name)(Local(**{**vars(lent()), lacks: None}), batch())


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_loss_is_computed_in_float32_at_least(
    given: torch.dtype, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make_objective` sees to it, for every local update and every loss."""
    seen: list[torch.dtype] = []

    def loss(logits: Tensor, labels: Tensor, annotated: object, *, batch_dice: bool) -> Tensor:
        seen.append(logits.dtype)
        return logits.sum()

    monkeypatch.setattr(catalog, "load", lambda kind, name: loss)
    training = SimpleNamespace(loss=PlugIn("any"), deep_supervision=False)
    job: Any = SimpleNamespace(
        training=training, plan=SimpleNamespace(batch_dice=True), labels={"background": 0, "organ": 1}
    )
    value = make_objective(job)([torch.ones(2, 3, dtype=given)], Batch(torch.ones(2, 3), (torch.zeros(2, 1),)))
    assert (seen, value.dtype) == ([computed], computed)


# --------------------------------------------------------------------------------------------------------------- plain


def test_plain_is_a_step_of_gradient_descent() -> None:
    """w - rate * gradient, worked out with a second copy of the network."""
    local = lent(clip_norm=1e9)
    network = copy.deepcopy(local.network)
    drawn = batch()
    expected_loss = objective(network(drawn.image), drawn)
    used = {n: p for n, p in network.named_parameters() if n != "unused"}
    gradients = torch.autograd.grad(expected_loss, list(used.values()))
    loss = step_of("plain")(local, drawn)
    assert torch.equal(loss, expected_loss.detach()), "the loss is that before the step"
    after = dict(local.network.named_parameters())
    for (name, parameter), gradient in zip(used.items(), gradients, strict=True):
        torch.testing.assert_close(after[name], parameter - 0.1 * gradient, rtol=1e-6, atol=1e-7)


def test_a_loss_scale_is_taken_out_again() -> None:
    """With a scaler (float16) the step is the same; where a gradient overflows, none is taken and the scale falls."""
    plain, scaled = lent(), lent()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaled = Local(**{**vars(scaled), "scaler": scaler})
    drawn = batch()
    a, b = step_of("plain")(plain, drawn), step_of("plain")(scaled, drawn)
    assert torch.equal(a, b), "the loss is not scaled"
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(scaled)[name], tensor, rtol=1e-5, atol=1e-6)
    before = weights(scaled)["conv.weight"]
    step_of("plain")(scaled, drawn._replace(image=drawn.image * math.inf))
    assert torch.equal(weights(scaled)["conv.weight"], before)
    assert scaler.get_scale() == 2.0**7
