"""An audit of vertical training on the phantom: what was sent and what came back, whose it was, and what attacks make of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

import concilium
from concilium import catalog
from concilium.attacks import Release, releases
from concilium.data.patches import Batch
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.engines._transcript import Keeping, read_transcript
from concilium.errors import DataError, StudyError
from concilium.leakage import Amount, Asked, leakage
from concilium.leakage.along import run_and_keep
from concilium.leakage.exchange import Way, exchange, own_cases
from concilium.leakage.parties import PartySender, known_fronts, party_scenes, truth_at
from concilium.leakage.predicting import predicting_scenes
from concilium.leakage.steering import steered_scenes
from concilium.leakage.subject import Subject, subject_of
from concilium.leakage.weights import kept_at
from concilium.line import Event, run
from concilium.protocols import WEIGHTS
from concilium.reports.leakage import grids
from concilium.study import Study, parse_study
from concilium.wire import part, read_tensors, write_tensors

pytestmark = pytest.mark.slow

FEW = Amount(victims=8, own=24, gallery=6)
QUICK: dict[str, dict[str, Any]] = {
    name: {"steps": 40, "width": 8, "batch_size": 4} for name in ("inversion", "label_inference")
}


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequences")
    write_sequences(folder, n_cases=8, n_test=8, size=16)
    return folder


def study_on(data: Path, *, holds: tuple[str, ...] = ("first",), noise: float = 0.0, **options: Any) -> Study:
    own = {"first": holds, "second": ("second",), "third": ("third",)}
    raw = {
        "study": {"name": "parties", "seed": 3},
        "sites": {name: {"data": str(data / name), "holds": list(own[name])} for name in SEQUENCES},
        "test": {"data": str(data / "test")},
        "protocol": {"name": "vertical", "labels": "first", "cut": "shallow", "rounds": 2, "steps": 2} | options,
        "network": {"name": "unet", "base_features": 4, "levels": 2},
        "training": {
            "optimizer": "sgd", "batch_size": 2, "patch_size": [8, 16, 16], "mirror": False, "augmentation": "none",
        },
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }  # fmt: skip
    return parse_study(raw | ({"defences": [{"name": "gaussian", "scale": noise}]} if noise else {}), folder=data)


@pytest.fixture(scope="module")
def audited(sequences: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Release, ...]]:
    """A finished run, of which the weights after round 1 were kept, and what it sent."""
    folder = tmp_path_factory.mktemp("audited")

    def keeping(**told: Any) -> Any:
        return Keeping(catalog.load("engines", "simulation")(**told), folder / "said")

    def keep(event: Event) -> None:
        if (event.kind, event.round) == ("round", 1):
            tensors, _ = read_tensors(folder / "run/checkpoints/vertical/000001.safetensors")
            write_tensors(kept_at(folder / "run", "vertical", 1), part(tensors, WEIGHTS), {})

    run(study_on(sequences), folder / "run", connect=keeping, watch=keep)
    return folder / "run", releases(read_transcript(folder / "said"))


def subject(folder: Path, work: Path, number: int | None = None, auxiliary: str | None = None) -> Subject:
    return subject_of(folder, None, auxiliary=auxiliary, work=work, number=number)


def way_of(of: Subject) -> Way:
    return Way("vertical", of.study.protocol.options, 1)


def found(folder: Path, out: Path, *attacks: str, **asked: Any) -> dict[str, Any]:
    options = {name: told for name, told in QUICK.items() if name in attacks}
    return leakage(folder, out, asked=Asked(attacks=attacks, options=options, amount=FEW, **asked))


def figure(told: dict[str, Any], metric: str, **where: Any) -> tuple[float, float]:
    (row,) = [r for r in told["rows"] if r["metric"] == metric and where.items() <= r.items()]
    return row["value"], row["naive"]


def same(a: Release, b: Release) -> bool:
    pairs = [*zip(a.maps, b.maps, strict=True), *zip(a.gradients, b.gradients, strict=True)]
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


def test_what_is_audited_is_what_the_run_sent_and_the_truth_is_what_was_behind_it(
    audited: tuple[Path, tuple[Release, ...]], tmp_path: Path
) -> None:
    """The first step after round 1, as a run said it, as the audit does, and as its parties do with true images: to the bit."""
    folder, said = audited
    first = {(r.site, bool(r.maps)): r for r in said if (r.round, r.step) == (2, 0)}
    tail = ("first", False)
    assert first.keys() == {(name, True) for name in SEQUENCES} | {tail}
    of = subject(folder, tmp_path / "work", number=1)
    again = exchange(of, way_of(of), "again")
    assert len(again) == 4
    assert all(same(r, first[r.site, bool(r.maps)]) for r in again)
    assert not torch.equal(first["first", True].gradients[0], first["second", True].gradients[0])
    truths = {name: truth_at(of, name, [r for r in again if r.site == name and r.maps]) for name in SEQUENCES}
    whole = torch.cat([truths[name][0].images for name in SEQUENCES], dim=1)
    labels = truths["second"][0].labels
    sent = PartySender(of, way_of(of)).send(Batch(whole, (labels.unsqueeze(1).short(),)), 0)
    assert all(same(r, first[r.site, bool(r.maps)]) for r in sent)
    place = int(truths["third"][1][0])  # of the first patch's case, which all parties have at the same place
    plain = of.plain_patch("first", of.jobs["first"].entries["training"][place])
    assert np.array_equal(plain.image[0], whole[0]), "a patch is the whole image here, with the channels of all"


def test_each_party_has_its_figures_beside_those_of_no_attack(
    audited: tuple[Path, tuple[Release, ...]], tmp_path: Path
) -> None:
    told = found(audited[0], tmp_path, *QUICK, "reidentify", "membership")
    for name in SEQUENCES[:2]:  # the third shows the body's outline only
        got, naive = figure(told, "psnr", site=name, map="down0", attack="inversion")
        assert got > naive + 2
        near, far = figure(told, "distance_correlation", site=name)
        assert near > far + 0.5
    assert {(r["site"], r["channel"]) for r in told["rows"] if r["metric"] == "psnr"} == {(n, n) for n in SEQUENCES}
    masks = {(r["site"], r["map"]) for r in told["rows"] if r["attack"] == "label_inference"}
    assert masks == {(name, "front") for name in SEQUENCES} | {("first", "tail")}
    got, naive = figure(told, "dice", map="tail")
    assert got > naive + 0.3
    assert {r["site"] for r in told["rows"] if r["metric"] == "reidentified"} == set(SEQUENCES)
    assert figure(told, "auc", attack="membership")[1] == 0.5
    schema = json.loads((Path(concilium.__file__).parent / "leakage.schema.json").read_text())
    Draft202012Validator(schema).validate(json.loads((tmp_path / "leakage.json").read_text()))
    assert {row[2] for row in grids(told)[0].rows} >= {"second: down0", "second: front", "first: tail"}
    kept = {p.suffix for p in (tmp_path / "work").rglob("*") if p.is_file()}
    assert kept == {".message", ".jsonl"}, "messages alone are kept: no image, no label map, no name of a case"


def test_whoever_reads_only_has_no_map_and_a_body_at_the_labels_no_tail(sequences: Path, tmp_path: Path) -> None:
    """Labels only at the first site, the body there, parties left out of steps, noise on maps, and whole numbers on the way."""
    study = study_on(sequences, holds=(), noise=0.5, body="labels", drop=0.4, transport="int8")
    data = tmp_path / "test"
    shutil.copytree(sequences / "test", data)
    _leave_out_first(data)
    test = study.test
    assert test is not None
    folder = run(replace(study, test=replace(test, data=data)), tmp_path / "run").folder
    told = found(folder, tmp_path / "out", "reidentify", "label_inference")
    assert {(r["site"], r["map"]) for r in told["rows"]} == {
        (n, m) for n in ("second", "third") for m in ("defence0", "front")
    }
    of = subject(folder, tmp_path / "work")
    sender, (batch,) = PartySender(of, way_of(of)), own_cases(of, 2)
    mine, other = ({r.site: r.maps[0] for r in sender.send(batch, i) if r.maps} for i in (0, 1))
    assert mine.keys() == {"second", "third"}
    assert all(len(m[:, c].unique()) < 256 for m in mine.values() for c in range(4)), "as int8, as the victims'"
    assert not any(torch.equal(mine[name], other[name]) for name in mine), "the same images, but other noise"


def _leave_out_first(folder: Path) -> None:
    about = json.loads((folder / "dataset.json").read_text())
    about["channel_names"] = {"0": "second", "1": "third"}
    (folder / "dataset.json").write_text(json.dumps(about))
    for path in sorted((folder / "imagesTr").iterdir()):  # 0000 goes, 0001 becomes 0000
        place = int(path.name[-11:-7])
        path.rename(path.with_name(f"{path.name[:-11]}{place - 1:04d}.nii.gz")) if place else path.unlink()


def test_an_attacker_that_has_one_of_a_victims_sequences_is_refused(
    audited: tuple[Path, tuple[Release, ...]], sequences: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sequences / "test", folder)
    theirs = sequences / "second" / "imagesTr" / "case_003_0000.nii.gz"
    shutil.copyfile(theirs, folder / "imagesTr" / "test_001_0001.nii.gz")
    with pytest.raises(DataError, match=r"1 cases of the attacker are victims' \(test_001 is second/case_003\)"):
        found(audited[0], tmp_path / "out", "inversion", auxiliary=str(folder))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cuts": ("deep",)}, "each cut makes another network"),
        ({"auxiliary": "second"}, "holds channels of the patients that are attacked"),
    ],
)
def test_what_cannot_be_is_refused(
    audited: tuple[Path, tuple[Release, ...]], tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(StudyError, match=said):
        found(audited[0], tmp_path, "reidentify", **asked)


def test_a_party_is_steered_alone_in_its_own_channels(
    audited: tuple[Path, tuple[Release, ...]], tmp_path: Path
) -> None:
    """Whoever returns gradients puts others in their place: that party's front goes where those point."""
    of = subject(audited[0], tmp_path)
    scenes = {scene.site: scene for scene in steered_scenes(of, None, replace(FEW, victims=4, steering=3))}
    assert set(scenes) == {"second", "third"}  # who has the labels is the attacker, or at its place
    for site, scene in scenes.items():
        (channel,) = of.places[site]
        assert scene.channels == (of.plans.channels[channel],)
        sent = {}
        for scale in (0.0, 1.0):
            came: list[Release] = []
            sent[scale] = scene.known.open_steer(partial(_pointing, scale=scale, came=came))
            assert [(r.site, r.step) for r in came] == [(site, step) for step in range(3)]
        with torch.no_grad():
            own = [known_fronts(of)[site].run((x,))[0] for x in scene.truth.images.split(2)]
        held = [torch.allclose(r.maps[0], m, atol=1e-3) for r, m in zip(sent[0.0], own, strict=True)]
        moved = [not torch.allclose(r.maps[0], m, atol=1e-3) for r, m in zip(sent[1.0], own, strict=True)]
        assert held == moved == [True] * len(own)


