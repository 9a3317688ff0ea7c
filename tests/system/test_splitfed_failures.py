"""What goes wrong in the middle of a round of split training: the others go on, everything says so, nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import SECRET
from safetensors.torch import load_file
from sessions import SITES, VARIANTS, Answer, Watched, fails, lines, spoil, told
from torch import Tensor

from concilium.answers import split
from concilium.errors import EngineError
from concilium.line import Event, run
from concilium.messages import Gradients, Maps
from concilium.protocols import Round
from concilium.study import Study

Make = Callable[..., Study]


def some_variants(*chosen: str) -> pytest.MarkDecorator:
    """These; the others with `./test --all`."""
    every = [v if v in chosen else pytest.param(v, marks=pytest.mark.exhaustive) for v in VARIANTS]
    return pytest.mark.parametrize("variant", every)


def maps(change: Callable[[list[Tensor]], Sequence[Tensor]]) -> Answer:
    return lambda reply: Maps(tuple(t.contiguous() for t in change([m.clone() for m in reply.maps])))


def gradients(change: Callable[[list[Tensor]], Sequence[Tensor]]) -> Answer:
    return lambda reply: Gradients(tuple(t.contiguous() for t in change([m.clone() for m in reply.gradients])))


def weights(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Answer:
    return lambda reply: replace(reply, weights=change({n: t.clone() for n, t in reply.weights.items()}))


def ruined(t: Tensor) -> Tensor:
    """With one number that is none."""
    t.view(-1)[-1] = float("nan")
    return t


FAULTS = [
    pytest.param("front", fails, "failed", id="front-raises"),
    pytest.param("tail", fails, "failed", id="tail-raises"),
    pytest.param("finish", fails, "failed", id="finish-raises"),
    pytest.param("front", maps(lambda ms: [ruined(m) for m in ms]), "wrong_maps", id="maps-nan"),
    pytest.param("front", maps(lambda ms: [m[:, 1:] for m in ms]), "wrong_maps", id="maps-channels"),
    pytest.param("front", maps(lambda ms: [m[0, 0] for m in ms]), "wrong_maps", id="maps-axes"),
    pytest.param("front", maps(lambda ms: [m[..., :1, :1, :1] for m in ms]), "wrong_maps", id="maps-voxel"),
    pytest.param("front", maps(lambda ms: [m.int() for m in ms]), "wrong_maps", id="maps-integers"),
    pytest.param("front", maps(lambda ms: [m.double() for m in ms]), "wrong_maps", id="maps-double"),
    pytest.param("front", maps(lambda ms: ms[1:]), "contract", id="maps-none"),  # as if nothing were annotated, which is
    pytest.param("front", maps(lambda ms: [*ms, ms[0].clone()]), "wrong_maps", id="maps-too-many"),
    pytest.param("tail", gradients(lambda gs: gs[1:]), "wrong_gradients", id="gradients-too-few"),
    pytest.param("tail", gradients(lambda gs: [*gs, gs[0].clone()]), "wrong_gradients", id="gradients-too-many"),
    pytest.param("tail", gradients(lambda gs: [ruined(g) for g in gs]), "wrong_gradients", id="gradients-nan"),
    pytest.param("tail", gradients(lambda gs: [g[:, 1:] for g in gs]), "wrong_gradients", id="gradients-shape"),
    pytest.param("tail", gradients(lambda gs: [g.double() for g in gs]), "wrong_gradients", id="gradients-double"),
    pytest.param("tail", gradients(lambda gs: [g * 3e38 for g in gs]), "not_finite", id="gradients-huge"),
    pytest.param("finish", weights(lambda ws: {n: ruined(w) for n, w in ws.items()}), "not_finite", id="update-nan"),
    pytest.param("finish", weights(lambda ws: dict(list(ws.items())[1:])), "wrong_tensors", id="update-too-small"),
]  # fmt: skip


FEW = {"v3": {"tail-raises", "maps-nan"}, "sequential": {"front-raises", "finish-raises"}}
"""For the variants in which the same code answers: enough to see who is left out of what."""


def tried(variant: str, number: int, fault: Any) -> Any:
    """Each way to raise in `v1` and in `v2`, each other fault in one of them; all with `./test --all`."""
    here = fault.id in FEW[variant] if variant in FEW else number < 3 or number % 2 == ("v1", "v2").index(variant)
    marks = () if here else (pytest.mark.exhaustive,)
    if here and variant == "v2" and number >= 3:
        marks = (pytest.mark.slow,)
    return pytest.param(variant, *fault.values, id=f"{fault.id}-{variant}", marks=marks)


@pytest.mark.parametrize(
    ("variant", "method", "wrong", "code"),
    [tried(variant, number, fault) for variant in VARIANTS for number, fault in enumerate(FAULTS)],
)
def test_a_site_that_fails_within_a_round_is_left_out_of_it(
    variant: str, method: str, wrong: Answer, code: str, make: Make, without_south: list[Round], watched: Watched,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spoil(monkeypatch, method, wrong)
    outcome = run(make(protocol__variant=variant), tmp_path / "run", watch=watched.nothing_is_left)
    told(outcome, code=code)
    assert SECRET.encode() not in b"".join(watched.sent)
    # in the third round the south is where it was after the first
    at_rest = watched.optimizers["south", 1, "after"]
    again = watched.optimizers["south", 3, "before"]
    assert len(at_rest) > 2
    assert all(torch.equal(again[n], t) for n, t in at_rest.items())
    assert not all(torch.equal(watched.optimizers["north", 3, "before"][n], t) for n, t in at_rest.items())
    # the weights are those of the others, and go on to be so
    assert all(torch.isfinite(t).all() for done in watched.rounds for t in done.tensors.values())
    weights_of = last_update if variant == "sequential" else mean_of_updates
    weights_of(watched, 2, {"north", "west"})
    weights_of(watched, 3, SITES)
    if variant == "v1":  # each body is its site's own: whatever became of the south's does not matter
        for ours, theirs in zip(watched.rounds, without_south, strict=True):
            assert ours.tensors.keys() == theirs.tensors.keys()
            assert all(torch.equal(ours.tensors[n], t) for n, t in theirs.tensors.items())


def mean_of_updates(watched: Watched, number: int, sites: set[str]) -> None:
    """Front and tail are the mean, weighted by cases, of what these sites sent."""
    updates = [watched.updates[site, number] for site in sites]
    for name in updates[0].weights:
        mean = sum(u.weights[name].double() * u.n_cases for u in updates) / sum(u.n_cases for u in updates)
        shared = watched.rounds[number - 1].tensors[f"weights/{name}"]
        assert torch.allclose(shared, mean.to(shared.dtype), rtol=0, atol=1e-7)  # type: ignore[union-attr]


def last_update(watched: Watched, number: int, sites: set[str]) -> None:
    """Front and tail are what the last of these sites made of what the one before it sent."""
    made = [watched.updates[site, number].weights for site in sites]
    shared = watched.rounds[number - 1].tensors
    assert sum(all(torch.equal(shared[f"weights/{n}"], t) for n, t in ours.items()) for ours in made) == 1


@some_variants("v1", "sequential")
def test_a_loss_that_is_no_number_is_the_sites_failure(
    variant: str, make: Make, watched: Watched, tmp_path: Path
) -> None:
    """And its own fault plug-in is imported there by name, as in a process of its own."""
    fuse = tmp_path / "fuse"

    def light(event: Event) -> None:
        watched.nothing_is_left(event)
        if (event.kind, event.round) == ("round", 1):
            fuse.touch()

    study = make(protocol__variant=variant, loss__name="faults:troubled", loss__fuse=str(fuse), loss__how="nan")
    outcome = run(study, tmp_path / "run", watch=light)
    (failed,) = lines(tmp_path / "run")[1]["failures"]
    told(outcome, failed=failed, code="not_finite")


def test_a_body_that_is_no_longer_finite_is_not_kept(
    make: Make, watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In v2 the last site's last step may ruin what all the others have done; then there is no round to keep."""
    from concilium.protocols import _body

    calls = iter(range(1000))
    step = _body.clip_and_step

    def ruins(parameters: Any, optimizer: Any, clip_norm: float) -> None:
        step(parameters, optimizer, clip_norm)
        if next(calls) == 11:  # the last of the second round: three sites, two steps
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(_body, "clip_and_step", ruins)
    with pytest.raises(EngineError, match="finite"):
        run(make(protocol__variant="v2"), tmp_path / "run")
    assert len(watched.rounds) == 1


