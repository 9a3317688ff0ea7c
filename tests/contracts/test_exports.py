"""What every format keeps to (see `concilium.exports`). Its signature: tests/test_catalog.py."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "exports"))

from made import make_run, two_members, write_pictures
from safetensors import safe_open

from concilium import catalog, cli
from concilium.errors import StudyError
from concilium.exports import export_run
from concilium.finished import open_finished

every_format = pytest.mark.parametrize("format", catalog.names("exports"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private_place")
    return make_run(
        folder / "run", write_pictures(folder / "secret_data"), configuration="2d", patch=[32, 32], mirror=True
    )


def content(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_formats_of_the_design_are_there() -> None:
    assert set(catalog.names("exports")) == {"nnunet", "onnx", "monai", "safetensors"}


@every_format
def test_a_model_is_written_with_its_card_and_the_next_command(format: str, run: Path, tmp_path: Path) -> None:
    before = content(run)
    (tmp_path / "out").mkdir()  # an empty folder will do
    folder, after = export_run(run, tmp_path / "out", format=format)
    assert content(run) == before
    assert folder == tmp_path / "out"
    assert not (tmp_path / "out.unfinished").exists()
    assert (folder / "MODEL_CARD.md").read_text().startswith("---\n")
    assert str(folder) in after
    assert "{" not in after
    for path in folder.rglob("*"):  # neither where the data were, nor cases or patients
        if path.is_file():
            assert not re.search(rb"private_place|secret_|/(root|home|tmp)/", path.read_bytes()), path


@every_format
def test_several_members_go_in(format: str, run: Path, tmp_path: Path) -> None:
    finished = two_members(run)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, some in ((one, open_finished(run)), (two, finished)):
        folder.mkdir()
        catalog.load("exports", format)(some, folder, card="", intended_use="")
    size = [sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in (one, two)]
    n_bytes = sum(t.numel() * t.element_size() for t in finished.weights()[0].values())
    assert size[1] - size[0] > 0.9 * n_bytes


@every_format
def test_nothing_is_left_where_it_fails(
    format: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StudyError("Broken. Mended. Mend it.")

    monkeypatch.setattr(inspect.getmodule(catalog.load("exports", format)), "members", fail, raising=False)
    monkeypatch.setattr(inspect.getmodule(catalog.load("exports", format)), "write_torch_file", fail, raising=False)
    with pytest.raises(StudyError, match="Broken"):
        export_run(run, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_hold_the_weights_and_what_they_belong_to(run: Path, tmp_path: Path) -> None:
    folder, _ = export_run(run, tmp_path / "out", format="safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        back = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        about = json.loads(file.metadata()["concilium"])
    (given,) = open_finished(run).weights()
    assert given.keys() == back.keys()
    assert all(torch.equal(given[k], back[k]) for k in given)
    assert about["labels"] == {"background": 0, "polyp": 1}
    assert (about["study"], about["model"], about["channels"]) == ("small", "federated", ["R", "G", "B"])
    assert about["plan"] == hashlib.blake2b((folder / "plans.json").read_bytes(), digest_size=20).hexdigest()
    study, copy = ((f / "study.toml").read_text() for f in (run, folder))
    assert tomllib.loads(copy) | {"sites": None} == tomllib.loads(study) | {"sites": None}
    assert tomllib.loads(copy)["sites"] == {"north": {}}


# ------------------------------------------------------------------------------------------------------------- refused


def test_a_format_that_is_not_there_is_refused_with_the_nearest(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"'nnunet2' is not known\. Did you mean 'nnunet'\? Known: monai, nnunet, onnx"
    ):
        export_run(run, tmp_path / "out", format="nnunet2")


def test_a_folder_in_use_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    for out in (tmp_path, tmp_path / "x"):
        with pytest.raises(StudyError, match="is not empty"):
            export_run(run, out, format="safetensors")
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("federated2", "Did you mean 'federated'"),
        ("local:north", "stay at their sites"),
        ("local", "stay at their sites"),
    ],
)
def test_a_model_that_is_not_there_is_refused(model: str, words: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=words):
        export_run(run, tmp_path / "out", format="safetensors", model=model)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_a_simulated_site_is_exported(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    place = copy / "sites" / "north" / "models" / "local.safetensors"
    place.parent.mkdir(parents=True)
    shutil.copy(copy / "weights" / "federated.safetensors", place)
    folder, _ = export_run(copy, tmp_path / "out", format="safetensors", model="local:north")
    assert "# small: local:north" in (folder / "MODEL_CARD.md").read_text()


def test_a_run_without_results_is_refused_with_the_way_on(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "results.json").unlink()
    with pytest.raises(StudyError, match=r"no results\.json.*--resume"):
        export_run(copy, tmp_path / "out", format="safetensors")


def test_what_is_resized_is_refused_by_nnunet_with_the_formats_that_can(run: Path, tmp_path: Path) -> None:
    resize = {"size": (32, 32), "intensity": "zscore"}
    resized = make_run(tmp_path / "run", run.parent / "secret_data", configuration="2d", resize=resize)
    with pytest.raises(StudyError, match=r"knows no other way.*Export it as onnx, monai or safetensors\."):
        export_run(resized, tmp_path / "nnunet", format="nnunet")
    for format in ("onnx", "monai", "safetensors"):
        assert export_run(resized, tmp_path / format, format=format)[0].is_dir()


@every_format
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_says_what_to_compare_with_where_the_study_computes_otherwise(
    precision: str, format: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = run.parent / "secret_data"
    own = make_run(tmp_path / "run", data, configuration="2d", patch=[32, 32], precision=precision)
    _, after = export_run(own, tmp_path / "out", format=format)
    command, *more = after.splitlines()
    assert "Compare with" not in command
    assert bool(more) == (precision == "bfloat16" and format != "safetensors")
    if more:
        told = more[0].replace("IMAGES", str(data / "imagesTr")).replace("LABEL_MAPS", str(tmp_path / "maps"))
        assert told.startswith("Compare with: concilium predict")
        assert told.endswith("--precision float32")
        monkeypatch.setattr(sys, "argv", told.partition(": ")[2].split())
        with pytest.raises(SystemExit) as e:
            cli.main()
        assert e.value.code == 0
        assert len(list((tmp_path / "maps").iterdir())) == 2


def test_the_command_says_where_it_is_and_what_comes_next(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(run), "-o", str(tmp_path / "out"), "--format", "nnunet", "--intended-use", "Teaching."]
    monkeypatch.setattr(sys, "argv", ["concilium", *arguments])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    assert f"nnunet:{tmp_path}/out" in shown
    assert f"Next:nnUNetv2_predict_from_modelfolder-iIMAGES-oSEGMENTATIONS-m{tmp_path}/out-f0" in shown
    assert "Teaching." in (tmp_path / "out" / "MODEL_CARD.md").read_text()
