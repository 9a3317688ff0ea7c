"""What every way to collect updates keeps to (see `concilium.collect`). Its signature: tests/test_catalog.py."""

from __future__ import annotations

import gc
import itertools
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from masked import MaskedSites
from torch import Tensor

from concilium import catalog
from concilium.aggregation import UNITS, Block, one_block, weight_of
from concilium.collect import Collected
from concilium.messages import (
    Done,
    Failure,
    Reply,
    Request,
    SiteError,
    SiteLost,
    SiteRefused,
    SiteTimeout,
    Tensors,
    Train,
    Trained,
)

every_way = pytest.mark.parametrize("name", catalog.names("collect"))

LIKE = {"a": torch.zeros(2, 3), "n": torch.tensor(0)}
GOOD = Trained({"a": torch.full((2, 3), 4.0), "n": torch.tensor(4)}, 3, 5, 0.5, 1.25)


MASKED = ("secure_sum",)
"""Ways in which sites mask what they send, and answer several requests: these do so as they really do."""


def collect_of(name: str, n_sites: int = 2) -> Callable[..., Collected]:
    """The way; one that needs some sites to be left needs as few as it can."""
    given = {"threshold": max(2, n_sites // 2 + 1)} if name in MASKED else {}
    options, problems = catalog.fill("collect", name, given, "[collect]")
    assert not problems
    return partial(catalog.load("collect", name), **options)


def told(requests: Mapping[str, Request], like: Tensors, *, see_updates: bool = False) -> dict[str, Any]:
    """What a way is told besides."""
    weigh, asked = weight_of("mean"), dict.fromkeys(requests, 5)
    return {"blocks": (one_block(like, requests),), "weigh": weigh, "asked": asked, "see_updates": see_updates}


def collected(name: str, replies: Mapping[str, Any], like: Tensors = LIKE) -> Collected:
    """One round in which the sites answer so."""
    requests = {site: Train("m", 1, 0, 5, 5, like, True) for site in replies}
    if name in MASKED:
        with tempfile.TemporaryDirectory() as folder:
            sites = MaskedSites(Path(folder), replies)
            return collect_of(name, len(replies))(sites.ask, requests, **told(requests, like))

    def ask(asked: Mapping[str, Request]) -> Iterator[tuple[str, Reply | Failure]]:
        assert dict(asked) == requests
        yield from replies.items()

    return collect_of(name)(ask, requests, **told(requests, like))


def update(value: float, *, n_cases: int = 1, **changes: Tensor) -> Trained:
    tensors = {"a": torch.full((2, 3), value), "n": torch.tensor(int(value))}
    return Trained(tensors | changes, n_cases, 5, 0.5, 1.0)


def test_plain_is_found() -> None:
    assert "plain" in catalog.names("collect")


@every_way
def test_the_sum_is_weighted_by_cases(name: str) -> None:
    """(1 * 2 + 3 * 6) / 4 = 5."""
    got = collected(name, {"north": update(2.0, n_cases=1), "south": update(6.0, n_cases=3)})
    assert got.totals[0].weight == 4 * UNITS
    assert got.totals[0].mean()["a"].eq(5.0).all()
    assert got.totals[0].mean()["n"] == 5
    assert got.failures == {}


@every_way
def test_what_a_site_told_is_kept(name: str) -> None:
    got = collected(name, {"north": GOOD, "south": GOOD})
    answer = got.answers["north"]
    assert (answer.n_cases, answer.n_steps, answer.loss, answer.seconds) == (3, 5, 0.5, 1.25)


@every_way
@pytest.mark.parametrize("failure", [SiteTimeout(3.0), SiteLost(), SiteRefused("policy"), SiteError("E", "c", "r")])
def test_a_failure_is_passed_on(name: str, failure: Failure) -> None:
    got = collected(name, {"north": failure, "south": GOOD, "west": GOOD})
    assert got.failures == {"north": failure}
    assert list(got.answers) == ["south", "west"]
    assert got.totals[0].weight == 6 * UNITS


SPOILT = update(2.0).weights["a"].clone()
SPOILT[1, 2] = math.nan
HUGE = torch.full((2, 3), 3e38)  # finite, and its sum is not
WRONG: dict[str, tuple[Any, str]] = {
    "one NaN": (update(2.0, a=SPOILT), "not_finite"),
    "infinite": (update(2.0, a=torch.full((2, 3), -math.inf)), "not_finite"),
    "infinities that cancel": (update(2.0, a=torch.tensor([[math.inf, -math.inf, 0]] * 2)), "not_finite"),
    "loss NaN": (Trained(GOOD.weights, 3, 5, math.nan, 1.0), "not_finite"),
    "endless": (Trained(GOOD.weights, 3, 5, 0.5, math.inf), "not_finite"),
    "missing": (Trained({"a": torch.ones(2, 3)}, 3, 5, 0.5, 1.0), "wrong_tensors"),
    "none": (Trained({}, 3, 5, 0.5, 1.0), "wrong_tensors"),
    "unknown": (update(2.0, b=torch.ones(1)), "wrong_tensors"),
    "shape": (update(2.0, a=torch.ones(3, 2)), "wrong_tensors"),
    "type": (update(2.0, a=torch.ones(2, 3).double()), "wrong_tensors"),
    "no steps": (Trained(GOOD.weights, 3, 0, 0.5, 1.0), "wrong_steps"),
    "fewer steps than none": (Trained(GOOD.weights, 3, -1, 0.0, 1.0), "wrong_steps"),
    "more steps than were asked": (Trained(GOOD.weights, 3, 6, 0.5, 1.0), "wrong_steps"),
    "control of no tensor": (Trained(GOOD.weights, 3, 5, 0.5, 1.0, {"b": torch.ones(1)}), "wrong_tensors"),
    "control of another shape": (Trained(GOOD.weights, 3, 5, 0.5, 1.0, {"a": torch.ones(3)}), "wrong_tensors"),
    "control not finite": (Trained(GOOD.weights, 3, 5, 0.5, 1.0, {"a": torch.full((2, 3), math.nan)}), "not_finite"),
    "no cases": (update(2.0, n_cases=0), "no_cases"),
    "fewer than no cases": (update(2.0, n_cases=-3), "no_cases"),
    "more cases than there are": (update(2.0, n_cases=2**70), "too_many_cases"),
    "wrong reply": (Done(), "wrong_reply"),
}


@every_way
@pytest.mark.parametrize("reason", WRONG)
def test_a_wrong_update_is_a_failure_and_not_added(name: str, reason: str) -> None:
    wrong, code = WRONG[reason]
    if name in MASKED and reason == "type":
        pytest.skip("what is under masks has no type")
    at_the_site = name in MASKED and reason in ("unknown", "shape")
    good = {"south": GOOD, "west": GOOD}
    for replies in ({"north": wrong, **good}, {**good, "north": wrong}):
        got = collected(name, replies)
        failure = got.failures["north"]
        assert isinstance(failure, SiteError)
        assert failure.code == ("contract" if at_the_site else code)
        assert set(got.failures) == {"north"}
        assert list(got.answers) == ["south", "west"]
        assert (got.totals[0].weight, got.totals[0].count) == (6 * UNITS, 2)
        assert all(torch.equal(got.totals[0].mean()[n], GOOD.weights[n]) for n in LIKE)


@every_way
def test_large_numbers_are_no_failure_where_there_is_no_range(name: str) -> None:
    got = collected(name, {"north": update(0.0, a=HUGE), "south": update(0.0, a=HUGE)})
    if name in MASKED:
        assert [f.code for f in got.failures.values() if isinstance(f, SiteError)] == ["out_of_range"] * 2
        assert got.totals[0].count == 0
        return
    assert got.failures == {}
    assert torch.equal(got.totals[0].mean()["a"], HUGE)


@every_way
def test_nobody_answered(name: str) -> None:
    got = collected(name, {"north": SiteLost(), "south": SiteLost()})
    assert (got.totals[0].weight, dict(got.answers), set(got.failures)) == (0, {}, {"north", "south"})


@every_way
def test_the_order_of_arrival_changes_no_bit(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    replies = {f"s{i}": update(1.0, n_cases=i + 1, a=torch.randn(2, 3, generator=generator)) for i in range(4)}
    results = set()
    for order in itertools.permutations(replies):
        mean = collected(name, {site: replies[site] for site in order}).totals[0].mean()
        results.add(mean["a"].numpy().tobytes())
    assert len(results) == 1


@every_way
def test_what_comes_beside_the_weights_is_summed_by_cases(name: str) -> None:
    """(1 * 2 + 3 * 6) / 4 = 5; a site without it, or with something else, fails."""
    north, south = (
        Trained(GOOD.weights, n, 5, 0.5, 1.0, {"a": torch.full((2, 3), v)}) for n, v in ((1, 2.0), (3, 6.0))
    )
    got = collected(name, {"north": north, "south": south, "west": GOOD})
    assert (got.control.weight, got.control.count) == (4, 2)
    assert got.control.mean()["a"].eq(5.0).all()
    assert set(got.failures) == {"west"}


@every_way
def test_a_site_that_did_part_of_the_steps_counts_in_part(name: str) -> None:
    part = Trained(update(2.0).weights, 5, 1, 0.5, 1.0)  # 1 of 5 steps: 5 cases count as 1
    got = collected(name, {"north": part, "south": update(6.0, n_cases=3)})
    assert got.totals[0].mean()["a"].eq(5.0).all()


def test_plain_shows_each_update_to_a_rule_that_must_see_it() -> None:
    replies = {"south": update(6.0, n_cases=3), "north": update(2.0), "west": update(2.0, a=SPOILT)}
    requests = {site: Train("m", 1, 0, 5, 5, LIKE, True) for site in replies}
    got = collect_of("plain")(lambda _: iter(replies.items()), requests, **told(requests, LIKE, see_updates=True))
    ((north, south),) = got.updates
    assert (north.n_cases, south.n_cases) == (1, 3)
    assert north.weights.keys() == LIKE.keys()
    assert all(torch.equal(south.weights[n], t) for n, t in update(6.0).weights.items())
    assert collected("plain", replies).updates == ()


def test_plain_tells_blocks_apart() -> None:
    """Sites that share only some tensors, which one of them calls otherwise."""
    blocks = (
        Block({"a": LIKE["a"]}, {"north": {"a": "a"}, "south": {"a": "mine"}}),
        Block({"n": LIKE["n"]}, {"north": {"n": "n"}, "west": {"n": "n"}}),
    )
    replies = {
        "north": update(2.0),
        "south": Trained({"mine": torch.full((2, 3), 6.0)}, 3, 5, 0.5, 1.0),
        "west": Trained({"n": torch.tensor(4), "a": LIKE["a"]}, 1, 5, 0.5, 1.0),  # more than is its own
    }
    requests = {site: Train("m", 1, 0, 5, 5, {}, True) for site in replies}
    got = collect_of("plain")(
        lambda _: iter(replies.items()),
        requests,
        blocks=blocks,
        weigh=weight_of("mean"),
        asked=dict.fromkeys(replies, 5),
    )
    assert set(got.failures) == {"west"}
    assert got.totals[0].mean()["a"].eq(5.0).all()
    assert (got.totals[1].count, got.totals[1].names) == (1, ("n",))


class Arriving:
    """Replies that exist from when they are asked for; like an engine, it keeps none."""

    def __init__(self, sites: Mapping[str, Request]) -> None:
        self.left = list(sites)
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __iter__(self) -> Arriving:
        return self

    def __next__(self) -> tuple[str, Reply | Failure]:
        self.most = max(self.most, sum(ref() is not None for ref in self.made))
        if not self.left:
            raise StopIteration
        i = len(self.made)
        tensor = torch.full((2, 3), math.nan if i % 3 == 1 else float(i))
        self.made.append(weakref.ref(tensor))
        return self.left.pop(), Trained({"a": tensor, "n": torch.tensor(1)}, 0 if i % 3 == 2 else 1, 1, 0.5, 1.0)


def test_one_update_is_in_memory_at_a_time() -> None:
    """With `plain`, what came before is gone when the next one is unpacked, whether it was added or not."""
    requests = {f"s{i}": Train("m", 1, 0, 5, 5, LIKE, True) for i in range(9)}
    arriving = Arriving(requests)
    gc.disable()  # nothing may wait for the collector: updates are large
    try:
        got = collect_of("plain")(lambda _: arriving, requests, **told(requests, LIKE))
    finally:
        gc.enable()
    assert (len(got.answers), len(got.failures)) == (3, 6)
    assert len(arriving.made) == 9
    assert arriving.most == 0
