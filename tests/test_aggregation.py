"""Sums of updates against exact arithmetic: in whatever order, whatever cancels, and for however many sites."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from concilium.aggregation import CHUNK, LARGEST_WEIGHT, Sum, about_before, about_own, check_like
from concilium.aggregation.mean import rule
from concilium.errors import ContractError
from concilium.messages import Tensors

Update = tuple[Mapping[str, Tensor], int]


def total_of(updates: Iterable[Update]) -> Sum:
    total = Sum()
    for tensors, weight in updates:
        total.add(tensors, weight)
    return total


def mean(updates: Iterable[Update]) -> Mapping[str, Tensor]:
    means, state = rule(total_of(updates), {}, before={})
    assert state == {}
    return means


def mean_of(values: Sequence[float], weights: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return mean(({"x": torch.tensor([v], dtype=dtype)}, w) for v, w in zip(values, weights, strict=True))["x"]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def draw(seed: int, n: int = 5) -> list[Update]:
    """Updates with magnitudes from 1e-8 to 1e8 in every element, of either sign."""
    rng = np.random.default_rng(seed)
    shapes = {"conv.weight": (4, 3, 3), "conv.bias": (4,), "norm.mean": (), "none": (0, 2)}
    updates: list[Update] = []
    for _ in range(n):
        tensors = {
            name: torch.tensor(
                10 ** rng.uniform(-8, 8, shape) * rng.choice([-1, 1], shape), dtype=torch.float32
            ).reshape(shape)
            for name, shape in shapes.items()
        }
        updates.append((tensors, int(rng.integers(1, 1000))))
    return updates


# -------------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_is_numpys(seed: int) -> None:
    updates = draw(seed)
    means = mean(updates)
    weights = [w for _, w in updates]
    for name in updates[0][0]:
        stacked = np.stack([t[name].numpy().astype(np.float64) for t, _ in updates])
        expected = np.average(stacked, axis=0, weights=weights)
        sizes = np.average(np.abs(stacked), axis=0, weights=weights)
        assert np.all(np.abs(means[name].numpy() - expected) <= 2**-24 * np.abs(expected) + 2**-50 * sizes)
        assert means[name].dtype == torch.float32
        assert means[name].shape == updates[0][0][name].shape


def test_the_mean_worked_out_by_hand() -> None:
    """(2 * 1 + 3 * 5 + 5 * 10) / 10 = 6.7, and (2 * 4 + 3 * -2 + 5 * 0) / 10 = 0.2."""
    updates = [({"x": torch.tensor([a, b])}, w) for a, b, w in ((1.0, 4.0, 2), (5.0, -2.0, 3), (10.0, 0.0, 5))]
    assert mean(updates)["x"].tolist() == torch.tensor([6.7, 0.2]).tolist()


def test_weights_are_cases_not_sites() -> None:
    """A site with three times the cases counts as three sites with the same update."""
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    assert mean([({"x": a}, 3), ({"x": b}, 1)])["x"] == 1.25
    assert bits(mean([({"x": a}, 3), ({"x": b}, 1)])["x"]) == bits(mean([({"x": t}, 1) for t in (a, b, a, a)])["x"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_mean_is_that_of_exact_fractions(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    span = 4 if dtype is torch.float16 else 8
    for _ in range(300):
        n = rng.randrange(1, 8)
        values = [rng.choice([-1, 1]) * 10 ** rng.uniform(-span, span) for _ in range(n)]
        values = torch.tensor(values, dtype=dtype).double().tolist()  # as they were sent
        if n > 2:
            values[-1] = -values[0]  # cancels, if the weights say so
        weights = [rng.randrange(1, 2000) for _ in range(n)]
        if n > 2:
            weights[-1] = weights[0]
        exact = sum((w * Fraction(v) for v, w in zip(values, weights, strict=True)), Fraction(0)) / sum(weights)
        assert mean_of(values, weights, dtype) == torch.tensor(float(exact), dtype=torch.float64).to(dtype)


def test_what_cancels_leaves_what_is_left() -> None:
    """A sum in float32 gives 0 here, one in float64 gives 0.0 or 1.5e-8."""
    values = [1e8, 1e-8, -1e8]
    assert mean_of(values, [7, 7, 7]) == torch.tensor(float(Fraction(torch.tensor(1e-8).item()) / 3)).float()
    assert np.float64(1e8) + np.float64(1e-8) - np.float64(1e8) != np.float64(1e-8)


# ------------------------------------------------------------------------------------------------------------- order


def orders(n: int, at_most: int) -> list[tuple[int, ...]]:
    every = list(itertools.islice(itertools.permutations(range(n)), 5040))
    return every if len(every) <= at_most else random.Random(0).sample(every, at_most)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_arrival_changes_no_bit(seed: int) -> None:
    updates = draw(seed, n=6)
    results = set()
    for order in orders(6, 60):
        means = mean(updates[i] for i in order)
        results.add(b"".join(bits(means[name]) for name in sorted(means)))
    assert len(results) == 1


ADVERSARIAL = [
    ([1e8, -1e8, 1e-8, 3.3e-8, 1.0, -1.0], [13, 13, 1, 7, 3, 3]),
    ([1e8, 1e-8, 1.0, -1e8, -1.0, -1e-8], [999, 1, 31, 999, 31, 1]),
    ([1e8, 0.1, 1e-8, -1e8, 0.7, 1e-7], [1, 2, 3, 1, 5, 7]),
    ([1.0, 2**-30, 2**-50, -1.0, 2**-24, 1.5], [1, 1, 1, 1, 1, 1]),
    ([3.4e38, 3.4e38, 3.4e38, -3.4e38, 1e20, 3.4e38], [5, 5, 5, 5, 5, 5]),
]


@pytest.mark.parametrize(("values", "weights"), ADVERSARIAL)
def test_no_order_of_adversarial_values_changes_a_bit(values: list[float], weights: list[int]) -> None:
    results = {bits(mean_of([values[i] for i in o], [weights[i] for i in o])) for o in orders(6, 720)}
    assert len(results) == 1
    exact = sum(w * Fraction(torch.tensor(v).item()) for v, w in zip(values, weights, strict=True)) / sum(weights)
    assert results == {bits(torch.tensor([float(exact)]))}


def test_a_plain_sum_would_depend_on_the_order() -> None:
    """The values above are such that the test can fail."""
    values, weights = ADVERSARIAL[0]
    plain = {sum(weights[i] * values[i] for i in o) for o in orders(6, 720)}
    assert len(plain) > 1


# ----------------------------------------------------------------------------------------------------------- one site


@pytest.mark.parametrize("weight", [1, 3, 7, 49, 1000, 2**20 + 1, LARGEST_WEIGHT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_the_mean_of_one_site_is_its_weights(dtype: torch.dtype, weight: int) -> None:
    """To the bit (save that -0.0 comes back as 0.0), whatever the number of its cases."""
    values = torch.randn(3 * CHUNK + 5, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(
        -30, 30, 3 * CHUNK + 5
    )
    tensor = (values.clamp(-1e4, 1e4) if not dtype.is_floating_point else values).to(dtype)
    if dtype is torch.float16:
        tensor = values.clamp(-6e4, 6e4).to(dtype) + 0.0  # tiny negatives become -0.0
    assert bits(mean([({"x": tensor}, weight)])["x"]) == bits(tensor)


def test_equal_updates_are_their_own_mean() -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert bits(mean([({"x": tensor}, w) for w in (3, 11, 6)])["x"]) == bits(tensor)


def test_whole_numbers_are_rounded_to_the_nearest() -> None:
    def of(*values: int) -> int:
        return int(mean([({"n": torch.tensor([v])}, 1) for v in values])["n"])

    assert (of(1, 2, 2), of(1, 1, 2), of(-1, -2, -2), of(100, 101)) == (2, 1, -2, 100)
    assert of(2**52, 2**52) == 2**52
    means = mean(
        [({"b": torch.tensor([v]), "i": torch.tensor([3], dtype=torch.int32)}, 1) for v in (True, True, False)]
    )
    assert means["b"].dtype == torch.bool
    assert means["b"].all()
    assert means["i"].dtype == torch.int32


def test_the_updates_are_not_changed_and_the_sum_can_go_on() -> None:
    a, b = torch.randn(5), torch.randn(5)
    before = a.clone(), b.clone()
    total = total_of([({"x": a}, 2), ({"x": b}, 3)])
    first = total.mean()["x"].clone()
    assert torch.equal(total.mean()["x"], first)
    assert (total.weight, total.count, total.names) == (5, 2, ("x",))
    total.add({"x": a}, 1)
    assert not torch.equal(total.mean()["x"], first)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_tensors_with_gradient_strides_and_many_chunks() -> None:
    wide = torch.randn(300, 400, generator=torch.Generator().manual_seed(2))
    for tensor in (wide.T, wide[::2, 1:], wide.clone().requires_grad_()):
        assert tensor.numel() > CHUNK
        got = mean([({"x": tensor}, 2), ({"x": tensor.detach() + 1}, 2)])["x"]
        assert not got.requires_grad
        torch.testing.assert_close(got, tensor.detach() + 0.5, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_updates_of_another_network_are_refused() -> None:
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    check_like(like, like)
    wrong = [
        ({"a": torch.zeros(2, 3)}, r"lacks \['b'\] and has \[\] besides. Expected 2 tensors"),
        (like | {"c": torch.zeros(1)}, r"lacks \[\] and has \['c'\]"),
        ({}, r"lacks \['a', 'b'\]"),
        (
            like | {"a": torch.zeros(3, 2)},
            r"Tensor a of an update is torch.float32 \(3, 2\). Expected torch.float32 \(2, 3\)",
        ),
        (
            like | {"b": torch.zeros(4).double()},
            r"Tensor b of an update is torch.float64 \(4,\). Expected torch.float32",
        ),
    ]
    for tensors, message in wrong:
        with pytest.raises(ContractError, match=message):
            check_like(tensors, like)
        total = total_of([(like, 1)])
        with pytest.raises(ContractError, match=message):
            total.add(tensors, 1)
        assert (total.weight, total.count) == (1, 1)


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ContractError, match="total weight of 0"):
        Sum().mean()
    with pytest.raises(ContractError, match="total weight of 0"):
        total_of([({"x": torch.ones(1)}, 0)]).mean()


# -------------------------------------------------------------------------------------------------------------- memory


def held(total: Sum) -> int:
    """Bytes of all tensors that a sum holds."""
    assert {name for name, value in vars(total).items() if isinstance(value, dict)} == {"_pairs", "_dtypes", "_squares"}
    pairs = [*total._pairs.values(), *total._squares.values()]
    return sum(t.untyped_storage().nbytes() for pair in pairs for t in pair)


def test_memory_is_two_numbers_for_each_element_however_many_sites() -> None:
    tensors = {"a": torch.randn(100, 30), "b": torch.randn(50)}
    normed = {"n.running_mean": torch.randn(20), "n.running_var": torch.rand(20)}
    total, with_norms = Sum(), Sum()
    for n_sites in range(1, 21):
        total.add(tensors, n_sites)
        with_norms.add(tensors | normed, n_sites)
        assert held(total) == 2 * 8 * 3050
        assert held(with_norms) == 2 * 8 * (3050 + 3 * 20)  # the squares of running means besides


def test_the_running_variance_of_one_site_is_its_own_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e4):
        mean = scale * torch.randn(1000, generator=generator)
        tensors = {"n.running_var": 1e-4 * torch.rand(1000, generator=generator), "n.running_mean": mean}
        for updates in ([(tensors, 123_457)], [(tensors, 3), (tensors, 7_000_001)]):
            means = total_of(updates).mean()
            assert all(torch.equal(means[name], tensors[name]) for name in tensors)


def test_changes_that_are_only_summed_tell_the_variance_of_all_data() -> None:
    """What sites mask (`about_before`), and what the server makes of the mean of it."""
    generator = torch.Generator().manual_seed(0)

    def statistics(where: float) -> dict[str, Tensor]:
        drawn = torch.rand(6, generator=generator) + 0.1, where + torch.randn(6, generator=generator)
        return dict(zip(("n.running_var", "n.running_mean"), drawn, strict=True))

    before, sites = statistics(1.0), [(statistics(where), weight) for where, weight in ((-3.0, 5), (2.0, 1), (4.0, 2))]
    told = [({n: t.double() - before[n] for n, t in about_before(site, before).items()}, w) for site, w in sites]
    changes = {n: sum(w * t[n] for t, w in told) / 8 for n in before}
    expected = total_of(sites).mean()
    for name, change in about_own(changes).items():
        torch.testing.assert_close((before[name] + change).float(), expected[name], rtol=1e-5, atol=1e-6)


def test_adding_takes_no_memory_of_the_size_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest piece worked on is a chunk."""
    import concilium.aggregation as module

    sizes: list[int] = []
    add = module._add
    monkeypatch.setattr(module, "_add", lambda h, lo, v, w: (sizes.append(v.numel()), add(h, lo, v, w)))
    total_of([({"a": torch.randn(3 * CHUNK + 7)}, 1)])
    assert sizes == [CHUNK, CHUNK, CHUNK, 7]


