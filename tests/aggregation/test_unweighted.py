"""Every site counts the same."""

from __future__ import annotations

from drawn import by_hand, network, same, total_of, updates_of

from concilium.aggregation.unweighted import rule


def test_numbers_of_cases_do_not_count() -> None:
    """(1 + 2 + 6) / 3 = 3, though the last site has 97 of 100 cases."""
    total = total_of(by_hand([1.0], [2.0], [6.0], n_cases=(1, 2, 97)), "unweighted")
    weights, state = rule(total, {}, before={})
    assert weights["x"].tolist() == [3.0]
    assert state == {}


def test_a_site_that_did_part_of_its_steps_counts_in_part() -> None:
    """(1 + 0.25 * 6) / 1.25 = 2."""
    total = total_of(by_hand([1.0], [6.0], n_cases=(1, 97), share=(1.0, 0.25)), "unweighted")
    assert rule(total, {}, before={})[0]["x"].tolist() == [2.0]


def test_sites_with_equally_many_cases_have_the_mean() -> None:
    updates = updates_of([network(seed) for seed in range(3)], n_cases=(5, 5, 5))
    assert same(rule(total_of(updates, "unweighted"), {}, before={})[0], total_of(updates).mean())
