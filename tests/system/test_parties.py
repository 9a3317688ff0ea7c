"""Sites that hold different channels of the same patients, through the whole line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
from safetensors.torch import load_file

import concilium
from concilium import wire
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.data.plan import open_plan
from concilium.errors import DataError, StudyError
from concilium.line import Event, Outcome, run
from concilium.loads import whole_load
from concilium.planning import Plans, network_of
from concilium.predict import predict
from concilium.study import Study, parse_study, read_study, to_toml, training_of

Make = Callable[..., Study]
N = 6


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequences")
    write_sequences(folder, n_cases=N, n_test=2, size=16)
    return folder


def tables(data: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    raw: dict[str, dict[str, Any]] = {
        "study": {"name": "parties", "seed": 3},
        "sites": {name: {"data": str(data / name), "holds": [name]} for name in SEQUENCES},
        "test": {"data": str(data / "test")},
        "protocol": {"name": "vertical", "labels": "first", "cut": "shallow", "rounds": 2, "steps": 2},
        "network": {"name": "unet", "base_features": 4, "levels": 2},
        "training": {"optimizer": "adamw", "batch_size": 2, "patch_size": [8, 16, 16], "mirror": False},
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }
    for name, value in changes.items():
        table, key = name.split("__")
        raw.setdefault(table, {})[key] = value
    return raw


def study_on(data: Path, **changes: Any) -> Study:
    return parse_study(tables(data, **changes), folder=data)


@pytest.fixture(scope="module")
def whole(sequences: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Three institutes, with the baseline in one place."""
    study = study_on(sequences, protocol__compare=["centralized"], training__mirror=True)
    return run(study, tmp_path_factory.mktemp("parties") / "run")


def plans_of(outcome: Outcome, data: Path) -> Plans:
    text = (outcome.folder / "plans.json").read_text()
    plan = open_plan(text, "3d_fullres")
    labels = json.loads((data / "first/dataset.json").read_text())["labels"]
    return Plans(text, SEQUENCES, labels, plan.patch_size, plan.batch_size)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "weights/vertical.safetensors").read_bytes()).hexdigest()


def scores(results: Any, model: str, subset: str) -> dict[str, float]:
    return {c["case"]: c["dice"] for c in results["cases"] if (c["model"], c["subset"]) == (model, subset)}


def test_it_ends_as_asked_and_each_has_its_own_part(whole: Outcome) -> None:
    results = whole.results
    assert (whole.exit_code, results["problems"]) == (0, [])
    assert [(m["name"], m["patches"]) for m in results["models"]] == [("vertical", 8), ("centralized", 8)]
    assert {c["site"] for c in results["cases"]} == {"first", "test"}
    assert scores(results, "vertical", "validation").keys() == scores(results, "centralized", "validation").keys()
    server = set(load_file(whole.folder / "weights/vertical.safetensors"))
    for name in SEQUENCES:
        own = set(load_file(whole.folder / "sites" / name / "models/vertical.safetensors"))
        fronts = {n for n in own if n.startswith("fronts.")}
        assert fronts == {n for n in server if n.startswith(f"fronts.{name}.")} != set()
        assert bool(own - fronts) == (name == "first")
        assert not any(n.startswith(("fuse", "encode1")) for n in own), "a site has the server's part"


def test_parties_together_segment_as_the_whole_network_does(whole: Outcome, tmp_path: Path) -> None:
    """Windows, mirrored ones included, against `concilium predict` with all channels in one place."""
    expected = scores(whole.results, "vertical", "validation")
    images = tmp_path / "images"
    images.mkdir()
    for case in expected:
        for path in (whole.folder / "joined/imagesTr").glob(f"{case}_*"):
            shutil.copyfile(path, images / path.name)
    predict(whole.folder, images, tmp_path / "out", model="vertical")
    found = concilium.evaluate(tmp_path / "out", whole.folder / "joined/labelsTr").found.cases
    assert {row["case"]: row["dice"] for row in found} == expected
    assert len(expected) > 0


