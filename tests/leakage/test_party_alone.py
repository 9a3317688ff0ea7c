"""A party of a vertical study audits what it would send, on its own cases, with nothing of the others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from concilium.cli import app
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.errors import StudyError
from concilium.study import Study, parse_study, to_toml

QUICK = ["--option", "inversion.steps=20", "--option", "inversion.width=4", "--option", "inversion_white.steps=20"]
FEW = ["--victims", "4", "--own", "8", "--gallery", "4"]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequences")
    write_sequences(folder, n_cases=6, n_test=4, size=16)
    return folder


@pytest.fixture(scope="module")
def study(sequences: Path) -> Study:
    raw = {
        "study": {"name": "together", "seed": 3},
        "sites": {name: {"data": str(sequences / name), "holds": [name]} for name in SEQUENCES},
        "protocol": {"name": "vertical", "labels": "first", "cut": "shallow", "rounds": 20, "steps": 20, "drop": 0.2},
        "network": {"name": "unet", "base_features": 4, "levels": 2},
        "training": {"optimizer": "sgd", "batch_size": 2, "patch_size": [8, 16, 16], "mirror": False},
        "variants": {"short": {"protocol": {"parties": ["second"]}}},
    }
    return parse_study(raw, folder=sequences)


def of_hospitals(study: Study, folder: Path) -> Path:
    """The study file as one site has it: the others' data are not there."""
    sites = {name: replace(site, data=Path("elsewhere")) for name, site in study.sites.items()}
    (folder / "study.toml").write_text(to_toml(replace(study, sites=sites, test=None)))
    return folder / "study.toml"


def images_only(source: Path, target: Path, channel: int = 0) -> Path:
    """A site's own copy, without label maps: one channel of its images, called as the site does."""
    (target / "imagesTr").mkdir(parents=True)
    for path in (source / "imagesTr").glob(f"*_{channel:04d}.nii.gz"):
        shutil.copyfile(path, target / "imagesTr" / path.name.replace(f"_{channel:04d}", "_0000"))
    about = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps(about | {"channel_names": {"0": "mine"}}))
    return target


def audited(study: Study, folder: Path, data: Path, test: Path, *arguments: str, names: str = "") -> dict[str, Any]:
    (folder / "site.toml").write_text(f'data = "{data}"\ntest = "{test}"\n{names}')
    command = ["leakage", str(of_hospitals(study, folder)), "--site", str(folder / "site.toml"), *arguments]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    told: dict[str, Any] = json.loads((folder / "leakage/together/leakage/leakage.json").read_text())
    return told


def test_a_party_without_labels_sees_what_its_maps_give_away(study: Study, sequences: Path, tmp_path: Path) -> None:
    data = images_only(sequences / "second", tmp_path / "data")
    test = images_only(sequences / "test", tmp_path / "test", channel=SEQUENCES.index("second"))
    told = audited(study, tmp_path, data, test, *FEW, *QUICK, names='channel_names = { mine = "second" }\n')
    assert told["victims"] == ["second"]
    rows = told["rows"]
    assert {row["round"] for row in rows} == {0}
    assert {row["site"] for row in rows} == {"second"}
    assert {row["attack"] for row in rows} == {"", "inversion", "inversion_blind", "inversion_white", "reidentify"}
    white = [r for r in rows if (r["attack"], r["metric"]) == ("inversion_white", "ssim")]
    assert white
    assert all(r["n"] >= 4 for r in white)
    notes = "\n".join(told["notes"])
    assert (
        "label_inference was not run: gradients come of a loss that needs the other parties' maps and the labels"
        in notes
    )
    assert "labels_from_maps was not run: there are no labels here" in notes
    assert "Attacked were the maps of the first round" in notes


def test_a_front_that_stays_is_attacked_by_whoever_does_not_know_it(
    study: Study, sequences: Path, tmp_path: Path
) -> None:
    data = images_only(sequences / "second", tmp_path / "data")
    test = images_only(sequences / "test", tmp_path / "test", channel=SEQUENCES.index("second"))
    options = {**study.protocol.options, "fronts": "stay", "new_patients": True, "incomplete": True}
    stays = replace(study, protocol=replace(study.protocol, options=options), variants={})
    told = audited(stays, tmp_path, data, test, *FEW, *QUICK, names='channel_names = { mine = "second" }\n')
    assert {row["attack"] for row in told["rows"]} == {"", "inversion", "inversion_blind", "reidentify"}
    assert any(note.startswith("inversion_white was not run: it needs the weights") for note in told["notes"])


def test_whoever_has_the_labels_sees_what_its_maps_tell_of_them(study: Study, sequences: Path, tmp_path: Path) -> None:
    test = tmp_path / "test"
    shutil.copytree(sequences / "test", test)
    attacks = ["--attack", "labels_from_maps", "--option", "labels_from_maps.steps=20", "--attack", "label_inference"]
    told = audited(study, tmp_path, sequences / "first", test, *FEW, *attacks)
    assert told["victims"] == ["first"]
    assert {row["attack"] for row in told["rows"]} == {"", "labels_from_maps"}
    assert any(note.startswith("label_inference was not run") for note in told["notes"])


@pytest.mark.parametrize(
    ("settings", "arguments", "said"),
    [
        ('data = "{first}"\n', [], "names no test set"),
        ('data = "{test}"\ntest = "{test}"\n', [], "which are those of first, second, third in the study"),
        (
            'data = "{first}"\ntest = "{test}"\n',
            ["--predicting"],
            "--predicting was asked for. A party alone has its front",
        ),
        ('data = "{first}"\ntest = "{test}"\n', ["--compare"], "--compare was asked for"),
    ],
)
def test_what_a_party_alone_cannot_tell(
    settings: str, arguments: list[str], said: str, study: Study, sequences: Path, tmp_path: Path
) -> None:
    where = {name: sequences / name for name in ("first", "test")}
    (tmp_path / "site.toml").write_text(settings.format(**where))
    command = ["leakage", str(of_hospitals(study, tmp_path)), "--site", str(tmp_path / "site.toml"), *arguments]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, StudyError)
    assert said in str(done.exception)
