"""Who takes part in a round: a pure function of names, seed and number; and what a study may ask of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from concilium.errors import StudyError
from concilium.protocols._cohort import cohort
from concilium.study import parse_study

TEN = {f"s{i}": i + 1 for i in range(10)}
EVERYBODY: dict[str, Any] = {"participation": 1.0, "cohorts": (), "least": 1, "seed": 7}


def asked(number: int, sites: dict[str, int] = TEN, **changes: Any) -> dict[str, int]:
    return cohort(sites, number, **EVERYBODY | changes)


def test_unless_told_otherwise_it_is_everybody() -> None:
    assert asked(1) == asked(2) == TEN


@pytest.mark.parametrize(
    ("share", "least", "expected"),
    [(0.1, 1, 1), (0.01, 1, 1), (0.1, 3, 3), (0.25, 1, 3), (0.24, 1, 2), (0.5, 2, 5), (0.99, 1, 10), (1.0, 20, 10)],
)
def test_a_share_is_rounded_and_at_least_the_least(share: float, least: int, expected: int) -> None:
    assert {len(asked(number, participation=share, least=least)) for number in range(1, 30)} == {expected}


def test_each_round_and_seed_draws_anew_and_the_same_again() -> None:
    rounds = [tuple(asked(number, participation=0.3)) for number in range(1, 40)]
    assert rounds == [tuple(asked(number, participation=0.3)) for number in range(1, 40)]
    assert len(set(rounds)) > 20
    assert rounds != [tuple(asked(number, participation=0.3, seed=8)) for number in range(1, 40)]
    assert all(asked(3, participation=0.3)[site] == TEN[site] for site in asked(3, participation=0.3))


def test_every_site_has_the_same_chance() -> None:
    """Of 2000 rounds each of ten sites takes part in 600, give or take four standard deviations (20.5)."""
    counts = Counter(site for number in range(1, 2001) for site in asked(number, participation=0.3))
    assert all(abs(counts[site] - 600) < 82 for site in TEN)


def test_the_order_of_the_sites_and_who_is_away_change_no_others_draw() -> None:
    backwards = dict(reversed(TEN.items()))
    for number in range(1, 20):
        drawn = asked(number, participation=0.3)
        assert asked(number, backwards, participation=0.3) == drawn
        away = next(site for site in TEN if site not in drawn)
        rest = {site: n for site, n in TEN.items() if site != away}
        assert asked(number, rest, participation=0.33) == drawn


def test_cohorts_take_turns_and_one_that_is_away_is_passed_over() -> None:
    cohorts = (("s0", "s1"), ("s2",), ("s3", "s0"))
    sites = dict.fromkeys(("s0", "s1", "s2", "s3"), 1)
    assert [set(asked(n, sites, cohorts=cohorts)) for n in (1, 2, 3, 4)] == [
        {"s0", "s1"}, {"s2"}, {"s3", "s0"}, {"s0", "s1"},
    ]  # fmt: skip
    del sites["s2"]
    assert [set(asked(n, sites, cohorts=cohorts)) for n in (1, 2, 3)] == [{"s0", "s1"}, {"s3", "s0"}, {"s0", "s1"}]


# -------------------------------------------------------------------------------------------------------------- studies


def errors(
    update: str = "plain",
    rule: str = "mean",
    name: str = "federated",
    more: dict[str, Any] | None = None,
    **protocol: Any,
) -> str:
    raw = {
        "study": {"name": "x"},
        "sites": {name: {"data": name} for name in ("north", "south", "west", "east")},
        "protocol": {"name": name, "rounds": 4, "steps": 1} | protocol,
        "local_update": {"name": update},
        "aggregation": {"name": rule},
        **(more or {}),
    }
    try:
        parse_study(raw, folder=Path("/"), check_data=False)
    except StudyError as e:
        return str(e)
    return ""


TURNS = [["north", "south"], ["west", "east"]]


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (
            {"cohorts": [["north", "sotuh"], ["west", "east", "south"]]},
            "no site is called sotuh. Known: north, south, ",
        ),
        (
            {"cohorts": [["north", "south"], ["west"]]},
            ": east would never take part. Allowed: every site in one cohort",
        ),
        ({"cohorts": [*TURNS, []]}, "a cohort is empty, or names a site twice."),
        ({"cohorts": [*TURNS, ["north", "north"]]}, "a cohort is empty, or names a site twice."),
        ({"cohorts": TURNS, "participation": 0.5}, "with participation = 0.5. Allowed: one of the two."),
        ({"cohorts": TURNS, "min_sites": 3}, "min_sites = 3 is not allowed with a cohort of 2. Allowed: at most"),
        ({"participation": 0}, "[protocol] participation = 0.0 is not allowed. Allowed: more than 0 to 1."),
        ({"participation": 1.5}, "[protocol] participation = 1.5 is not allowed. Allowed: more than 0 to 1."),
        ({"cohorts": ["north"]}, "is not allowed. Allowed: a list, each text."),
    ],
)
@pytest.mark.parametrize("name", ["federated", "splitfed"])
def test_what_a_study_may_not_ask(name: str, protocol: dict[str, Any], expected: str) -> None:
    assert expected in errors(name=name, **protocol)


def test_what_a_study_may_ask() -> None:
    assert errors(cohorts=TURNS) == errors(participation=0.5, min_sites=3) == errors(cohorts=[["north"], *TURNS]) == ""


def test_a_site_that_never_takes_part_would_have_no_network_of_its_own() -> None:
    assert "would never take part" in errors("ditto", participation=0.1, min_sites=1, rounds=1)
    assert "south would never" not in errors("ditto", participation=0.1, min_sites=1, rounds=100)
    assert errors("ditto", cohorts=TURNS, rounds=2) == ""
    assert "[local_update] name = 'ditto': with seed 0 west, east would" in errors("ditto", cohorts=TURNS, rounds=1)
    assert errors(participation=0.1, min_sites=1, rounds=1) == ""
    kept = {"sharing": {"keep": ["norms"]}}
    assert "[sharing] keep = ['norms']: with seed 0 west, east would never" in errors(
        cohorts=TURNS, rounds=1, more=kept
    )
    by_site = {"plan": {"fingerprint": "site"}}
    assert "[plan] fingerprint = 'site': with seed 0 west, east would" in errors(cohorts=TURNS, rounds=1, more=by_site)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"order": ["north", "south"]},
            "[protocol] order = ['north', 'south'] is not allowed. Allowed: every site once (north",
        ),
        ({"order": ["north", "south", "west", "east", "east"]}, "Allowed: every site once"),
        ({"order": ["north", "south", "west", "est"]}, "Allowed: every site once"),
        ({"rule": "adam"}, "[aggregation] name = 'adam' is not allowed with cyclic: nothing is aggregated."),
        ({"more": {"collect": {"name": "judged"}}}, "[collect] name = 'judged' is not allowed with cyclic"),
        ({"update": "ditto"}, "[local_update] name = 'ditto' is not allowed with cyclic"),
        ({"update": "scaffold"}, "[local_update] name = 'scaffold' is not allowed with protocol 'cyclic'"),
        ({"more": {"validation": {"select": "best", "every": 1}}}, "select = 'best' is not allowed with cyclic"),
        ({"more": {"sharing": {"keep": ["norms"]}}}, "[sharing] keep = ['norms'] is not allowed with cyclic"),
        ({"more": {"plan": {"fingerprint": "site"}}}, "[plan] fingerprint = 'site' is not allowed with cyclic"),
        ({"participation": 0.5}, "[protocol] participation = 0.5 is not known. Known: compare,"),
    ],
)
def test_what_a_study_of_cyclic_may_not_ask(given: dict[str, Any], expected: str) -> None:
    assert expected in errors(name="cyclic", **given)


def test_what_a_study_of_cyclic_may_ask() -> None:
    assert (
        errors(name="cyclic")
        == errors("proximal", name="cyclic", order=["west", "east", "south", "north"], reveal=True)
        == ""
    )


def test_krum_counts_the_sites_of_a_round() -> None:
    assert errors(rule="krum") == ""
    assert "with 3 sites in a round" not in errors(rule="krum", participation=0.75)


@pytest.mark.parametrize(
    ("protocol", "least"),
    [({"cohorts": [["north"], ["south", "west", "east"]]}, 1), ({"cohorts": TURNS}, 2), ({"participation": 0.1}, 2)],
)
def test_the_smallest_round_sets_how_many_must_answer(protocol: dict[str, Any], least: int) -> None:
    raw = {
        "study": {"name": "x"},
        "sites": {name: {"data": name} for name in ("north", "south", "west", "east")},
        "protocol": {"rounds": 1, "steps": 1} | protocol,
    }
    assert parse_study(raw, folder=Path("/"), check_data=False).protocol.min_sites == least