def test_names_and_images_never_cross(sequences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    pack = wire.pack
    monkeypatch.setattr(wire, "pack", lambda message: sent.append(pack(message)) or sent[-1])
    study = study_on(sequences, protocol__rounds=1)
    run(study, tmp_path / "run")
    everything = b"".join(sent)
    assert len(sent) > 20
    assert b"case_0" not in everything
    assert b"test_0" not in everything
    names = [f"case_{i:03d}" for i in range(N)]
    assert not any(hashlib.sha256(name.encode()).digest() in everything for name in names)


def test_extra_cases_elsewhere_change_nothing(sequences: Path, tmp_path: Path) -> None:
    """One institute has a patient more, who comes first in its folder: the others' places are the same."""
    data = tmp_path / "data"
    shutil.copytree(sequences, data)
    folder = data / "second" / "imagesTr"
    shutil.copyfile(folder / "case_000_0000.nii.gz", folder / "aaa_0000.nii.gz")
    plain = run(study_on(sequences), tmp_path / "plain")
    more = run(study_on(data), tmp_path / "more")
    assert digest(plain.folder) == digest(more.folder)
    assert any(f"{N} cases are at all sites" in text for text in more.results["warnings"])
    left = {(e["site"], e["case"], e["reason"]) for e in more.results["excluded"]}
    assert left == {("second", "aaa", "not_everywhere")}


def test_a_case_that_lies_elsewhere_in_space_is_set_aside(sequences: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(sequences, data)
    path = data / "second" / "imagesTr" / "case_002_0000.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetOrigin((5.0, 0.0, 0.0))
    sitk.WriteImage(image, str(path))
    outcome = run(study_on(data, study__max_excluded=0.2), tmp_path / "run")
    assert outcome.exit_code == 0
    assert any("1 cases that all sites have lie elsewhere" in text for text in outcome.results["warnings"])
    left = {(e["site"], e["case"], e["reason"]) for e in outcome.results["excluded"]}
    assert left == {(site, "case_002", "geometry_differs") for site in SEQUENCES}
    assert run(study_on(data, study__max_excluded=0.05), tmp_path / "strict").exit_code == 4


def test_sites_without_a_patient_in_common_are_told_so(sequences: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(sequences, data)
    for path in (data / "third" / "imagesTr").iterdir():
        path.rename(path.with_name("other_" + path.name))
    with pytest.raises(DataError, match="0 cases of 0 patients are at all sites"):
        run(study_on(data), tmp_path / "run")


@pytest.mark.slow
def test_patches_that_follow_the_labels_are_the_label_holders(sequences: Path, tmp_path: Path) -> None:
    """Every party trains, and by other patches than uniform ones; a label holder whose settings do not allow it stops the run."""
    changes: dict[str, Any] = {"protocol__rounds": 1, "protocol__drop": 0.3, "training__foreground": 1.0}
    uniform = run(study_on(sequences, **changes), tmp_path / "uniform")
    follow = run(study_on(sequences, **changes, protocol__patches="labels"), tmp_path / "follow")
    assert (follow.exit_code, follow.results["problems"]) == (0, [])
    assert digest(follow.folder) != digest(uniform.folder)
    again = run(
        study_on(sequences, **changes, protocol__patches="labels", training__loader_workers=1), tmp_path / "again"
    )
    assert digest(follow.folder) == digest(again.folder)


@pytest.mark.parametrize(("body", "transport"), [("server", "float32"), ("labels", "int8")])
def test_what_is_forecast_is_what_is_sent(sequences: Path, tmp_path: Path, body: str, transport: str) -> None:
    """Bytes of every party, and operations of all owners together those of the whole network."""
    changes = {"protocol__rounds": 1, "protocol__steps": 4, "protocol__body": body, "protocol__transport": transport}
    study = study_on(
        sequences, forecast__mbit=100.0, forecast__site_gflops=10.0, forecast__server_gflops=10.0, **changes
    )
    outcome = run(study, tmp_path / "run")
    assert outcome.results["warnings"] == []
    told = json.loads((outcome.folder / "forecast/vertical.json").read_text())
    line = json.loads((outcome.folder / "rounds.jsonl").read_text().splitlines()[0])
    for name, site in told["sites"].items():
        headers = 1200 * (4 * (3 if name == "first" else 1) + 2)
        for key in ("up", "down"):
            assert site[key] <= line["sites"][name][f"bytes_{key}"] <= 1.02 * site[key] + headers, (name, key)
    build, training = network_of(study, plans_of(outcome, sequences)), training_of(study)
    if body == "server":  # no head but the finest acts on maps of the server
        build, training = partial(build, deep_supervision=False), replace(training, deep_supervision=False)
    whole = whole_load(lambda deep_supervision: build(), (2, 3, 8, 16, 16), training)
    flops = sum(site["seconds"] for site in told["sites"].values()) / 4 + told["server_seconds"] / 4
    assert flops * 10e9 == pytest.approx(whole.flops)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(sequences: Path, tmp_path: Path, workers: int) -> None:
    study = study_on(sequences, protocol__drop=0.3, engine__workers=workers)
    run(study, tmp_path / "whole")

    def stop(event: Event) -> None:
        if (event.kind, event.round) == ("round", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "stopped", watch=stop)
    outcome = run(study, tmp_path / "stopped", resume=True)
    assert outcome.exit_code == 0
    assert not any("counted for so much less" in text for text in outcome.results["warnings"]), "nothing is averaged"
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_variants_with_fewer_parties_and_a_reader_of_labels(sequences: Path, tmp_path: Path) -> None:
    """Whoever has the labels holds no channel; one variant uses one sequence, one fuses at the labels."""
    raw = tables(sequences, validation__every=1)
    raw["sites"]["first"]["holds"] = []
    raw["variants"] = {
        "one": {"protocol": {"parties": ["second"]}},
        "there": {"protocol": {"body": "labels", "fuse": "mean"}},
    }
    raw["test"] = {"data": str(_without_first(sequences / "test", tmp_path / "test"))}
    outcome = run(parse_study(raw, folder=sequences), tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    assert [m["name"] for m in outcome.results["models"]] == ["vertical", "one", "there"]
    took = {m["name"]: set(m["sites"]) for m in outcome.results["models"]}
    assert took == {"vertical": set(SEQUENCES), "one": {"first", "second"}, "there": set(SEQUENCES)}
    fronts = {n.split(".")[1] for n in load_file(outcome.folder / "weights/one.safetensors") if n.startswith("fronts")}
    assert fronts == {"second"}


def _without_first(source: Path, target: Path) -> Path:
    """The held-out set without the channel `first`."""
    shutil.copytree(source, target)
    about = json.loads((target / "dataset.json").read_text())
    about["channel_names"] = {"0": "second", "1": "third"}
    (target / "dataset.json").write_text(json.dumps(about))
    for path in (target / "imagesTr").glob("*_0000.nii.gz"):
        path.unlink()
    for place in (1, 2):
        for path in (target / "imagesTr").glob(f"*_{place:04d}.nii.gz"):
            path.rename(path.with_name(path.name.replace(f"_{place:04d}", f"_{place - 1:04d}")))
    return target


@pytest.mark.slow
def test_defences_end_every_front_and_no_baseline_has_them(sequences: Path, tmp_path: Path) -> None:
    raw: dict[str, Any] = tables(sequences, protocol__rounds=1, protocol__compare=["centralized"])
    raw["defences"] = [{"name": "gaussian", "scale": 0.5}, {"name": "project", "channels": 2}]
    raw["variants"] = {"plain": {"defences": []}, "labels": {"protocol": {"body": "labels"}}}
    outcome = run(parse_study(raw, folder=sequences), tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])

    def defended(model: str) -> set[str]:
        names = load_file(outcome.folder / f"weights/{model}.safetensors")
        return {".".join(n.split(".")[:3]) for n in names if ".defence" in n} | {
            n[:7] for n in names if n[:7] == "restore"
        }

    every = {f"fronts.{name}.defence1" for name in SEQUENCES} | {"restore"}
    assert [defended(m) for m in ("vertical", "labels", "plain", "centralized")] == [every, every, set(), set()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sites__first": {"data": "first"}}, "[sites.first] holds is missing"),
        ({"sites__second": {"data": "second", "holds": ["first"]}}, "holds names first at two sites"),
        ({"protocol__labels": "nobody"}, "labels = 'nobody' is no site"),
        ({"protocol__parties": ["nobody"]}, "parties = ['nobody'] is not allowed"),
        ({"protocol__compare": ["local"]}, "compare = ['local'] is not allowed with 'vertical'"),
        ({"protocol__drop": 1.0}, "drop = 1.0 is not allowed"),
        ({"aggregation__name": "median"}, "[aggregation] name = 'median' is not allowed"),
        ({"sharing__keep": ["norms"]}, "[sharing] keep = ['norms'] is not allowed"),
        ({"validation__leave_one_site_out": True}, "leave_one_site_out = true is not allowed"),
        ({"protocol__name": "federated"}, "holds = ['first'] is not allowed with protocol 'federated'"),
    ],
)
def test_what_a_study_may_not_say(sequences: Path, changes: dict[str, Any], said: str) -> None:
    raw = tables(sequences, **changes)
    if raw["protocol"]["name"] != "vertical":
        raw["protocol"] = {"name": "federated", "rounds": 1, "steps": 1}
    with pytest.raises(StudyError) as e:
        parse_study(raw, folder=sequences)
    assert said in str(e.value)


def test_a_study_that_is_written_is_read_as_it_was(sequences: Path, tmp_path: Path) -> None:
    raw = tables(sequences)
    raw["variants"] = {"mean": {"protocol": {"fuse": "mean"}}}
    study = parse_study(raw, folder=sequences)
    (tmp_path / "study.toml").write_text(to_toml(study))
    assert read_study(tmp_path / "study.toml") == study
    assert study.network.name == "fused"
    assert study.variants["mean"].network.options["fuse"] == "mean"