@pytest.mark.slow
def test_nothing_of_a_failed_round_leaks_into_the_next_model(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the last round, with a session open at the site; then the local models are trained."""
    run(make(protocol__name="local", protocol__cut=None), tmp_path / "local")
    for method, wrong in (("front", maps(lambda ms: ms[1:])), ("tail", gradients(lambda gs: gs[1:]))):
        with monkeypatch.context() as patch:
            spoil(patch, method, wrong, number=3)
            run(make(protocol__compare=["local"]), tmp_path / method)
        assert set(lines(tmp_path / method)[2]["failures"]) == {"south"}
        for site in SITES:
            a, b = (load_file(tmp_path / f / "sites" / site / "models/local.safetensors") for f in (method, "local"))
            assert all(torch.equal(a[n], t) for n, t in b.items())


@some_variants("v2", "v3")
def test_too_few_sites_stop_the_run_which_can_go_on(
    variant: str, make: Make, watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(protocol__variant=variant, protocol__min_sites=3)
    run(study, tmp_path / "whole")
    with monkeypatch.context() as patch:
        spoil(patch, "tail", fails)
        with pytest.raises(EngineError, match=r"splitfed, round 2: 2 of 3 sites answered \(south: failed.*--resume"):
            run(study, tmp_path / "run")
    assert watched.engines[-1]._pending == {}
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["complete"], results["models"]) == (False, [])
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    own = "sites/north/models" if variant == "v3" else "weights"
    a, b = (load_file(tmp_path / name / own / "splitfed.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(a[n], t) for n, t in b.items())


def test_the_faults_are_where_they_are_said_to_be() -> None:
    """Else a fault that never strikes would pass for one that is borne."""
    assert {f.values[0] for f in FAULTS} == {"front", "tail", "finish"} <= set(dir(split.Session))
