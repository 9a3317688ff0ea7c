"""Variants, seeds, folds, sites left out, and the choice of weights: trained in one run, each as it would be alone."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file
from sessions import Make, curves
from torch import Tensor, equal
from typer.testing import CliRunner

import concilium
from concilium.answers.evaluate import segment
from concilium.cli import app
from concilium.data.dataset import open_dataset, read_case
from concilium.data.preprocess import preprocess, restore
from concilium.data.windows import predict_logits
from concilium.errors import StudyError
from concilium.finished import finished_models, open_finished
from concilium.line import Event, Outcome, run
from concilium.messages import Evaluate
from concilium.site import Site
from concilium.study import Study, parse_study, read_study, to_toml

pytestmark = pytest.mark.slow

SITES = ("north", "south", "west")


@pytest.fixture
def make(small_study: Make) -> Callable[..., Study]:
    """As `small_study`, with variants: `make({"faster": {"training": {...}}}, protocol__rounds=3)`."""

    def build(variants: dict[str, Any] | None = None, **changes: Any) -> Study:
        base = small_study(**changes)
        raw = {**_plain(base), "variants": variants or {}}
        return parse_study(raw, folder=Path("/"))

    return build


def _plain(study: Study) -> dict[str, Any]:
    return tomllib.loads(to_toml(study))


def weights(folder: Path, key: str, site: str = "") -> dict[str, Tensor]:
    place = folder / "sites" / site / "models" if site else folder / "weights"
    return load_file(place / f"{key}.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(equal(a[n], b[n]) for n in a)


def valid(results: Any) -> None:
    schema = json.loads((Path(concilium.__file__).parent / "results.schema.json").read_text())
    Draft202012Validator(schema).validate(results)


def rows(outcome: Outcome, model: str, subset: str) -> list[Any]:
    return [c for c in outcome.results["cases"] if (c["model"], c["subset"]) == (model, subset)]


# ------------------------------------------------------------------------------------------------------ variants, seeds


def test_a_variant_is_the_study_with_its_tables(make: Make, tmp_path: Path) -> None:
    changes = {"training": {"learning_rate": 0.1}, "network": {"base_features": 8}, "protocol": {"steps": 3}}
    together = run(make({"other": changes}, protocol__compare=["local"]), tmp_path / "both")
    alone = make(training__learning_rate=0.1, network__base_features=8, protocol__steps=3)
    run(alone, tmp_path / "alone")
    run(make(), tmp_path / "base")
    assert together.exit_code == 0
    valid(together.results)
    assert [m["name"] for m in together.results["models"]] == ["federated", "local", "other"]
    assert same(weights(tmp_path / "both", "other"), weights(tmp_path / "alone", "federated"))
    assert same(weights(tmp_path / "both", "federated"), weights(tmp_path / "base", "federated"))
    opened = open_finished(tmp_path / "both", "other")
    assert opened.study.training.learning_rate == 0.1
    assert opened.plans == (tmp_path / "alone" / "plans.json").read_text()
    assert len(opened.networks()) == 1
    assert finished_models(tmp_path / "both") == ("federated", "other", "local:north", "local:south", "local:west")


def test_a_variant_may_be_another_protocol(make: Make, tmp_path: Path) -> None:
    split = {"protocol": {"name": "splitfed", "cut": "shallow"}, "network": {"name": "unet", "levels": 2}}
    outcome = run(make({"split": split}, protocol__rounds=1, test=False), tmp_path / "run")
    assert outcome.exit_code == 0
    protocols = {m["name"]: m["protocol"] for m in outcome.results["models"]}
    assert protocols == {"federated": "federated", "split": "splitfed"}
    assert open_finished(tmp_path / "run", "split").study.network.name == "unet"


def test_a_variant_that_cannot_be_had_stops_the_run_before_anything_trains(make: Make, tmp_path: Path) -> None:
    protocol = {"name": "splitfed", "cut": ["down0", "up9"]}
    study = make({"split": {"protocol": protocol, "network": {"name": "unet", "levels": 2}}}, test=False)
    with pytest.raises(StudyError, match="up9"):
        run(study, tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_seeds_are_the_studies_of_these_seeds(make: Make, tmp_path: Path) -> None:
    outcome = run(make(study__seeds=2, protocol__compare=["local"]), tmp_path / "both")
    run(make(study__seed=4, protocol__compare=["local"]), tmp_path / "second")
    assert outcome.exit_code == 0
    valid(outcome.results)
    assert [(m["name"], m["seed"]) for m in outcome.results["models"]] == [
        ("federated", 3), ("local", 3), ("federated", 4), ("local", 4)
    ]  # fmt: skip
    assert same(weights(tmp_path / "both", "federated.s4"), weights(tmp_path / "second", "federated"))
    assert same(weights(tmp_path / "both", "local.s4", "west"), weights(tmp_path / "second", "local", "west"))
    scored = {(c["seed"], c["case"]) for c in rows(outcome, "federated", "test")}
    assert {seed for seed, _ in scored} == {3, 4}
    assert len(scored) == 2 * len({case for _, case in scored})


def test_a_finished_run_goes_on_with_more_seeds(make: Make, tmp_path: Path) -> None:
    changes = {"other": {"training": {"learning_rate": 0.1}}}
    first, both = (make(changes, study__seeds=n, protocol__compare=["local"]) for n in (1, 2))
    run(first, tmp_path / "run")
    trained = (tmp_path / "run/rounds.jsonl").read_text()
    more = run(both, tmp_path / "run", resume=True)
    assert more.exit_code == 0
    assert (tmp_path / "run/rounds.jsonl").read_text().startswith(trained), "the first seed is not trained again"
    at_once = run(both, tmp_path / "at_once")
    for part in ("cases", "summary", "comparisons"):
        assert more.results[part] == at_once.results[part], part
    names = {p.name for p in (tmp_path / "run/weights").iterdir()}
    assert names == {p.name for p in (tmp_path / "at_once/weights").iterdir()}
    assert {"federated.s4.safetensors", "other.s4.safetensors"} < names
    for name in names:
        assert same(*(load_file(tmp_path / folder / "weights" / name) for folder in ("run", "at_once")))
    with pytest.raises(StudyError, match="or with more seeds"):
        run(first, tmp_path / "run", resume=True)


def test_a_study_with_variants_comes_back_from_its_file(make: Make, tmp_path: Path) -> None:
    variants = {
        "slow": {"training": {"momentum": 0.5}},
        "long": {"protocol": {"epochs": 2.0}},
        "split": {"protocol": {"name": "splitfed", "cut": "shallow", "variant": "v2"}, "network": {"name": "unet"}},
    }
    study = make(variants, validation__fold="all", study__seeds=3)
    (tmp_path / "study.toml").write_text(to_toml(study))
    assert read_study(tmp_path / "study.toml", check_data=False) == study
    assert study.variants["long"].protocol.steps is None
    assert study.variants["split"].protocol.rounds == study.protocol.rounds


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ({"federated": {"training": {}}}, "not a name for a variant"),
        ({"a-b": {"training": {"momentum": 0.5}}}, "not a name for a variant"),
        ({"x": {"sites": {}}}, "variants share sites"),
        ({"x": {"trainning": {}}}, "training"),
        ({"x": {"training": {"momentun": 0.5}}}, "variants.x"),
        ({"x": {"training": 3}}, "Expected a table"),
        ({"x": {}}, "Expected tables"),
        ({"x": {"protocol": {"compare": ["local"]}}}, "baselines"),
        ({"x": {"protocol": {"rounds": 0}}}, "variants.x"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(make: Make, variants: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        make(variants)


# --------------------------------------------------------------------------------------------------------------- folds


@pytest.fixture(scope="module")
def folded(small_study: Make, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    study = small_study(validation__folds=2, validation__fold="all", protocol__compare=["local"], protocol__steps=4)
    return run(study, tmp_path_factory.mktemp("folds") / "run")


def test_every_case_is_validated_once_by_a_model_that_never_saw_it(folded: Outcome, phantom: Path) -> None:
    valid(folded.results)
    assert folded.exit_code == 0
    for site in SITES:
        scored = [(c["case"], c["fold"]) for c in rows(folded, "federated", "validation") if c["site"] == site]
        cases = {p.name.removesuffix(".nii.gz") for p in (phantom / site / "labelsTr").glob("*.nii.gz")}
        assert {case for case, _ in scored} == cases
        assert len(set(scored)) == len(cases)
    for fold in (0, 1):
        assert len(rows(folded, "federated", "test")) == len(
            {(c["case"], c["label"]) for c in rows(folded, "federated", "test")}
        )
        assert [(m["name"], m["fold"]) for m in folded.results["models"]].count(("federated", fold)) == 1


def test_a_fold_is_the_study_of_that_fold(small_study: Make, folded: Outcome, tmp_path: Path) -> None:
    run(small_study(validation__folds=2, validation__fold=1, protocol__steps=4, test=False), tmp_path / "run")
    assert same(weights(folded.folder, "federated.f1"), weights(tmp_path / "run", "federated"))


def test_the_members_segment_the_test_set_together(folded: Outcome, phantom: Path, tmp_path: Path) -> None:
    """The mean of both members' logits, worked out from their label maps' source, gives the scores of the ensemble."""
    opened = open_finished(folded.folder, "federated")
    assert [p.name for p in opened.files] == ["federated.f0.safetensors", "federated.f1.safetensors"]
    dataset = open_dataset(phantom / "test")
    case = dataset.cases[0]
    how = {
        "plan": opened.plan,
        "labels": opened.labels,
        "device": torch.device("cpu"),
        "mirror": False,
        "precision": "float32",
    }
    networks = opened.networks()
    image, properties = preprocess(case, dataset, opened.plan)
    one, two = (predict_logits(n, image, **how) for n in networks)
    expected = restore((one + two) / 2, opened.plan, opened.labels, properties)
    found, _ = segment(case, dataset, networks=networks, **how)
    assert (found == expected).all()
    assert not (found == restore(one, opened.plan, opened.labels, properties)).all()
    _, reference, _ = read_case(case, dataset)
    scored = {c["label"]: c["dice"] for c in rows(folded, "federated", "test") if c["case"] == case.name}
    for label, dice in scored.items():
        ours, theirs = expected == opened.labels[label], reference[0] == opened.labels[label]
        assert dice == pytest.approx(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))


def test_without_one_of_its_folds_there_is_no_ensemble(folded: Outcome, tmp_path: Path) -> None:
    shutil.copytree(folded.folder, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "states", "lock"))
    (tmp_path / "run" / "weights" / "federated.f1.safetensors").unlink()
    with pytest.raises(StudyError, match=r"1 of 2 folds.*federated\.f0"):
        open_finished(tmp_path / "run", "federated")
    assert len(open_finished(tmp_path / "run", "federated.f0").files) == 1


# ----------------------------------------------------------------------------------------------------- sites left out


@pytest.mark.slow
def test_a_site_left_out_is_never_seen(small_study: Make, make: Make, phantom: Path, tmp_path: Path) -> None:
    outcome = run(make(validation__leave_one_site_out=True), tmp_path / "run")
    valid(outcome.results)
    assert outcome.exit_code == 0
    names = [m["name"] for m in outcome.results["models"]]
    assert names == ["federated", *(f"federated-without-{site}" for site in SITES)]
    run(small_study(sites=("north", "west")), tmp_path / "two")
    assert same(weights(tmp_path / "run", "federated-without-south"), weights(tmp_path / "two", "federated"))
    unseen = rows(outcome, "federated-without-south", "unseen")
    assert {c["site"] for c in unseen} == {"south"}
    assert {c["case"] for c in unseen} == {
        p.name.removesuffix(".nii.gz") for p in (phantom / "south" / "labelsTr").glob("*.nii.gz")
    }
    assert {c["site"] for c in rows(outcome, "federated-without-south", "validation")} == {"north", "west"}
    plan = (tmp_path / "run" / "plans" / "federated-without-south.json").read_text()
    assert plan == (tmp_path / "two" / "plans.json").read_text() == open_finished(tmp_path / "run", names[2]).plans


# ------------------------------------------------------------------------------------------------- between the rounds


def curve(folder: Path, model: str) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    return {line["round"]: line["dice"] for line in lines if line["model"] == model}


@pytest.mark.slow
def test_scoring_between_rounds_changes_nothing_but_tells_the_curve(make: Make, tmp_path: Path) -> None:
    run(make(protocol__rounds=3, protocol__compare=["local", "centralized"]), tmp_path / "plain")
    watched = make(protocol__rounds=3, protocol__compare=["local", "centralized"], validation__every=1)
    outcome = run(watched, tmp_path / "watched")
    assert outcome.exit_code == 0
    for key in ("federated", "centralized"):
        assert same(weights(tmp_path / "plain", key), weights(tmp_path / "watched", key))
    assert same(weights(tmp_path / "plain", "local", "west"), weights(tmp_path / "watched", "local", "west"))
    found = curve(tmp_path / "watched", "federated")
    assert sorted(found) == [1, 2, 3]
    assert set(found[3]) == {*SITES, "all"}
    final: dict[tuple[str, str], list[float]] = {}
    for c in rows(outcome, "federated", "validation"):
        final.setdefault((c["site"], c["patient"]), []).append(c["dice"])
    patients = {key: sum(v) / len(v) for key, v in final.items()}
    assert found[3]["all"] == pytest.approx(sum(patients.values()) / len(patients))
    north = [v for (site, _), v in patients.items() if site == "north"]
    assert found[3]["north"] == pytest.approx(sum(north) / len(north))
    assert set(curve(tmp_path / "watched", "local")[3]) == {*SITES, "all"}
    assert "all" in curve(tmp_path / "watched", "centralized")[3]


@pytest.mark.slow
def test_the_best_weights_are_chosen_by_validation_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are replaced on their way: the second of three rounds is made the best for the federation, the first in the west."""
    asked: list[tuple[str, str]] = []
    original = Site._evaluate

    def evaluate(self: Site, request: Evaluate, cancelled: Any) -> Any:
        asked.append((request.model, request.subset))
        reply = original(self, request, cancelled)
        if request.final:
            return reply
        nth = sum(1 for line in asked if line[0] == request.model) if request.model == "local" else 0
        number = (
            (nth - 1) // 3 + 1
            if request.model == "local"
            else (sum(1 for a in asked if a[0] == "federated") - 1) // 3 + 1
        )
        best = 1 if (request.model, self.settings.name) == ("local", "west") else 2
        value = 0.9 if number == best else 0.1
        return replace(reply, scores=tuple(replace(s, values={"dice": value}) for s in reply.scores))

    study = make(
        protocol__rounds=3, protocol__compare=["local"], validation__every=1, validation__select="best", test=False
    )
    monkeypatch.setattr(Site, "_evaluate", evaluate)
    outcome = run(study, tmp_path / "best")
    monkeypatch.undo()
    told = {m["name"]: m for m in outcome.results["models"]}
    assert told["federated"]["selected_round"] == 2
    assert told["local"]["selected_round"] is None
    alone = {site: took["selected_round"] for site, took in told["local"]["sites"].items()}
    assert alone == {site: 1 if site == "west" else 2 for site in study.sites}
    assert "selected_round" not in told["federated"]["sites"]["west"]
    kept: dict[int, Any] = {}

    def keep(event: Event) -> None:
        if event.kind == "round" and event.model == "federated":
            state = load_file(tmp_path / "plain" / "checkpoints" / "federated" / f"{event.round:06d}.safetensors")
            kept[event.round] = {n.removeprefix("weights/"): t for n, t in state.items() if n.startswith("weights/")}

    run(make(protocol__rounds=3, test=False), tmp_path / "plain", watch=keep)
    assert same(weights(tmp_path / "best", "federated"), kept[2])
    assert same(weights(tmp_path / "best", "federated", "north"), kept[2])
    for site, first in {"north": 2, "west": 1}.items():
        short = make(protocol__rounds=3, test=False, protocol__name="local")
        states: list[dict[str, Tensor]] = []

        def read(event: Event, site: str = site, states: list[dict[str, Tensor]] = states) -> None:
            if event.kind == "round":
                found = load_file(
                    tmp_path / f"local-{site}" / "sites" / site / "states" / "local" / f"{event.round:06d}.safetensors"
                )
                states.append(found)

        run(short, tmp_path / f"local-{site}", watch=read)
        expected = {n.removeprefix("weights/"): t for n, t in states[first - 1].items() if n.startswith("weights/")}
        assert same(weights(tmp_path / "best", "local", site), expected)
        assert not list((tmp_path / "best" / "sites" / site / "models").glob("*.best*"))


