"""An audit of runs on the phantom: what it shows where nothing defends, and that a broken attack, or a cheating one, is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

import concilium
from concilium import catalog
from concilium.attacks import releases
from concilium.cli import app
from concilium.engines._transcript import Keeping, read_transcript
from concilium.errors import ContractError, DataError, StudyError
from concilium.leakage import Amount, Asked, leakage
from concilium.leakage.exchange import Sender, Way, exchange, own_cases, split_way, truth_of
from concilium.leakage.scene import every_cut
from concilium.leakage.subject import Subject, subject_of
from concilium.line import run
from concilium.study import Study

FEW = Amount(victims=8, own=24, gallery=6)
QUICK: dict[str, dict[str, Any]] = {"inversion": {"steps": 60, "width": 8}}
Make = Callable[..., Study]


def found(folder: Path, out: Path, *attacks: str, options: Any = None, **asked: Any) -> dict[str, Any]:
    told = {name: of for name, of in (QUICK if options is None else options).items() if name in attacks}
    return leakage(folder, out, asked=Asked(attacks=attacks, options=told, amount=FEW, **asked))


def figure(told: dict[str, Any], metric: str, **where: Any) -> tuple[float, float]:
    (row,) = [r for r in told["rows"] if r["metric"] == metric and where.items() <= r.items()]
    return row["value"], row["naive"]


def subject(folder: Path, tmp_path: Path, number: int | None = None, auxiliary: str | None = None) -> Subject:
    return subject_of(folder, None, auxiliary=auxiliary, work=tmp_path / "work", number=number)


# ------------------------------------------------------------------------------------------------- the attack must be real


@pytest.fixture(scope="module")
def undefended(split_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the audit of a study without any defence says, and where it lies."""
    out = tmp_path_factory.mktemp("undefended")
    return found(split_run, out, "inversion"), out


def test_where_nothing_defends_the_image_comes_back(undefended: tuple[dict[str, Any], Path]) -> None:
    told, out = undefended
    got, naive = figure(told, "ssim", map="down0")
    assert got > naive + 0.2
    assert figure(told, "psnr", map="down0")[0] > figure(told, "psnr", map="down0")[1] + 3
    near, far = figure(told, "distance_correlation", map="down0")
    assert near > far + 0.5
    schema = json.loads((Path(concilium.__file__).parent / "leakage.schema.json").read_text())
    Draft202012Validator(schema).validate(json.loads((out / "leakage.json").read_text()))
    assert [p.suffix for p in (out / "pictures").iterdir()] == [".png"]
    kept = {p.suffix for p in (out / "work").rglob("*") if p.is_file()}
    assert kept == {".message", ".jsonl"}, "messages alone are kept: no image and no label map"


def test_a_decoder_that_was_not_trained_finds_nothing(split_run: Path, tmp_path: Path) -> None:
    told = found(split_run, tmp_path, "inversion", options={"inversion": {"steps": 0, "width": 8}})
    got, naive = figure(told, "ssim", map="down0")
    assert got < naive + 0.05


@pytest.mark.slow
def test_the_same_again_to_the_bit(undefended: tuple[dict[str, Any], Path], split_run: Path, tmp_path: Path) -> None:
    assert found(split_run, tmp_path, "inversion") == undefended[0]


@pytest.mark.parametrize("whose", ["a site's folder", "a renamed copy"])
def test_an_attacker_that_has_a_victims_image_is_refused(
    split_run: Path, phantom: Path, tmp_path: Path, whose: str
) -> None:
    import shutil

    folder = phantom / "north"
    if whose == "a renamed copy":  # another name, another file: the same image
        folder = tmp_path / "copy"
        shutil.copytree(phantom / "test", folder)
        theirs = sorted((phantom / "south" / "imagesTr").iterdir())[0]
        ours = sorted((folder / "imagesTr").iterdir())[0]
        label = theirs.name.replace("_0000", "")
        shutil.copyfile(theirs, ours)
        shutil.copyfile(phantom / "south" / "labelsTr" / label, folder / "labelsTr" / ours.name.replace("_0000", ""))
    with pytest.raises(DataError, match="cases of the attacker are victims'"):
        found(split_run, tmp_path / "out", "inversion", auxiliary=str(folder))