def _pointing(release: Release, *, scale: float, came: list[Release]) -> tuple[torch.Tensor, ...]:
    came.append(release)
    return tuple(scale * torch.ones_like(m) for m in release.maps)


def test_maps_of_a_party_are_read_once_its_front_was_steered(
    audited: tuple[Path, tuple[Release, ...]], tmp_path: Path
) -> None:
    options = {"feature_hijack": {"steps": 2, "width": 4}}
    amount = replace(FEW, victims=4, steering=3)
    told = leakage(audited[0], tmp_path, asked=Asked(attacks=("feature_hijack",), options=options, amount=amount))
    assert {(r["site"], r["metric"]) for r in told["rows"] if r["attack"]} == {
        (site, metric) for site in ("second", "third") for metric in ("ssim", "psnr")
    }


# --------------------------------------------------------------------------------------------------- fronts that stay


@pytest.fixture(scope="module")
def hidden(sequences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with fronts that stay at their sites; it has no test set, whose cases the attacker is given all the same."""
    study = replace(study_on(sequences), test=None)
    options = {**study.protocol.options, "fronts": "stay"}
    study = replace(study, protocol=replace(study.protocol, options=options))
    return run_and_keep(study, tmp_path_factory.mktemp("hidden") / "run", [1])


def test_of_a_front_that_nobody_else_knows_maps_are_attacked_without_its_weights(
    hidden: Path, audited: tuple[Path, tuple[Release, ...]], sequences: Path, tmp_path: Path
) -> None:
    """Maps are those of a run whose fronts are sent, and so is what attacks find that use no weight of them."""
    attacks = ("inversion", "label_inference", "reidentify")
    more = (*attacks, "inversion_white", "membership")
    told = found(hidden, tmp_path / "hidden", *more, auxiliary=str(sequences / "test"))
    open_ = found(audited[0], tmp_path / "open", *attacks)
    assert told["rows"] == open_["rows"]
    assert {row["attack"] for row in told["rows"]} == {"", *attacks}
    assert not any("stay" in note for note in open_["notes"])
    for said in (
        "inversion_white was not run: it needs the weights",
        "membership was not run: nobody has the finished",
    ):
        assert any(note.startswith(said) for note in told["notes"])
    assert any(
        "an upper bound for one that has none" in note and "no defence against" in note for note in told["notes"]
    )
    with pytest.raises(StudyError, match=r"Nothing of .* was attacked \(membership was not run: nobody has"):
        found(hidden, tmp_path / "no", "membership", auxiliary=str(sequences / "test"))


def test_an_audit_of_them_goes_on_from_what_the_sites_have(
    hidden: Path, audited: tuple[Path, tuple[Release, ...]], sequences: Path, tmp_path: Path
) -> None:
    test = str(sequences / "test")
    for number in (0, 1, None):
        mine, theirs = (
            subject(folder, tmp_path / name, number, aux)
            for name, folder, aux in (("hidden", hidden, test), ("open", audited[0], None))
        )
        assert (mine.hidden, theirs.hidden) == (True, False)
        assert mine.weights.keys() == theirs.weights.keys()
        assert all(torch.equal(t, theirs.weights[n]) for n, t in mine.weights.items()), number
    true, amount = known_fronts(mine), replace(FEW, victims=4, steering=3)
    assert all(s.known.front is None for s in [*party_scenes(mine, FEW, gallery=False), *predicting_scenes(mine, FEW)])
    for scene in steered_scenes(mine, None, amount):  # it knows what stages there are
        own, front = true[scene.site].state_dict(), scene.known.open_front.state_dict()
        assert own.keys() == front.keys()
        assert not any(torch.equal(t, front[n]) for n, t in own.items() if t.ndim > 1)
    lost = tmp_path / "lost"
    shutil.copytree(hidden, lost)
    (lost / "sites/second/models/vertical.safetensors").unlink()
    with pytest.raises(StudyError, match="The front of second is not here"):
        subject(lost, tmp_path / "work", None, test)
