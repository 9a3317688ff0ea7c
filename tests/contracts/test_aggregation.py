"""What every aggregation rule keeps to (see `concilium.aggregation`). Its signature: tests/test_catalog.py."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from concilium import catalog
from concilium.aggregation import Sum, Update, check_like, must_see_updates, weight_of
from concilium.messages import Tensors
from concilium.wire import read_tensors, write_tensors

Given = Sum | list[Update]

every_rule = pytest.mark.parametrize("name", catalog.names("aggregation"))
N_CASES = (3, 10, 1)
"""Of three sites; each took four steps."""

NEUTRAL: Mapping[str, Mapping[str, float] | None] = {
    "mean": {},
    "unweighted": {},  # of sites of one size
    "fednova": {},  # of sites that took as many steps
    "momentum": {"learning_rate": 1.0, "momentum": 0.0},
    "trimmed_mean": {"share": 0.0},
    "krum": {"keep": 3},
    "quality": {},  # of updates of one quality
    "agreement": {"lag": 1e6, "turn": 1e6},
    "adam": None,  # its step has one length, whatever the mean
    "yogi": None,
    "median": None,
}
"""Options under which a rule is the mean, of sites of one size; `None`: there are none. A new rule is added here."""


def rule_of(name: str) -> Callable[..., tuple[Tensors, Tensors]]:
    """The rule as a study without options has it, on weights that are no site's."""
    options, problems = catalog.fill("aggregation", name, {}, "[aggregation]")
    assert not problems
    return partial(catalog.load("aggregation", name), before=network(99), **options)


def network(seed: int) -> dict[str, Tensor]:
    """Weights, statistics of a batch norm, a counter, and a tensor without elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 2, 3, 3, generator=generator),
        "norm.running_var": torch.rand(4, generator=generator),
        "norm.running_mean": torch.randn(4, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7 + seed),
        "none": torch.empty(0, 3),
    }


def seen(weights: Tensors, n_cases: int, site: str) -> Update:
    """An update as a way of collecting gives it that has asked others for its quality."""
    return Update(weights, n_cases, 4, 0.5, quality=0.8, site=site)


def given(
    name: str, updates: Sequence[Tensors], order: Sequence[int] = (0, 1, 2), n_cases: Sequence[int] = N_CASES
) -> Given:
    """What a rule gets for these updates: their sum in this order of arrival, or each, of equal quality."""
    if must_see_updates(name):
        return [seen(u, n_cases[site], f"s{site}") for site, u in enumerate(updates)]
    total, weigh = Sum(), weight_of(name)
    for site in order:
        total.add(updates[site], weigh(n_cases[site], 1.0))
    return total


def summed(name: str, seed: int, order: Sequence[int] = (0, 1, 2)) -> Given:
    return given(name, [network(10 * seed + site) for site in range(3)], order)


def bits(tensors: Tensors) -> Mapping[str, list[int]]:
    return {name: t.contiguous().view(-1).view(torch.uint8).tolist() for name, t in sorted(tensors.items())}


def test_the_rules_are_found() -> None:
    assert {"mean", "adam", "median"} <= set(catalog.names("aggregation"))


@every_rule
def test_new_weights_are_named_shaped_and_typed_as_the_updates(name: str) -> None:
    rule = rule_of(name)
    state: Tensors = {}
    for number in range(3):
        weights, state = rule(summed(name, number), state)
        check_like(weights, network(0))
        assert all(t.isfinite().all() for t in weights.values())
        assert all(not t.requires_grad for t in (*weights.values(), *state.values()))


@every_rule
def test_the_order_of_the_sites_changes_no_bit(name: str) -> None:
    rule = rule_of(name)
    results = [rule(summed(name, 1, order), {}) for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))]
    assert all(bits(weights) == bits(results[0][0]) for weights, _ in results)
    assert all(bits(state) == bits(results[0][1]) for _, state in results)


@every_rule
def test_new_weights_depend_on_every_tensor(name: str) -> None:
    """A rule that does nothing, or mixes up names, is none."""
    rule = rule_of(name)
    updates = [network(10 + site) for site in range(3)]
    before, _ = rule(given(name, updates), {})
    for changed in ("conv.weight", "norm.running_var"):
        after, _ = rule(given(name, [{**u, changed: u[changed] + 1} for u in updates]), {})
        assert {n for n in before if not torch.equal(before[n], after[n])} == {changed}


@every_rule
def test_the_variance_of_all_data_is_that_within_sites_and_that_between_them(name: str) -> None:
    """Three sites that differ in nothing but where a norm's inputs lie: at -3, 0 and 3, with a variance of 1 at each."""
    same = network(99)
    where = [torch.full((4,), m) for m in (-3.0, 0.0, 3.0)]
    updates = [{**same, "norm.running_var": torch.ones(4), "norm.running_mean": m} for m in where]
    expected = {"krum": 1.0, "median": 10.0, "trimmed_mean": 10.0}  # one site's; the middle one of 10, 1 and 10
    for n_cases in ((5, 5, 5), (5, 20, 5)):
        of_all = 1 + 9 * (n_cases[0] + n_cases[2]) / sum(n_cases)
        of_equals = 7.0 if name == "unweighted" else expected.get(name, of_all)
        weights, _ = rule_of(name)(given(name, updates, n_cases=n_cases), {})
        torch.testing.assert_close(weights["norm.running_var"], torch.full((4,), of_equals))


