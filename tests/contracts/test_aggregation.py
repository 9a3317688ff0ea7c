"""What every aggregation rule keeps to (see `concilium.aggregation`). Its signature: tests/test_catalog.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from concilium import catalog
from concilium.aggregation import Sum, check_like
from concilium.messages import Tensors
from concilium.wire import read_tensors, write_tensors

Rule = Callable[[Sum, Tensors], tuple[Tensors, Tensors]]

every_rule = pytest.mark.parametrize("name", catalog.names("aggregation"))


def rule_of(name: str) -> Rule:
    """The rule as a study without options has it."""
    options, problems = catalog.fill("aggregation", name, {}, "[aggregation]")
    assert not problems
    return partial(catalog.load("aggregation", name), **options)


def network(seed: int) -> dict[str, Tensor]:
    """Weights, statistics of a batch norm, a counter, and a tensor without elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 2, 3, 3, generator=generator),
        "norm.running_var": torch.rand(4, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7 + seed),
        "none": torch.empty(0, 3),
    }


def summed(seed: int, order: tuple[int, ...] = (0, 1, 2)) -> Sum:
    total = Sum()
    for site in order:
        total.add(network(10 * seed + site), (3, 10, 1)[site])
    return total


def bits(tensors: Tensors) -> Mapping[str, list[int]]:
    return {name: t.contiguous().view(-1).view(torch.uint8).tolist() for name, t in sorted(tensors.items())}


def test_the_mean_is_found() -> None:
    assert "mean" in catalog.names("aggregation")


@every_rule
def test_new_weights_are_named_shaped_and_typed_as_the_updates(name: str) -> None:
    rule = rule_of(name)
    state: Tensors = {}
    for number in range(3):
        weights, state = rule(summed(number), state)
        check_like(weights, network(0))
        assert all(t.isfinite().all() for t in weights.values())
        assert all(not t.requires_grad for t in (*weights.values(), *state.values()))


@every_rule
def test_the_order_of_the_sites_changes_no_bit(name: str) -> None:
    rule = rule_of(name)
    results = [rule(summed(1, order), {}) for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))]
    assert all(bits(weights) == bits(results[0][0]) for weights, _ in results)
    assert all(bits(state) == bits(results[0][1]) for _, state in results)


@every_rule
def test_new_weights_depend_on_every_tensor_and_every_site(name: str) -> None:
    """A rule that does nothing, or mixes up names, is none."""
    rule = rule_of(name)
    before, _ = rule(summed(1), {})
    for changed in ("conv.weight", "norm.running_var"):
        for site in range(3):
            total = Sum()
            for i in range(3):
                update = network(10 + i)
                if i == site:
                    update[changed] = update[changed] + 1
                total.add(update, (3, 10, 1)[i])
            after, _ = rule(total, {})
            assert {n for n in before if not torch.equal(before[n], after[n])} == {changed}


@every_rule
def test_its_state_survives_on_disk(name: str, tmp_path: Path) -> None:
    """Going on from what was written gives the same bits as never having stopped."""
    rule = rule_of(name)
    state: Tensors = {}
    restored: Tensors = {}
    for number in range(4):
        weights, state = rule(summed(number), state)
        again, new = rule_of(name)(summed(number), restored)
        assert bits(again) == bits(weights)
        write_tensors(tmp_path / "state.safetensors", new, {})
        restored, _ = read_tensors(tmp_path / "state.safetensors")
        assert bits(restored) == bits(state)


@every_rule
def test_what_it_is_given_stays_as_it_is(name: str) -> None:
    rule = rule_of(name)
    _, state = rule(summed(0), {})
    total, before = summed(1), bits(state)
    mean = bits(total.mean())
    torch.manual_seed(random.Random(name).randrange(100))
    first = bits(rule(total, state)[0])
    torch.manual_seed(1)
    assert bits(rule(total, state)[0]) == first, "a rule draws nothing from global generators"
    assert bits(state) == before
    assert bits(total.mean()) == mean