def test_a_site_that_attacks_is_no_victim(split_run: Path, tmp_path: Path) -> None:
    told = found(split_run, tmp_path, "reidentify", auxiliary="south")
    assert told["victims"] == ["north"]
    assert told["n_own_cases"] == 8


# -------------------------------------------------------------------------------------------------- what was really sent


def test_what_is_audited_is_what_the_run_sent_and_the_truth_is_what_was_behind_it(
    split_run: Path, small: Make, tmp_path: Path
) -> None:
    """The first step after round 1, as the whole line sends it and as an audit of the kept weights does: equal to the bit."""

    def keeping(**told: Any) -> Any:
        return Keeping(catalog.load("engines", "simulation")(**told), tmp_path / "said")

    run(small("splitfed", cut="shallow"), tmp_path / "run", connect=keeping)
    first = {r.site: r.maps for r in releases(read_transcript(tmp_path / "said")) if (r.round, r.step) == (2, 0)}
    of = subject(split_run, tmp_path, number=1)
    way = split_way(of, None, steps=1)
    again = exchange(of, way, "again")
    assert {r.site for r in again} == first.keys() == {"north", "south"}
    for r in again:
        assert all(torch.equal(a, b) for a, b in zip(r.maps, first[r.site], strict=True))
    truth, _ = truth_of(of, again)
    sender = Sender(of, way)  # the front, as the audit has it for the attacker's cases, gives the same for the truth
    images = list(truth.images.split(2))
    for i, r in enumerate(again):
        from concilium.data.patches import Batch

        own = sender.send(Batch(images[i], (truth.labels[2 * i : 2 * i + 2].unsqueeze(1).short(),)), 9, gradients=True)
        assert all(torch.equal(a, b) for a, b in zip(own.maps, r.maps, strict=True))
        assert len(own.gradients) == len(r.gradients) > 0


def test_the_attackers_cases_travel_as_the_victims_do(small: Make, tmp_path: Path) -> None:
    """With int8 there are at most 255 values in a channel of a map, whosever it is."""
    of = subject(run(small("splitfed", cut="shallow", transport="int8"), tmp_path / "run").folder, tmp_path)
    way = split_way(of, None, steps=1)
    sender = Sender(of, way)
    (mine,) = [sender.send(b, i, gradients=False).maps for i, b in enumerate(own_cases(of, 2))]
    for m in (mine[0], exchange(of, way, "sent")[0].maps[0]):
        assert max(len(m[:, c].unique()) for c in range(m.shape[1])) < 256


def test_a_folder_without_a_transcript_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="holds no transcript"):
        list(read_transcript(tmp_path))


# ------------------------------------------------------------------------------------------------------- cuts and rounds


def test_every_cut_goes_down_stage_by_stage(split_run: Path, tmp_path: Path) -> None:
    cuts = every_cut(subject(split_run, tmp_path))
    assert [first for first, _ in cuts] == ["down0", "encode0", "down1", "encode1", "down2", "encode2"]
    assert dict(cuts)["down1"] == "decode1", "of the cuts after down1 the one that sends no skip, and ends latest"


@pytest.mark.slow
def test_rounds_and_cuts_each_have_their_figures(split_run: Path, tmp_path: Path) -> None:
    told = found(split_run, tmp_path, "reidentify", cuts=("down0,up0", "deep"), rounds=(0, 1))
    places = {(r["round"], r["cut"]) for r in told["rows"]}
    assert places == {(n, cut) for n in (0, 1, 2) for cut in ("down0 up0", "deep")}
    with pytest.raises(StudyError, match="after round 5 were not kept"):
        found(split_run, tmp_path / "other", "reidentify", rounds=(5,))