# ---------------------------------------------------------------------------------------- did aggregation happen at all?


def aggregation_happened(before: Tensors, updates: Sequence[Update], after: Tensors) -> bool:
    """Whether `after` is the weighted mean of the updates, tensor by tensor under its own name, and not what was there before."""
    weight = sum(w for _, w in updates)
    for name in before:
        expected = sum(w * t[name].numpy().astype(np.float64) for t, w in updates) / weight
        if name not in after or not np.allclose(after[name].numpy(), expected, rtol=1e-6, atol=1e-9):
            return False
        if np.array_equal(after[name].numpy(), before[name].numpy()):
            return False
    return after.keys() == before.keys()


def swaps(total: Sum, state: Tensors) -> tuple[Tensors, Tensors]:
    """A rule with a wrong key: two tensors of one shape change places."""
    means = total.mean()
    return means | {"enc": means["dec"], "dec": means["enc"]}, state


def forgets_weights(total: Sum, state: Tensors) -> tuple[Tensors, Tensors]:
    return {name: t * total.weight / (total.weight + 1) for name, t in total.mean().items()}, state


@pytest.mark.parametrize("broken", [None, "nothing", swaps, forgets_weights, "loses one"])
def test_the_check_is_red_for_rules_that_do_not_aggregate(
    broken: Callable[..., tuple[Tensors, Tensors]] | str | None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    before = {name: torch.randn(3, 3, generator=generator) for name in ("enc", "dec", "head")}
    updates: list[Update] = [
        ({name: t + torch.randn(3, 3, generator=generator) for name, t in before.items()}, w) for w in (2, 5, 11)
    ]
    total = total_of(updates)
    if broken == "nothing":
        after: Tensors = before
    elif broken == "loses one":
        after = {name: t for name, t in total.mean().items() if name != "head"}
    else:
        chosen = partial(rule, before=before) if broken is None or isinstance(broken, str) else broken
        after, _ = chosen(total, {})
    assert aggregation_happened(before, updates, after) == (broken is None)
