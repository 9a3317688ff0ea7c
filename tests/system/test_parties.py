"""Sites that hold different channels of the same patients, through the whole line."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from safetensors.torch import load_file

import concilium
from concilium import wire
from concilium.answers import Entry
from concilium.answers.align import places_of
from concilium.data.dataset import open_dataset
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.data.plan import open_plan
from concilium.errors import DataError, EngineError, StudyError
from concilium.line import Event, Outcome, run
from concilium.loads import whole_load
from concilium.messages import Prepared
from concilium.planning import Plans, network_of
from concilium.predict import predict
from concilium.study import Study, parse_study, read_study, to_toml, training_of
from concilium.together import must_lie_alike

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


def test_the_plan_is_that_of_the_cases_that_all_have(sequences: Path, tmp_path: Path) -> None:
    """Whoever has the labels has more patients, of larger voxels and brighter: nobody trains on them, and they plan nothing."""
    data = tmp_path / "data"
    shutil.copytree(sequences, data)
    for i in range(N + 2):
        for part, end in (("imagesTr", "_0000"), ("labelsTr", "")):
            image = sitk.ReadImage(str(data / f"first/{part}/case_000{end}.nii.gz"))
            image = image * (1 + 9 * (part == "imagesTr"))
            image.SetSpacing((2.0, 2.0, 2.0))
            sitk.WriteImage(image, str(data / f"first/{part}/more_{i:03d}{end}.nii.gz"))
    plain = run(study_on(sequences), tmp_path / "plain")
    more = run(study_on(data), tmp_path / "more")
    for name in ("plans.json", "fingerprint.json"):
        assert (plain.folder / name).read_bytes() == (more.folder / name).read_bytes(), name
    assert digest(plain.folder) == digest(more.folder)


def test_a_run_does_not_go_on_with_other_cases(sequences: Path, tmp_path: Path) -> None:
    """Those that validated would be trained on, or the other way round."""
    data = tmp_path / "data"
    shutil.copytree(sequences, data)
    path = data / "second" / "imagesTr" / "case_002_0000.nii.gz"
    before = path.read_bytes()
    image = sitk.ReadImage(str(path))
    image.SetOrigin((5.0, 0.0, 0.0))
    sitk.WriteImage(image, str(path))
    study = study_on(data, study__max_excluded=0.2)
    assert run(study, tmp_path / "run").exit_code == 0
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    path.write_bytes(before)
    more = replace(study, study=replace(study.study, seeds=2))
    with pytest.raises(EngineError, match="other cases are at all sites than when the run began"):
        run(more, tmp_path / "run", resume=True)


def test_files_that_round_otherwise_lie_alike_and_those_that_differ_do_not(tmp_path: Path) -> None:
    """Decimals in one file and float32 in another; the numbers are such that hundredths of a millimetre are rounded apart."""
    draw = np.random.default_rng(0)

    def placed(name: str, ending: str, spacing: Any, origin: Any, angle: float = 0.3) -> tuple[str, ...]:
        folder = tmp_path / name
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        image = sitk.GetImageFromArray(np.ones((4, 4, 4), np.float32))
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        c, s = math.cos(angle), math.sin(angle)
        image.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
        sitk.WriteImage(image, str(folder / f"imagesTr/a_0000{ending}"))
        about = {
            "channel_names": {"0": "x"},
            "labels": {"background": 0, "x": 1},
            "numTraining": 1,
            "file_ending": ending,
        }
        (folder / "dataset.json").write_text(json.dumps(about))
        dataset = open_dataset(folder, labelled=False)
        return places_of(Entry("", dataset, dataset.cases[0], 0, 0))

    origins = [-125.485, 0.005, 77.775]
    for i in range(40):
        spacing = tuple(draw.uniform(0.3, 5.0, 3)) if i else (0.4883, 0.4883, 1.25)
        origin = tuple(draw.uniform(-300, 300, 3).round(3)) if i else tuple(origins)
        a, b = placed(f"n{i}", ".nii.gz", spacing, origin), placed(f"m{i}", ".mha", spacing, origin)
        assert any(x == y for x, y in zip(a, b, strict=True)), (spacing, origin)
    alike = placed("n0", ".nii.gz", (0.4883, 0.4883, 1.25), origins)
    others = (
        placed("o1", ".nii.gz", (0.4951, 0.4883, 1.25), origins),
        placed("o2", ".nii.gz", (0.4883, 0.4883, 1.25), (-125.46, 0.005, 77.775)),
        placed("o3", ".nii.gz", (0.4883, 0.4883, 1.25), origins, angle=0.301),
        placed("o4", ".nii.gz", (0.003, 0.004, 1.25), origins),
    )
    for other in others:
        assert not any(x == y for x, y in zip(alike, other, strict=True))
    assert not any(
        x == y for x, y in zip(others[3], placed("o5", ".nii.gz", (0.004, 0.004, 1.25), origins), strict=True)
    )


def test_parties_whose_preprocessed_images_have_other_shapes_stop_the_run() -> None:
    made = {name: Prepared(3, 1, 4, (), (), shapes) for name, shapes in (("a", 1), ("b", 1), ("c", 0))}
    must_lie_alike(made)
    with pytest.raises(DataError, match="other shapes at some of a, b"):
        must_lie_alike({**made, "b": replace(made["b"], shapes=2)})


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


@pytest.mark.parametrize(
    ("body", "transport", "mirror", "fronts"),
    [("server", "float32", True, "sent"), ("labels", "int8", False, "sent"), ("server", "int8", False, "stay")],
)
def test_what_is_forecast_is_what_is_sent(
    sequences: Path, tmp_path: Path, body: str, transport: str, mirror: bool, fronts: str
) -> None:
    """Bytes of every party in rounds and besides, and operations of all owners together those of the whole network."""
    changes = {"protocol__rounds": 1, "protocol__steps": 4, "protocol__body": body, "protocol__transport": transport}
    changes |= {"validation__every": 1, "training__mirror": mirror}
    raw = tables(sequences, forecast__mbit=100.0, forecast__site_gflops=10.0, forecast__server_gflops=10.0, **changes)
    if fronts == "stay":
        raw["protocol"]["fronts"] = fronts
        raw["network"]["base_features"] = 16  # a front weighs more than headers do
        del raw["test"]
    study = parse_study(raw, folder=sequences)
    outcome = run(study, tmp_path / "run")
    assert [text for text in outcome.results["warnings"] if "No test set" not in text] == []
    told = json.loads((outcome.folder / "forecast/vertical.json").read_text())
    line = json.loads((outcome.folder / "rounds.jsonl").read_text().splitlines()[0])
    for name, site in told["sites"].items():
        headers = 1200 * (4 * (3 if name == "first" else 1) + 2)
        for key in ("up", "down"):
            assert site[key] <= line["sites"][name][f"bytes_{key}"] <= 1.02 * site[key] + headers, (name, key)
            measured = outcome.results["models"][0]["sites"][name][f"besides_{key}"]
            headers_besides = 60_000 if mirror else 20_000
            assert site[f"besides_{key}"] <= measured <= 1.02 * site[f"besides_{key}"] + headers_besides, (name, key)
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
