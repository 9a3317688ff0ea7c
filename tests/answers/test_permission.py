"""What a site's own settings forbid: refused with the rule that forbids it, before anything is done."""

from __future__ import annotations

from dataclasses import replace

import pytest

from concilium.answers import Policy
from concilium.answers.permission import check_policy
from concilium.errors import PrivacyError
from concilium.messages import Align, Blind, Fetch, Hold, Holding, Look, Masking, Offer, Request, Train, Where

HOLDING = Holding(("T1",), False)
TRAIN = Train("federated", 1, 0, 5, 10, {}, True)


@pytest.mark.parametrize(
    ("policy", "request_", "says"),
    [
        pytest.param("shown", replace(TRAIN, shown=True), "sent this site's update of federated as it is", id="shown"),
        pytest.param("open_weights", TRAIN, "asks for weights in the open", id="open_weights"),
        pytest.param("new_patients", Look("federated", "new", 0, 0, 1), "asks for new patients", id="new_patients"),
        pytest.param("kept", Fetch("federated"), "that stay here were asked for", id="kept"),
        pytest.param("split", Offer(HOLDING), "Offer has to do with activations", id="offer"),
        pytest.param("split", Blind(()), "Blind has to do with activations", id="blind"),
        pytest.param("split", Align(HOLDING, (), ()), "Align has to do with activations", id="align"),
        pytest.param("split", Where("vertical", 1, 1), "Where has to do with activations", id="where"),
        pytest.param("labels", Where("vertical", 1, 1), "asks where patches lie that follow the labels", id="places"),
        pytest.param("split", Look("vertical", "validation", 0, 0, 1), "Look has to do with activations", id="look"),
    ],
)
def test_what_the_settings_do_not_allow_is_refused_by_its_rule(policy: str, request_: Request, says: str) -> None:
    check_policy(request_, Policy())
    with pytest.raises(PrivacyError, match=says) as refused:
        check_policy(request_, replace(Policy(), **{policy: False}))
    assert refused.value.rule == policy


def held(threshold: int) -> Hold:
    return Hold(replace(TRAIN, send_weights=False), Masking(threshold, 32, 16.0, "cases"))


def test_masked_updates_are_allowed_where_open_ones_are_not_in_sums_of_enough() -> None:
    closed = Policy(open_weights=False, least_summed=3)
    check_policy(held(3), closed)
    with pytest.raises(PrivacyError, match=r"in a sum of 2 sites\. This site's policy asks for 3 or more") as refused:
        check_policy(held(2), closed)
    assert refused.value.rule == "least_summed"
    check_policy(held(2), Policy())
    with pytest.raises(PrivacyError, match="in a sum of 1 sites"):
        check_policy(held(1), Policy())


def test_an_update_that_nobody_else_sees_needs_no_leave() -> None:
    check_policy(TRAIN, Policy(shown=False, kept=False))