@every_rule
def test_every_site_counts_where_the_sum_is_enough(name: str) -> None:
    if must_see_updates(name):
        return  # such a rule may well leave a site out
    rule = rule_of(name)
    updates = [network(10 + site) for site in range(3)]
    before, _ = rule(given(name, updates), {})
    for site in range(3):
        moved = [{**u, "conv.weight": u["conv.weight"] + (i == site)} for i, u in enumerate(updates)]
        assert not torch.equal(before["conv.weight"], rule(given(name, moved), {})[0]["conv.weight"])


@every_rule
def test_where_no_site_moved_nothing_moves(name: str) -> None:
    rule, same = rule_of(name), network(99)
    state: Tensors = {}
    for _ in range(3):
        weights, state = rule(given(name, [same] * 3), state)
        for tensor, value in weights.items():
            torch.testing.assert_close(value, same[tensor], rtol=1e-6, atol=1e-7)


@every_rule
def test_the_neutral_setting_is_the_mean(name: str) -> None:
    """Over three rounds, since some rules remember."""
    neutral = NEUTRAL[name]
    if neutral is None:
        return
    options, problems = catalog.fill("aggregation", name, dict(neutral), "[aggregation]")
    assert not problems
    before, state = network(99), {}
    for number in range(3):
        updates = [network(10 * number + site) for site in range(3)]
        got: Given = [Update(u, 5, 4, 0.5, quality=0.8, site=f"s{i}") for i, u in enumerate(updates)]
        if not must_see_updates(name):
            got = Sum()
            for update in updates:
                got.add(update, weight_of(name)(5, 1.0))
        mean = Sum()
        for update in updates:
            mean.add(update, 5)
        weights, state = catalog.load("aggregation", name)(got, state, before=before, **options)
        for key, tensor in mean.mean().items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-6, atol=1e-6)
        before = dict(weights)


@every_rule
def test_a_single_update_is_possible(name: str) -> None:
    """Where others failed, or few take part."""
    if must_see_updates(name):
        alone: Given = [seen(network(1), 3, "s0")]
    else:
        alone = Sum()
        alone.add(network(1), 3)
    weights, _ = rule_of(name)(alone, {})
    check_like(weights, network(0))
    assert all(t.isfinite().all() for t in weights.values())


class OnDisk(Mapping[str, Tensor]):
    """Tensors that exist from when they are read until nobody holds them; `alive` are those of all updates."""

    def __init__(self, weights: Tensors, alive: list[weakref.ref[Tensor]], most: list[int]) -> None:
        self.weights, self.alive, self.most = weights, alive, most

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name].clone()
        self.alive[:] = [ref for ref in self.alive if ref() is not None] + [weakref.ref(tensor)]
        self.most.append(len(self.alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@every_rule
def test_it_holds_a_tensor_of_each_site_and_no_network(name: str) -> None:
    if not must_see_updates(name):
        return  # it never sees one
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []
    tensors = [{f"{n}.{i}": t for i in range(5) for n, t in network(10 + site).items()} for site in range(3)]
    before = {f"{n}.{i}": t for i in range(5) for n, t in network(99).items()}
    updates = [seen(OnDisk(t, alive, most), N_CASES[site], f"s{site}") for site, t in enumerate(tensors)]
    gc.collect()
    weights, _ = rule_of(name)(updates, {}, before=before)
    check_like(weights, before)
    assert max(most) <= 3 + 2, "the next one may be read while those are held"


@every_rule
def test_its_state_survives_on_disk(name: str, tmp_path: Path) -> None:
    """Going on from what was written gives the same bits as never having stopped."""
    rule = rule_of(name)
    state: Tensors = {}
    restored: Tensors = {}
    for number in range(4):
        weights, state = rule(summed(name, number), state)
        again, new = rule_of(name)(summed(name, number), restored)
        assert bits(again) == bits(weights)
        write_tensors(tmp_path / "state.safetensors", new, {})
        restored, _ = read_tensors(tmp_path / "state.safetensors")
        assert bits(restored) == bits(state)


@every_rule
def test_what_it_is_given_stays_as_it_is(name: str) -> None:
    rule = rule_of(name)
    _, state = rule(summed(name, 0), {})
    total, before = summed(name, 1), bits(state)
    held = [bits(u.weights) for u in total] if isinstance(total, list) else bits(total.mean())
    torch.manual_seed(random.Random(name).randrange(100))
    first = bits(rule(total, state)[0])
    torch.manual_seed(1)
    assert bits(rule(total, state)[0]) == first, "a rule draws nothing from global generators"
    assert bits(state) == before
    after = [bits(u.weights) for u in total] if isinstance(total, list) else bits(total.mean())
    assert after == held
