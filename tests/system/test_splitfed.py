"""Split training through the whole line: its end, its baselines and processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file
from sessions import at_site, lines, same, weights
from typer.testing import CliRunner

import concilium
from concilium.answers.split import Session
from concilium.cli import app
from concilium.data.plan import open_plan
from concilium.line import Event, Outcome, run
from concilium.networks import cut_apart, make_network
from concilium.protocols._body import Body
from concilium.study import Study, read_study, to_toml

Make = Callable[..., Study]
SITES = ("north", "south", "west")


# ------------------------------------------------------------------------------------------------------------- its end


WHOLE = [
    ("nnunet", "v1"),
    ("unet", "v2"),
    *(pytest.param(one, marks=pytest.mark.exhaustive) for one in (("nnunet", "v2"), ("unet", "v1"))),
]


@pytest.fixture(scope="module", params=WHOLE, ids="-".join)
def whole(request: pytest.FixtureRequest, small_study: Make, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Each network in each variant, with the local baseline."""
    network, variant = request.param
    study = small_study(
        protocol__name="splitfed", protocol__variant=variant, protocol__compare=["local"], network__name=network
    )
    return run(study, tmp_path_factory.mktemp("split") / "run")


def test_it_ends_as_asked_and_everything_is_there(whole: Outcome, phantom: Path, tmp_path: Path) -> None:
    results = json.loads((whole.folder / "results.json").read_text())
    schema = json.loads((Path(concilium.__file__).parent / "results.schema.json").read_text())
    Draft202012Validator(schema).validate(results)
    assert (whole.exit_code, results["complete"], results["problems"]) == (0, True, [])
    assert [m["name"] for m in results["models"]] == ["splitfed", "local"]
    for model in results["models"]:
        assert (model["updates"], model["patches"]) == (4, 24)
        assert set(model["sites"]) == set(SITES)
    scored = {(c["model"], c["site"], c["case"]) for c in results["cases"]}
    for site in SITES:
        split, local = ({c for m, s, c in scored if (m, s) == (n, site)} for n in ("splitfed", f"local:{site}"))
        assert split == local != set()
    assert {s for m, s, _ in scored if m == "splitfed"} == {*SITES, "test"}
    # a whole network, the same everywhere
    shared = weights(whole.folder)
    assert sum(t.numel() for t in shared.values()) == results["models"][0]["parameters"]
    for site in (*SITES, "test"):
        assert same(shared, at_site(whole.folder, site))
    # what was learnt at the sites and at the server alike
    first = lines(whole.folder)[0]["sites"]
    assert all(math.isfinite(site["loss"]) and site["n_steps"] == 2 for site in first.values())
    # the run folder alone is enough to predict
    command = ["predict", str(whole.folder), "-i", str(phantom / "test" / "imagesTr"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "out").iterdir())) == 3
    # the study that was written is the one that was read
    study = read_study(whole.folder / "study.toml")
    assert to_toml(study) == (whole.folder / "study.toml").read_text()
    assert study.protocol.options["variant"] in ("v1", "v2")


def test_every_part_of_the_network_learns(whole: Outcome) -> None:
    study = read_study(whole.folder / "study.toml")
    plan = open_plan((whole.folder / "plans.json").read_text(), study.plan.configuration).architecture
    network = make_network(study.network, n_channels=1, n_labels=3, plan=plan, deep_supervision=True)
    parts = cut_apart(network, ("deep",))
    last = load_file(next((whole.folder / "checkpoints" / "splitfed").glob("*.safetensors")))
    trained = {n for n in last if n.startswith("weights/")}
    assert {n.removeprefix("weights/") for n in trained} == set(network.state_dict())
    owners = {name.split("/")[1] for name in last if name.startswith("body/")}
    assert owners == ({"server"} if study.protocol.options["variant"] == "v2" else set(SITES))
    n_moments = {o: sum(n.startswith(f"body/{o}/") and n.endswith("exp_avg") for n in last) for o in owners}
    assert set(n_moments.values()) == {sum(1 for _ in parts.body.parameters())}


@pytest.mark.parametrize("variant", [pytest.param("v1", marks=pytest.mark.exhaustive), "v2"])
@pytest.mark.slow
def test_worker_processes_do_not_change_a_bit(variant: str, split_study: Make, tmp_path: Path) -> None:
    for name, n in (("one", 1), ("two", 2)):
        study = split_study(protocol__variant=variant, protocol__steps=3, engine__workers=n)
        assert run(study, tmp_path / name).exit_code == 0
    assert same(weights(tmp_path / "two"), weights(tmp_path / "one"))


