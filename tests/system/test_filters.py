"""Filters through the whole line: what the server gets is filtered, and the results say at which level that is."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import same, weights

from concilium import wire
from concilium.errors import StudyError
from concilium.line import Event, run
from concilium.messages import Front, Train, Trained
from concilium.study import Study, parse_study, to_toml

pytestmark = pytest.mark.slow

Make = Callable[..., Study]
NORM = 0.01


def filtered(make: Make, filters: list[dict[str, Any]], **changes: Any) -> Study:
    changes = {"protocol__rounds": 2, "sites": ("north", "south")} | changes
    if changes.get("protocol__name", "splitfed") != "splitfed":
        changes |= {"protocol__cut": None}
    return parse_study(tomllib.loads(to_toml(make(**changes))) | {"filters": filters}, folder=Path("/"))


@pytest.mark.parametrize("protocol", ["federated", "splitfed"])
def test_what_leaves_is_as_long_as_it_may_be_and_the_results_say_at_which_level(
    make: Make, protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on the wire: every update of the study's own model, against the weights that the round was begun with."""
    sent: list[Any] = []
    pack = wire.pack
    monkeypatch.setattr(wire, "pack", lambda message: (sent.append(message), pack(message))[1])
    study = filtered(make, [{"name": "clip", "norm": NORM}], protocol__name=protocol, protocol__compare=["local"])
    done = run(study, tmp_path / "run")
    assert done.exit_code == 0
    assert any("at the level of a site" in w and "no guarantee for a patient" in w for w in done.results["warnings"])
    begun: list[dict[str, torch.Tensor]] = []
    lengths = []
    for message in sent:
        if isinstance(message, Train | Front) and message.weights and message.model == protocol:
            begun.append(dict(message.weights))
        if isinstance(message, Trained) and message.weights:
            change = [message.weights[n].double() - begun[-1][n].double() for n in message.weights]
            lengths.append(float(torch.stack([c.square().sum() for c in change]).sum().sqrt()))
    assert len(lengths) == 4
    assert lengths == pytest.approx([NORM] * 4, rel=1e-3)


def test_a_run_with_noise_that_was_stopped_goes_on_to_the_same_bits(make: Make, tmp_path: Path) -> None:
    noise = [{"name": "clip", "norm": NORM}, {"name": "gaussian", "deviation": 1e-3}]
    study = filtered(make, noise, protocol__name="federated")

    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if (event.kind, event.round) == ("round", 1):
            raise Stopped

    run(study, tmp_path / "a")
    with pytest.raises(Stopped):
        run(study, tmp_path / "b", watch=stop)
    run(study, tmp_path / "b", resume=True)
    assert same(weights(tmp_path / "a", "federated"), weights(tmp_path / "b", "federated"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol__name": "local"}, "in which updates leave no site"),
        ({"protocol__name": "cyclic"}, "in which updates leave no site"),
        ({"protocol__name": "federated", "local_update__name": "scaffold"}, "which sends tensors beside the weights"),
        (
            {"protocol__name": "federated", "sharing__keep": ["norms"], "sharing__unseen": "mean"},
            "what stays would leave once, unfiltered",
        ),
    ],
)
def test_where_something_would_leave_beside_them_filters_are_refused(make: Make, changes: Any, said: str) -> None:
    with pytest.raises(StudyError) as refused:
        filtered(make, [{"name": "clip"}], **changes)
    assert said in str(refused.value)
