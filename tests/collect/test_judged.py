"""Updates judged by the other sites: who is asked what, what a judge's failure means, and what decides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from concilium.aggregation import Block, one_block, weight_of
from concilium.collect import Collected
from concilium.collect.judged import collect, qualities
from concilium.errors import StudyError
from concilium.messages import (
    Done,
    Failure,
    Judge,
    Judged,
    Reply,
    Request,
    SiteError,
    SiteLost,
    SiteTimeout,
    Train,
    Trained,
)

LIKE = {"a": torch.zeros(2), "n": torch.tensor(0)}
SITES = ("north", "south", "west", "east")


def update(site: str) -> Trained:
    value = SITES.index(site)
    return Trained({"a": torch.full((2,), float(value)), "n": torch.tensor(value)}, 3, 5, 0.5, 1.0)


class Sites:
    """Sites that judge: `level` is how easy a judge's cases are, `good` how good an update is."""

    def __init__(self, **wrong: Any) -> None:
        self.level = {"north": 0.1, "south": 0.3, "west": 0.2, "east": 0.0}
        self.good = dict.fromkeys(SITES, 0.6)
        self.trained: dict[str, Any] = {}
        self.judged: dict[tuple[str, str], Any] = {}
        self.asked: list[dict[str, Request]] = []
        vars(self).update(wrong)

    def ask(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply | Failure]]:
        self.asked.append(dict(requests))
        for site, request in requests.items():
            if isinstance(request, Train):
                yield site, self.trained.get(site, update(site))
            else:
                assert isinstance(request, Judge)
                judged = SITES[int(request.weights["n"])]
                score = self.good[judged] + self.level[site]
                yield site, self.judged.get((judged, site), Judged(score, request.cases))

    def collected(self, *, see_updates: bool = True, sites: tuple[str, ...] = SITES, **changes: Any) -> Collected:
        requests = {site: Train("m", 7, 0, 5, 5, LIKE, True) for site in sites}
        told = {"blocks": (one_block(LIKE, requests),), "weigh": weight_of("mean"), "asked": dict.fromkeys(requests, 5)}
        return collect(self.ask, requests, see_updates=see_updates, **(told | changes))

    def qualities(self, **changes: Any) -> dict[str, float | None]:
        (updates,) = self.collected(**changes).updates
        return {u.site: u.quality for u in updates}


def test_every_update_goes_to_all_other_sites_and_not_to_its_own() -> None:
    sites = Sites()
    sites.collected(cases=3)
    first, *judged = sites.asked
    assert set(first) == set(SITES)
    assert len(judged) == len(SITES)
    for requests, site in zip(judged, sorted(SITES), strict=True):
        assert set(requests) == set(SITES) - {site}
        assert len({id(r) for r in requests.values()}) == 1, "one message, packed once"
        for request in requests.values():
            assert isinstance(request, Judge)
            assert (request.model, request.round, request.cases) == ("m", 7, 3)
            assert all(torch.equal(request.weights[n], t) for n, t in update(site).weights.items())


def test_the_rest_is_what_plain_collects() -> None:
    got = Sites().collected()
    assert got.totals[0].mean()["a"].tolist() == [1.5, 1.5]
    assert (set(got.answers), dict(got.failures)) == (set(SITES), {})
    (updates,) = got.updates
    assert [u.site for u in updates] == sorted(SITES)


def test_sites_are_told_before_they_train_that_others_will_see_their_updates() -> None:
    """In one request, which is packed once; and only where others will."""
    requests = dict.fromkeys(SITES, Train("m", 7, 0, 5, 5, LIKE, True))
    for judging in (True, False):
        sites = Sites()
        told = {"blocks": (one_block(LIKE, requests),), "weigh": weight_of("mean"), "asked": dict.fromkeys(requests, 5)}
        collect(sites.ask, requests, see_updates=judging, **told)
        sent = sites.asked[0].values()
        assert {r.shown for r in sent if isinstance(r, Train)} == {judging}
        assert len({id(r) for r in sent}) == 1


def test_where_the_sum_is_enough_nobody_judges() -> None:
    sites = Sites()
    assert sites.collected(see_updates=False).updates == ()
    assert len(sites.asked) == 1


def test_equal_updates_have_equal_quality_however_hard_the_judges_cases_are() -> None:
    """Without the comparison on shared judges, the site with the easiest cases would have the worst update."""
    found = Sites().qualities().values()
    assert list(found) == [pytest.approx(0.75)] * 4


