"""Sites that are late or lost in the middle of a round of split training: the others go on, and they are back for the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import METHODS, SITES, VARIANTS, Killed, Mortal, Watched, lines, several, spoil, told

from concilium.engines import simulation
from concilium.engines.simulation import Simulation
from concilium.line import Event, run
from concilium.messages import Reply
from concilium.protocols import Round
from concilium.study import Study

Make = Callable[..., Study]


@several(
    ("v1", "tail"), ("v2", "front"), ("v3", "finish"), ("sequential", "tail"),
    names=("variant", "method"), of=(VARIANTS, METHODS),
)  # fmt: skip
def test_a_site_that_takes_too_long_over_an_exchange_is_left_out_of_the_round(
    variant: str, method: str, make: Make, watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleeps(reply: Reply) -> Reply:
        time.sleep(2.1)
        return reply

    spoil(monkeypatch, method, sleeps)
    study = make(protocol__variant=variant, protocol__exchange_seconds=2.0)
    outcome = run(study, tmp_path / "run", watch=watched.nothing_is_left)
    told(outcome, code="no reply within 2 s")
    at_rest = watched.optimizers["south", 1, "after"]
    assert all(torch.equal(watched.optimizers["south", 3, "before"][n], t) for n, t in at_rest.items())


@pytest.mark.parametrize("variant", ["v1", *(pytest.param(v, marks=pytest.mark.exhaustive) for v in VARIANTS[1:])])
def test_a_site_that_takes_longer_than_a_round_may_is_left_out_of_it(
    variant: str, make: Make, watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "tail", lambda reply: time.sleep(3.0) or reply, step=0)
    outcome = run(make(protocol__variant=variant, protocol__round_seconds=2.5), tmp_path / "run")
    told(outcome, code="no reply within")


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Worker processes that are in truth this one."""
    monkeypatch.setattr(simulation, "SpawnedWorker", Mortal)
    monkeypatch.setattr(Simulation, "_sleep", lambda self: None)
    return iter(())


def dies(_: Any) -> Any:
    raise Killed


@several(
    ("v1", ("tail", 1)), ("v1", ("front", 0)), ("v2", ("front", 1)), ("v2", ("tail", 0)), ("v3", ("finish", 1)),
    ("sequential", ("tail", 0)),
    names=("variant", "at"), of=(VARIANTS, [("front", 0), ("front", 1), ("tail", 0), ("tail", 1), ("finish", 1)]),
)  # fmt: skip
@pytest.mark.usefixtures("mortal")
def test_a_site_that_is_lost_within_a_round_is_back_for_the_next(
    variant: str, at: tuple[str, int], make: Make, without_south: list[Round], watched: Watched, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    method, step = at
    spoil(monkeypatch, method, dies, step=step)
    study = make(protocol__variant=variant, engine__workers=3)
    told(run(study, tmp_path / "run", watch=watched.nothing_is_left), code="lost")
    at_rest = watched.optimizers["south", 1, "after"]
    assert all(torch.equal(watched.optimizers["south", 3, "before"][n], t) for n, t in at_rest.items())
    if variant == "v1":
        for ours, theirs in zip(watched.rounds, without_south, strict=True):
            assert all(torch.equal(ours.tensors[n], t) for n, t in theirs.tensors.items())


@several(
    ("v1", "tail"), ("v2", "front"), ("v2", "finish"), names=("variant", "method"), of=(("v1", "v2"), METHODS)
)  # fmt: skip
@pytest.mark.usefixtures("mortal")
def test_sites_that_share_a_lost_worker_are_lost_together(
    variant: str, method: str, make: Make, watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """North and west have one worker: whichever of the two is at work, the other's session is gone too."""
    spoil(monkeypatch, method, dies, site="west")
    study = make(protocol__variant=variant, engine__workers=2, protocol__min_sites=1)
    outcome = run(study, tmp_path / "run", watch=watched.nothing_is_left)
    assert outcome.exit_code == 4
    first, second, third = lines(tmp_path / "run")
    assert (set(first["sites"]), set(third["sites"])) == (SITES, SITES)
    failed = set(second["failures"])
    assert "west" in failed <= {"north", "west"}
    # an update that had arrived counts, though its site lost the state that belongs to it
    assert SITES - failed <= set(second["sites"]) <= SITES - {"west"}
    assert {f["type"] for f in second["failures"].values()} == {"SiteLost"}
    for site in failed:
        at_rest = watched.optimizers[site, 1, "after"]
        assert all(torch.equal(watched.optimizers[site, 3, "before"][n], t) for n, t in at_rest.items())


@pytest.mark.slow
@pytest.mark.parametrize(("how", "variant", "code"), [("dies", "v2", "lost"), ("sleeps", "v1", "no reply within 6 s")])
def test_processes_that_die_or_hang(how: str, variant: str, code: str, make: Make, tmp_path: Path) -> None:
    fuse = tmp_path / "fuse"

    def light(event: Event) -> None:
        if (event.kind, event.round) == ("round", 1):
            fuse.touch()

    fault = {"loss__name": "faults:troubled", "loss__fuse": str(fuse), "loss__how": how, "loss__seconds": 9.0}
    study = make(protocol__variant=variant, engine__workers=3, protocol__exchange_seconds=6.0, **fault)
    outcome = run(study, tmp_path / "run", watch=light)
    (failed,) = lines(tmp_path / "run")[1]["failures"]
    told(outcome, failed=failed, code=code)
