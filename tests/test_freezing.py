"""Hidden tensors: what `state_dict` has and takes of a network of which some are frozen, by which names, and their digest."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from concilium.errors import ContractError, StudyError
from concilium.freezing import digest_of, freeze, freezing, frozen_names, frozen_of, trained_of
from concilium.loads import whole_load
from concilium.messages import PlugIn, Training
from concilium.network_sizes import plan_for
from concilium.networks import Stage, Stages, Whole, as_stages, make_network
from concilium.optimization import make_optimizer
from concilium.sharing import kept_of, named

TRAINING = Training(
    "adamw", 0.1, 0.5, 0.9, "float32", 0.3, False, "none", 1.0, True, 0, PlugIn("dice_ce"), PlugIn("plain")
)  # fmt: skip


class Block(Stage):
    """A convolution with a norm, an adapter and something of low rank beside it."""

    takes = leaves = 1

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.adapter_space = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"lora": nn.Linear(2, 2, bias=False), "plain": nn.Linear(2, 2)})
        self.in_proj_bias = nn.Parameter(torch.zeros(2))
        self.bias_table = nn.Parameter(torch.zeros(2))

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return (self.norm(self.convolution(maps[0])),)


def network(**_: Any) -> Stages:
    return Stages({"down0": Block(), "head0": Block()})


def test_roles_of_what_is_added_and_of_biases() -> None:
    found = named(network(), ["adapters"], where="[training] tensors")
    assert {n.partition(".")[2] for n in found} == {"adapter_space.weight", "adapter_space.bias", "inner.lora.weight"}
    biases = {n.partition(".")[2] for n in named(network(), ["biases"], where="x")}
    assert biases == {"convolution.bias", "norm.bias", "adapter_space.bias", "inner.plain.bias", "in_proj_bias"}


def test_what_is_frozen_is_hidden_from_state_optimiser_and_parts() -> None:
    whole = freezing(network, ["heads"])()
    names = {n for n in network().state_dict() if n.startswith("head0.")}
    assert whole.state_dict().keys() == names
    assert frozen_of(whole).keys() == network().state_dict().keys() - names
    assert not whole.split("down0")[0].state_dict()
    before = {n: t.clone() for n, t in frozen_of(whole).items()}
    optimizer = make_optimizer(whole, TRAINING)
    for _ in range(2):
        (logits,) = whole.train()(torch.randn(2, 1, 4, 4))
        logits.square().sum().backward()
        optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in frozen_of(whole).items()), (
        "running statistics, and decay, among them"
    )
    assert len(optimizer.state) == 4  # of the head's convolution and norm; nothing reaches the others
    nothing = make_optimizer(whole.split("down0")[0], TRAINING)
    nothing.step()
    assert not nothing.state


def test_weights_are_taken_with_and_without_what_is_frozen_and_never_others() -> None:
    torch.manual_seed(0)
    whole, other = freezing(network, ["heads"])(), network()
    given = other.state_dict()
    with pytest.raises(ContractError, match=r"down0\.convolution\.weight is frozen, and these weights have another"):
        whole.load_state_dict(given)
    alike = {**given, **frozen_of(whole)}
    whole.load_state_dict(alike)
    whole.load_state_dict(trained_of(whole, alike))
    assert all(torch.equal(t, given[n]) for n, t in whole.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        whole.load_state_dict({n: t for n, t in given.items() if n != "head0.norm.bias"} | frozen_of(whole))
    values = {n: t + 1 for n, t in frozen_of(whole).items()}
    again = freezing(network, ["heads"], values)()
    assert all(torch.equal(t, values[n]) for n, t in frozen_of(again).items())
    with pytest.raises(ContractError, match="is not among the 0 that are there"):
        freezing(network, ["heads"], {})()


def test_a_tensor_with_two_names_is_frozen_under_both() -> None:
    """As nnU-Net's networks have them."""
    inner = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    inner.add_module("again", inner[0])
    whole = as_stages(inner)
    assert isinstance(whole["whole"], Whole)
    freeze(whole, frozen_names(whole, ["norms"]))
    assert whole.state_dict().keys() == {f"whole.network.1.{n}" for n in inner[1].state_dict()}
    assert frozen_of(whole).keys() == {"whole.network.0.weight", "whole.network.0.bias"}
    whole.load_state_dict(whole.state_dict())


def test_the_study_says_what_trains_or_the_network() -> None:
    def saying(**_: Any) -> Stages:
        made = network()
        made.trains = ("adapters", "norms")
        return made

    assert all("adapter" in n or "lora" in n or ".norm." in n for n in freezing(saying, ())().state_dict())
    assert freezing(saying, ["*"])().state_dict().keys() == network().state_dict().keys()
    assert not frozen_of(freezing(saying, ["*"])())
    for wanted, told in (["nobody"], "'nobody' is no tensor"), (["statistics"], "none of these 6 tensors trains"):
        with pytest.raises(StudyError, match=told):
            freezing(network, wanted)()
    with pytest.raises(StudyError, match="'stem' is no tensor of this network that trains"):
        kept_of(freezing(network, ["heads"])(), ["stem"])


def test_the_forecast_has_no_gradient_nor_moments_of_what_is_frozen() -> None:
    """A tensor that nothing uses: weights, as they came, and two moments of Adam; frozen the weights alone."""
    n_bytes = 4 * 10**6

    def build(*, lonely: bool = True, **_: Any) -> Stages:
        made = network()
        if lonely:
            made["down0"].register_parameter("lonely", nn.Parameter(torch.zeros(n_bytes // 4)))
        return made

    def memory(build: Any) -> int:
        return whole_load(build, (2, 1, 8, 8), TRAINING).memory

    without = memory(partial(build, lonely=False))
    assert memory(build) == without + 4 * n_bytes
    assert without < memory(freezing(build, ["*norm*", "*conv*"])) + 4000 < without + n_bytes + 8000


def test_of_segment_anything_adapters_and_decoder_are_sent() -> None:
    """FedMSA in 2D at ViT-B, counted from the authors' shapes: 24 adapters of 295,872 and a decoder of 4,058,340."""
    build = partial(
        make_network, PlugIn("sam", {"adapt": "adapters"}), n_channels=3, n_labels=2, plan=plan_for((1024, 1024)),
        deep_supervision=False,
    )  # fmt: skip
    with FakeTensorMode(), torch.device("cpu"):
        whole = freezing(build, ["adapters", "decoder.[!p]*", "heads"])()  # all of the decoder but prompts
    assert sum(t.numel() for t in whole.state_dict().values()) == 24 * 295_872 + 4_058_340 == 11_159_268
    frozen = dict(whole.named_parameters()).keys() - whole.state_dict().keys()
    assert frozen <= frozen_of(whole).keys()
    assert not any("adapter" in n for n in frozen)


def test_the_digest_knows_name_type_shape_and_every_bit() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    same = dict(reversed(tensors.items()))
    others = [
        tensors | {"a": tensors["a"].reshape(3, 2)},
        tensors | {"a": tensors["a"].double()},
        tensors | {"a": torch.nextafter(tensors["a"], torch.tensor(9.0))},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert digest_of(tensors) == digest_of(same)
    assert len({digest_of(t) for t in (tensors, *others)}) == 6
    assert digest_of({}) == ""
    assert digest_of({"a": tensors["a"].t()}) == digest_of({"a": tensors["a"].t().contiguous()})