@pytest.mark.parametrize("bad", SITES)
def test_a_worse_update_is_as_much_worse_as_it_is(bad: str) -> None:
    found = Sites(good=dict.fromkeys(SITES, 0.6) | {bad: 0.2}).qualities()
    best = max(q for q in found.values() if q is not None)
    assert {site: best - (q or 0) for site, q in found.items()} == {
        site: pytest.approx(0.4 if site == bad else 0.0) for site in SITES
    }


def test_a_judge_that_says_nonsense_does_not_decide() -> None:
    """The east gives its friend 1 and all others 0; with five sites its word is one of three."""
    names = [*SITES, "centre"]
    scores = dict.fromkeys(itertools.permutations(names, 2), 0.7)
    scores |= {(u, "east"): 1.0 if u == "north" else 0.0 for u in names if u != "east"}
    found = qualities(names, scores)
    assert found == dict.fromkeys(names, pytest.approx(0.7))


def test_with_two_sites_there_is_nothing_to_compare() -> None:
    scores = {("north", "south"): 0.9, ("south", "north"): 0.1}
    found = qualities(["north", "south"], scores)
    assert found["north"] == found["south"] == 0.5


def test_a_site_alone_is_not_judged() -> None:
    sites = Sites(trained=dict.fromkeys(SITES[1:], SiteLost()))
    assert sites.qualities() == {"north": 0.0}
    assert len(sites.asked) == 1


WRONG = [
    SiteLost(),
    SiteTimeout(3.0),
    Done(),
    Judged(math.nan, 8),
    Judged(1.5, 8),
    Judged(-0.1, 8),
    Judged(0.5, 9),
    Judged(0.5, -1),
]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_judge_that_fails_is_a_failure_of_the_round_and_its_update_counts(wrong: Any) -> None:
    sites = Sites(judged={(judged, "south"): wrong for judged in SITES})
    got = sites.collected()
    assert set(got.failures) == {"south"}
    assert set(got.answers) == set(SITES)
    assert got.totals[0].count == 4
    (updates,) = got.updates
    assert [u.quality for u in updates] == [pytest.approx(0.7)] * 4  # of those with a level of 0.1, 0.2 and 0
    assert sum("south" in requests for requests in sites.asked) == 2, "after its failure it is not asked again"
    known = wrong if isinstance(wrong, SiteLost | SiteTimeout) else None
    assert got.failures["south"] == known or isinstance(got.failures["south"], SiteError)


def test_a_site_that_failed_to_train_neither_judges_nor_is_judged() -> None:
    sites = Sites(trained={"west": SiteError("RuntimeError", "failed", "r")})
    assert set(sites.qualities()) == set(SITES) - {"west"}
    assert all("west" not in requests for requests in sites.asked[1:])


def test_a_site_without_cases_does_not_count_as_a_judge() -> None:
    sites = Sites(judged={(judged, "south"): Judged(0.0, 0) for judged in SITES})
    got = sites.collected()
    assert got.failures == {}
    assert [u.quality for u in got.updates[0]] == [pytest.approx(0.7)] * 4


def test_where_nobody_can_judge_the_study_is_wrong() -> None:
    none = {(judged, judge): Judged(0.0, 0) for judged in SITES for judge in SITES}
    with pytest.raises(StudyError, match="no site judged any of 4 updates"):
        Sites(judged=none).collected()


def test_where_all_judges_fail_all_updates_are_worth_the_same() -> None:
    lost = {(judged, judge): SiteLost() for judged in SITES for judge in SITES}
    got = Sites(judged=lost).collected()
    assert set(got.failures) == set(SITES)
    assert [u.quality for u in got.updates[0]] == [0.0] * 4


@pytest.mark.parametrize(
    "blocks",
    [
        (Block({"a": LIKE["a"]}, {site: {"a": "a"} for site in SITES}), Block({"n": LIKE["n"]}, {"north": {"n": "n"}})),
        (one_block(LIKE, SITES[:3]),),
        (Block(LIKE, {site: {"a": "a", "n": "m" if site == "east" else "n"} for site in SITES}),),
    ],
    ids=["a block of one site", "a site without a block", "other names"],
)
def test_sites_with_tensors_of_their_own_are_refused(blocks: tuple[Block, ...]) -> None:
    with pytest.raises(StudyError, match="tensors of their own"):
        Sites().collected(blocks=blocks)


def test_the_networks_names_are_sent() -> None:
    """A block has names that only the server knows."""
    block = Block({"0": LIKE["a"], "1": LIKE["n"]}, {site: {"0": "a", "1": "n"} for site in SITES})
    assert list(Sites().qualities(blocks=(block,)).values()) == [pytest.approx(0.75)] * 4