@pytest.mark.slow
def test_the_other_attacks_run_on_what_they_see(split_run: Path, tmp_path: Path) -> None:
    told = found(
        split_run, tmp_path, "inversion", "inversion_white", "label_inference", "membership", "gradient_inversion",
        options={
            "inversion": {"steps": 1, "width": 4}, "inversion_white": {"steps": 60}, "label_inference": {"steps": 20, "width": 8},
        },
    )  # fmt: skip
    got, naive = figure(told, "ssim", attack="inversion_white")
    assert got > naive + 0.2
    assert {r["attack"]: r["metric"] for r in told["rows"]} | {"": ""} == {
        "": "", "inversion": "psnr", "inversion_white": "psnr", "label_inference": "dice", "membership": "tpr_at_1_fpr",
    }  # fmt: skip
    assert any(note.startswith("gradient_inversion was not run") for note in told["notes"])


def test_updates_are_attacked_where_they_are_sent(federated_run: Path, tmp_path: Path) -> None:
    told = found(federated_run, tmp_path, "gradient_inversion", options={"gradient_inversion": {"steps": 2}})
    assert {r["metric"] for r in told["rows"]} == {"ssim", "psnr"}
    split = found(federated_run, tmp_path / "split", "reidentify", cuts=("shallow",))
    assert {r["cut"] for r in split["rows"]} == {"shallow"}, "what splitfed would send at this cut, of the same weights"


# ------------------------------------------------------------------------------------------------------------- the command


def test_the_command_shows_it_and_the_report_has_it(split_run: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(split_run, folder)
    command = [
        "leakage",
        str(folder),
        "--attack",
        "inversion",
        "--option",
        "inversion.steps=5",
        "--option",
        "inversion.width=4",
    ]
    done = CliRunner().invoke(app, [*command, "--victims", "4", "--own", "4"])
    assert done.exit_code == 0, done.output
    assert "down0" in done.output
    assert "proves nothing" in done.output
    page = (folder / "report.html").read_text()
    assert "What leaks" in page
    assert "anonym" not in (page + done.output).lower()


def test_a_site_audits_itself_alone(small: Make, phantom: Path, tmp_path: Path) -> None:
    from concilium.study import to_toml

    study = replace(small("splitfed", cut="shallow"), test=None)  # of other sites, whose data are not looked at
    (tmp_path / "study.toml").write_text(to_toml(study))
    (tmp_path / "site.toml").write_text(f'data = "{phantom / "north"}"\ntest = "{phantom / "test"}"\n')
    command = ["leakage", str(tmp_path / "study.toml"), "--site", str(tmp_path / "site.toml"), "--attack", "reidentify"]
    done = CliRunner().invoke(app, [*command, "--victims", "4", "--own", "4", "--gallery", "4"])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "leakage" / "small" / "leakage" / "leakage.json").read_text())
    assert told["victims"] == ["own"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attack", "inversoin"], "Did you mean 'inversion'"),
        (["--option", "inversion.stepz=3"], "inversion: stepz = 3 is not known"),
        (["--cut", "down9,up0"], "is not possible. Allowed"),
        (["--auxiliary", "nowhere"], "neither a site"),
    ],
)
def test_what_cannot_be_is_refused(split_run: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["leakage", str(split_run), "--out", str(tmp_path), *arguments])
    assert isinstance(done.exception, StudyError)
    assert said in str(done.exception)


def test_frozen_tensors_are_the_attackers_as_they_are_the_sites(small: Make, split_run: Path, tmp_path: Path) -> None:
    """They are read from the finished model, wherever the run had them from, and updates without them are attacked."""
    study = small("federated")
    training = replace(study.training, tensors=("decoder",))
    study = replace(study, training=training, start=replace(study.start, weights=split_run))
    folder = run(study, tmp_path / "run").folder
    told = found(folder, tmp_path / "out", "gradient_inversion", options={"gradient_inversion": {"steps": 2}})
    assert {r["metric"] for r in told["rows"]} == {"ssim", "psnr"}
    of = subject(folder, tmp_path)
    (sent, *_) = exchange(of, Way("federated", {}, steps=1), "sent")
    assert sent.update
    assert all(n.startswith(("up", "decode", "head")) for n in sent.update)