@pytest.fixture(scope="module")
def whole(small_study: Make, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run, never stopped, of a study that has all of it."""
    base = small_study(
        study__seeds=2,
        validation__leave_one_site_out=True,
        validation__every=1,
        validation__select="best",
        test=False,
        sites=("north", "west"),
    )
    study = parse_study({**_plain(base), "variants": {"other": {"training": {"learning_rate": 0.1}}}}, folder=Path("/"))
    return run(study, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        ("federated-without-north", 2),
        *(pytest.param(m, marks=pytest.mark.exhaustive) for m in (("federated.s4", 1), ("other", 1))),
    ],
)
def test_a_stop_in_any_setting_loses_nothing(whole: Outcome, tmp_path: Path, moment: tuple[str, int]) -> None:
    study = read_study(whole.folder / "study.toml")

    def stop(event: Event) -> None:
        if event.kind == "round" and (event.model, event.round) == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop)
    stages: list[str] = []
    outcome = run(
        study, tmp_path / "run", resume=True, watch=lambda e: stages.append(e.text) if e.kind == "stage" else None
    )
    assert outcome.exit_code == 0
    assert {m["name"] for m in whole.results["models"]} == {m["name"] for m in outcome.results["models"]}
    for path in (whole.folder / "weights").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run" / "weights" / path.name).read_bytes(), path.name
    assert curves(whole.folder) == curves(tmp_path / "run")
    assert whole.results["cases"] == outcome.results["cases"]
    if moment[0] != "federated.s4":  # what was finished is not prepared again
        assert not any(text.startswith("Planned federated:") for text in stages)


def test_the_command_takes_the_number_of_seeds(small_study: Make, tmp_path: Path) -> None:
    raw = _plain(small_study(protocol__rounds=1, test=False))
    (tmp_path / "study.toml").write_text(tomli_w.dumps(raw))
    done = CliRunner().invoke(
        app, ["run", str(tmp_path / "study.toml"), "--out", str(tmp_path / "run"), "--seeds", "2"]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "weights" / "federated.s4.safetensors").is_file()
    assert "seeds = 2" in (tmp_path / "run" / "study.toml").read_text()