@pytest.mark.exhaustive
def test_loader_workers_do_not_change_a_bit(split_study: Make, tmp_path: Path) -> None:
    for name, n in (("none", 0), ("two", 2)):
        run(split_study(protocol__rounds=1, training__loader_workers=n, sites=("north", "west")), tmp_path / name)
    assert same(weights(tmp_path / "two"), weights(tmp_path / "none"))


@pytest.fixture(scope="module")
def dropping(split_study: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """A study with dropout in every part, and its run."""
    study = split_study(
        network__name="faults:dropping",
        network__base_features=None,
        protocol__cut=["down0", "middle"],
        protocol__rounds=1,
    )
    return study, run(study, tmp_path_factory.mktemp("dropping") / "run").folder


@pytest.mark.parametrize("part", ["front", "tail", "forward"])
def test_dropout_draws_from_the_step_not_from_where_a_process_is(
    part: str, dropping: tuple[Study, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process, or with other sites beside it in this one, the generators are elsewhere."""
    study, one = dropping
    owner: Any = Body if part == "forward" else Session
    original = getattr(owner, part)

    def elsewhere(*args: Any) -> Any:
        torch.rand(7)
        return original(*args)

    monkeypatch.setattr(owner, part, elsewhere)
    run(study, tmp_path / "other")
    assert same(weights(tmp_path / "other"), weights(one))


def test_a_map_behind_layers_that_do_not_train_may_travel(split_study: Make, tmp_path: Path) -> None:
    study = split_study(
        network__name="faults:frozen",
        network__base_features=None,
        protocol__cut=["down0", "middle"],
        protocol__rounds=1,
    )
    assert run(study, tmp_path / "run").exit_code == 0


def test_one_site_alone_has_one_body_which_trains_as_the_whole_network_does(split_study: Make, tmp_path: Path) -> None:
    changes = {"sites": ("north",), "protocol__rounds": 3, "training__optimizer": "sgd", "training__clip_norm": 1e6}
    for variant in ("v1", "v2"):
        run(split_study(**changes, protocol__variant=variant, protocol__compare=["local"]), tmp_path / variant)
    split, local = weights(tmp_path / "v1"), at_site(tmp_path / "v1", "north", "local")
    assert same(split, weights(tmp_path / "v2"))
    assert split.keys() == local.keys()
    for name in split:
        torch.testing.assert_close(split[name], local[name], rtol=1e-4, atol=1e-6)
    start = run(split_study(**changes | {"protocol__rounds": 1}), tmp_path / "one_round")
    far = weights(start.folder)
    assert not all(torch.allclose(far[n], local[n], rtol=1e-4, atol=1e-6) for n in far), "as close, whatever it learns"


def test_one_round_of_v1_is_the_weighted_mean_of_what_each_site_learns_alone(split_study: Make, tmp_path: Path) -> None:
    """Front, body and tail: the local models are those updates, from the same initial weights and batches."""
    study = split_study(
        protocol__rounds=1, protocol__compare=["local"], training__optimizer="sgd", training__clip_norm=1e6
    )
    run(study, tmp_path / "run")
    cases = {site: told["n_cases"] for site, told in lines(tmp_path / "run")[0]["sites"].items()}
    assert len(set(cases.values())) == 3  # else the weights would not matter
    alone = {site: at_site(tmp_path / "run", site, "local") for site in SITES}
    for name, shared in weights(tmp_path / "run").items():
        mean = sum(alone[s][name].double() * n for s, n in cases.items()) / sum(cases.values())
        torch.testing.assert_close(shared.double(), mean, rtol=1e-4, atol=1e-6)
        if name.endswith("convolution.weight"):  # a norm hardly moves in a round
            others = [t[name].double() for t in alone.values()]
            assert not any(torch.allclose(shared.double(), t, rtol=1e-4, atol=1e-6) for t in others)


def test_the_variants_differ_where_there_are_several_sites(split_study: Make, tmp_path: Path) -> None:
    for variant in ("v1", "v2"):
        run(split_study(protocol__variant=variant, protocol__rounds=1), tmp_path / variant)
    a, b = weights(tmp_path / "v1"), weights(tmp_path / "v2")
    assert not any(torch.equal(a[n], b[n]) for n in a if n.endswith("convolution.weight"))


# ----------------------------------------------------------------------------------------------------- what is watched


def test_rounds_are_told_as_they_end(split_study: Make, tmp_path: Path) -> None:
    events: list[Event] = []
    run(split_study(), tmp_path / "run", watch=events.append)
    rounds = [e for e in events if e.kind == "round"]
    assert [(e.model, e.round, e.rounds) for e in rounds] == [("splitfed", 1, 2), ("splitfed", 2, 2)]
    assert all(e.loss is not None and math.isfinite(e.loss) for e in rounds)
