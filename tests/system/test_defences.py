"""Defences through the whole line: in training and in prediction, stopped and gone on, beside baselines that have none."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from sessions import at_site, lines, same, weights
from typer.testing import CliRunner

from concilium.cli import app
from concilium.data.draws import drawn_from
from concilium.errors import StudyError
from concilium.finished import open_finished
from concilium.line import Event, Outcome, run
from concilium.study import Study, parse_study, read_study, to_toml

pytestmark = pytest.mark.slow

Make = Callable[..., Study]
BOTH = [{"name": "project", "channels": 1}, {"name": "gaussian", "scale": 0.7}]


def defended(make: Make, defences: list[dict[str, Any]], **changes: Any) -> Study:
    """The study with these defences, as its file would be read."""
    study = make(**changes)
    raw = json.loads(json.dumps(_plain(study)))
    return parse_study(raw | {"defences": defences}, folder=Path("/"))


def _plain(study: Study) -> dict[str, Any]:
    return tomllib.loads(to_toml(study))


@pytest.fixture(scope="module")
def study(make: Make) -> Study:
    return defended(make, BOTH, protocol__compare=["local"], test=True, protocol__rounds=2, sites=("north", "south"))


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(study, tmp_path_factory.mktemp("defended") / "run")


def is_of_test(case: dict[str, Any]) -> bool:
    return (case["model"], case["subset"]) == ("splitfed", "test")


def scores(outcome: Outcome, model: str) -> list[tuple[Any, ...]]:
    """What was measured, without where it lies."""
    return [
        (c["model"], c["site"], c["case"], c["label"], c["dice"])
        for c in outcome.results["cases"]
        if c["model"] == model
    ]


def test_the_model_has_its_defences_and_the_baselines_none(finished: Outcome) -> None:
    assert (finished.exit_code, finished.results["problems"]) == (0, [])
    shared = weights(finished.folder)
    own = {n for n in shared if n.startswith(("defence", "restore"))}
    assert own >= {"defence0.maps.0.weight", "restore0.maps.0.weight"}
    alone = at_site(finished.folder, "north", "local")
    assert set(shared) - own == set(alone)
    split, local = finished.results["models"][0], finished.results["models"][1]
    assert split["parameters"] == sum(t.numel() for t in shared.values())
    assert local["parameters"] == sum(t.numel() for t in alone.values())
    assert same(shared, at_site(finished.folder, "test"))
    assert open_finished(finished.folder).networks()[0].names[1] == "defence0"
    assert "defence0" not in open_finished(finished.folder, "local:north").networks()[0].names


def test_projection_trains_at_both_ends(finished: Outcome) -> None:
    with drawn_from(3, "weights"):
        start = open_finished(finished.folder)._network().state_dict()
    end = weights(finished.folder)
    assert not torch.equal(start["down0.convolution.weight"], end["down0.convolution.weight"])
    for name in ("defence0.maps.0.weight", "restore0.maps.0.weight"):
        assert not torch.equal(start[name], end[name])


def test_predict_segments_as_the_sites_did_twice_alike(finished: Outcome, phantom: Path, tmp_path: Path) -> None:
    """The command finds the defences in the run folder, draws their noise from each case's name, and so gives the same twice."""
    for out in (tmp_path / "a", tmp_path / "b"):
        command = ["predict", str(finished.folder), "-i", str(phantom / "test" / "imagesTr"), "-o", str(out)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    found = sorted((tmp_path / "a").glob("*.nii.gz"))
    assert len(found) == 3
    for path in found:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    done = CliRunner().invoke(app, ["evaluate", "-p", str(tmp_path / "a"), "-r", str(phantom / "test" / "labelsTr")])
    (organ,) = {c["label"] for c in finished.results["cases"]} - {"lesion"}
    own = [c["dice"] for c in finished.results["cases"] if is_of_test(c) and c["label"] == organ]
    assert f"{organ} │ {fmean(own):.3f}" in done.output, "scored by the sites as it is predicted"


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(study: Study, finished: Outcome, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if (event.kind, event.model, event.round) == ("round", "splitfed", 1):
            raise Stopped

    with pytest.raises(Stopped):
        run(study, tmp_path / "run", watch=stop)
    again = run(study, tmp_path / "run", resume=True)
    assert same(weights(finished.folder), weights(again.folder))
    assert scores(again, "splitfed") == scores(finished, "splitfed") != []
    assert [x["sites"]["north"]["loss"] for x in lines(again.folder)] == [
        x["sites"]["north"]["loss"] for x in lines(finished.folder)
    ]


def test_noise_is_there_when_cases_are_scored(make: Make, finished: Outcome, tmp_path: Path) -> None:
    """The same weights segment otherwise without it: a defence that is off in prediction would not be seen in scores."""
    network = open_finished(finished.folder).networks()[0]
    image = torch.randn(1, 1, 16, 16, 8, generator=torch.Generator().manual_seed(0))
    first, second = network(image)[0], network(image)[0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("format", ["nnunet", "onnx", "monai"])
def test_other_programs_get_no_model_with_defences(finished: Outcome, format: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(finished.folder), "-o", str(tmp_path / "x"), "--format", format])
    assert isinstance(done.exception, StudyError)
    assert "gaussian (scale = 0.7, bound = 3.0)" in str(done.exception)


def test_weights_go_out_with_the_study_that_names_the_defences(finished: Outcome, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["export", str(finished.folder), "-o", str(tmp_path / "x"), "--format", "safetensors"]
    )
    assert done.exit_code == 0, done.output
    written = tomllib.loads((tmp_path / "x" / "study.toml").read_text())
    assert [d["name"] for d in written["defences"]] == ["project", "gaussian"]


# --------------------------------------------------------------------------------------------------------- the study file


def test_a_study_with_defences_is_written_as_it_is_read(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(to_toml(study))
    again = read_study(path)
    assert again == study
    assert [d.name for d in again.defences] == ["project", "gaussian"]
    assert again.defences[1].options == {"scale": 0.7, "bound": 3.0}


def test_a_variant_has_its_own_defences_or_none(make: Make, tmp_path: Path) -> None:
    raw = _plain(make()) | {"defences": BOTH}
    raw["variants"] = {
        "none": {"defences": []},
        "other": {"defences": [{"name": "dropout"}]},
        "same": {"training": {"learning_rate": 0.1}},
        "together": {"protocol": {"name": "federated"}, "defences": []},
    }
    study = parse_study(raw, folder=tmp_path)
    assert [len(study.variants[name].defences) for name in ("none", "other", "same", "together")] == [0, 1, 2, 0]
    path = tmp_path / "study.toml"
    path.write_text(to_toml(study))
    assert read_study(path) == study


@pytest.mark.parametrize(
    ("defences", "changes", "said"),
    [
        ([{"name": "gausian"}], {}, "Did you mean 'gaussian'"),
        ([{"name": "gaussian", "scale": -1.0}], {}, "[[defences]] scale = -1.0 is not allowed. Allowed: 0 or more."),
        ([{"name": "gaussian", "scael": 1.0}], {}, "Did you mean 'scale'"),
        ([{}], {}, "[[defences]] name = None is not allowed"),
        ({"name": "gaussian"}, {}, "Expected tables [[defences]]"),
        ([{"name": "gaussian"}], {"protocol__name": "federated"}, "no network is split"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    make: Make, defences: Any, changes: dict[str, Any], said: str
) -> None:
    if changes:
        changes = changes | {"protocol__cut": None}
    with pytest.raises(StudyError) as refused:
        defended(make, defences, **changes)
    assert said in str(refused.value)
