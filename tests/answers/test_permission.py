"""What a site's own settings forbid: refused with the rule that forbids it, before anything is done."""

from __future__ import annotations

from dataclasses import replace

import pytest

from concilium.answers import Policy
from concilium.answers.permission import check_policy
from concilium.errors import PrivacyError
from concilium.messages import Fetch, Request, Train

TRAIN = Train("federated", 1, 0, 5, 10, {}, True)


@pytest.mark.parametrize(
    ("policy", "request_", "says"),
    [
        pytest.param("shown", replace(TRAIN, shown=True), "sent this site's update of federated as it is", id="shown"),
        pytest.param("open_weights", TRAIN, "asks for weights in the open", id="open_weights"),
        pytest.param("kept", Fetch("federated"), "that stay here were asked for", id="kept"),
    ],
)
def test_what_the_settings_do_not_allow_is_refused_by_its_rule(policy: str, request_: Request, says: str) -> None:
    check_policy(request_, Policy())
    with pytest.raises(PrivacyError, match=says) as refused:
        check_policy(request_, replace(Policy(), **{policy: False}))
    assert refused.value.rule == policy


def test_an_update_that_nobody_else_sees_needs_no_leave() -> None:
    check_policy(TRAIN, Policy(shown=False, kept=False))
