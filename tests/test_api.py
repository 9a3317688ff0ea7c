"""`import concilium`: what the commands do, with tables in place of text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import concilium as cc
from concilium import api, cli
from concilium.data.check import Checked
from concilium.errors import DataError, StudyError

ROOT = Path(__file__).parents[1]
COMMANDS = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
COLUMNS = ["severity", "code", "site", "case", "text", "fix", "safe"]
COMMANDS_ALONE = {"demo", "provision", "serve", "join"}


def command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["concilium", *map(str, arguments)])
        with pytest.raises(SystemExit) as e:
            cli.main()
    return int(e.value.code or 0)


def test_every_command_is_a_function_too_or_said_to_be_none() -> None:
    functions = {name for name in cc.__all__ if name.islower()} | {name for name in vars(cc.Run) if name[0] != "_"}
    assert COMMANDS - functions == COMMANDS_ALONE
    (said,) = re.findall(
        r"^What the commands do.*?\n\n", (ROOT / "docs/python.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert set(re.findall(r"`(?:concilium )?(\w+)`", said)) >= COMMANDS_ALONE


def test_importing_brings_neither_torch_nor_pandas() -> None:
    """In a process of its own: what other tests imported does not count."""
    slow = "{'torch', 'pandas', 'numpy', 'scipy', 'nnunetv2', 'monai'}"
    code = f"import sys, concilium as cc; cc.check, cc.evaluate; sys.exit(' '.join({slow} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------------------- check


@pytest.fixture
def damaged(phantom: Path, tmp_path: Path) -> Path:
    """Sites north and south, of which north has a file that cannot be read."""
    for site in ("north", "south"):
        shutil.copytree(phantom / site, tmp_path / "data" / site)
    sorted((tmp_path / "data" / "north" / "imagesTr").iterdir())[0].write_bytes(b"nothing")
    return tmp_path / "data"


def test_findings_are_a_table(damaged: Path, phantom: Path, tmp_path: Path) -> None:
    folders = [str(damaged / "north"), str(damaged / "south")]
    checked = cc.check(folders, test=str(phantom / "test"))
    assert list(checked.findings) == COLUMNS
    bad = checked.findings[checked.findings["code"] == "unreadable"]
    assert list(bad["severity"]) == ["error"]
    assert list(bad["site"]) == ["north"]
    assert list(checked.counts) == ["cases", "errors", "warnings", "notes"]
    assert list(checked.counts.index) == ["north", "south", "test"]
    assert checked.counts["errors"].to_dict() == {"north": 1, "south": 0, "test": 0}
    assert int(checked.counts[["errors", "warnings", "notes"]].to_numpy().sum()) == len(checked.findings)
    assert checked.counts.loc["south", "cases"] == len(list((damaged / "south" / "labelsTr").iterdir()))
    assert checked.exit_code == 3
    checked.write(tmp_path / "python.json")
    assert command("check", *folders, "--test", phantom / "test", "--json", tmp_path / "command.json") == 3
    assert (tmp_path / "python.json").read_text() == (tmp_path / "command.json").read_text()
    assert set(json.loads((tmp_path / "python.json").read_text())["findings"][0]) == set(COLUMNS)


def test_changes_are_a_table(phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom / "north", tmp_path / "north")
    about = json.loads((tmp_path / "north" / "dataset.json").read_text())
    (tmp_path / "north" / "dataset.json").write_text(json.dumps(about | {"numTraining": 99}))
    changes = cc.check(tmp_path / "north", fix=tmp_path / "mended").changes
    assert changes.to_dict("records")[0].items() >= {"data_set": "north", "code": "case_count", "case": None}.items()
    assert list(cc.check(phantom / "north").changes) == ["data_set", "code", "case", "file", "text"]


def test_a_study_is_checked_as_a_file_and_as_mappings(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study: dict[str, Any] = {
        "study": {"name": "small"},
        "sites": {"north": {"data": "north"}, "south": {"data": "south"}},
        "protocol": {"rounds": 1, "steps": 1},
    }
    (damaged / "study.toml").write_text(
        '[study]\nname = "small"\n[sites]\nnorth = { data = "north" }\nsouth = { data = "south" }\n'
        "[protocol]\nrounds = 1\nsteps = 1\n"
    )
    monkeypatch.chdir(damaged)
    for what in (study, "study.toml", damaged / "study.toml", ["study.toml"], [damaged / "north", damaged / "south"]):
        assert cc.check(what).counts["errors"].to_dict() == {"north": 1, "south": 0}
    with pytest.raises(StudyError, match="Study small says of no site"):
        cc.check(study | {"sites": {"north": {}}, "engine": {"name": "flare"}})
    with pytest.raises(StudyError, match="is no data set"):
        cc.check(["north", "nowhere"])


def test_nothing_found_is_a_table_too() -> None:
    checked = cc.Check(Checked({"north": 3}, ()))
    assert len(checked.findings) == 0
    assert list(checked.findings) == COLUMNS
    assert checked.counts.to_dict("index") == {"north": {"cases": 3, "errors": 0, "warnings": 0, "notes": 0}}
    assert checked.exit_code == 0


# ------------------------------------------------------------------------------------------------------------ evaluate


def test_scores_are_tables(phantom: Path, tmp_path: Path) -> None:
    """References against themselves, and one case that only they have."""
    reference, predictions = phantom / "test" / "labelsTr", tmp_path / "predictions"
    shutil.copytree(reference, predictions)
    missing = sorted(predictions.iterdir())[0]
    missing.unlink()
    scores = cc.evaluate(str(predictions), str(reference), labels=str(phantom / "test" / "dataset.json"))
    assert set(scores.cases["label"]) == {"organ", "lesion"}
    assert set(scores.cases["dice"]) == {1.0}
    assert scores.cases["case"].nunique() == 2
    dice = scores.summary[scores.summary["metric"] == "dice"].set_index("label")
    assert dice["mean"].to_dict() == {"organ": 1.0, "lesion": 1.0, "foreground_mean": 1.0}
    assert [case for case, _ in scores.problems] == [missing.name.removesuffix(".nii.gz")]
    assert scores.warnings == ()
    assert scores.exit_code == 4
    for name in ("scores.json", "scores.csv"):
        scores.write(tmp_path / name)
        assert command("evaluate", "-p", predictions, "-r", reference, "--out", tmp_path / f"command-{name}") == 4
        assert (tmp_path / name).read_text() == (tmp_path / f"command-{name}").read_text()
    with pytest.raises(DataError, match="is no folder"):
        cc.evaluate(tmp_path / "none", reference)


# ----------------------------------------------------------------------------------------------------------- run folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "study.toml").write_text("")
    (tmp_path / "results.json").write_text(json.dumps({"complete": True, "problems": []}))
    return tmp_path


def test_what_is_no_run_folder_is_refused_at_once(tmp_path: Path) -> None:
    for make in (cc.Run, cc.open_run):
        with pytest.raises(StudyError, match=r"is no run folder: it has no study\.toml"):
            make(tmp_path)


def test_a_run_without_results_says_how_to_go_on(folder: Path) -> None:
    (folder / "results.json").unlink()
    assert cc.Run(folder).report_file.name == "report.html"  # what needs no results works
    for read in (lambda: cc.Run(folder).complete, lambda: cc.open_run(folder)):
        with pytest.raises(StudyError, match=r"no results\.json.*--resume"):
            read()


def test_results_are_read_once_until_they_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    loads = json.loads

    def counted(text: str, **options: Any) -> Any:
        read.append(text)
        return loads(text, **options)

    monkeypatch.setattr(json, "loads", counted)
    run = cc.open_run(folder)
    assert (run.complete, run.exit_code, run.problems, run.results is run.results) == (True, 0, (), True)
    assert len(read) == 1
    (folder / "results.json").write_text(json.dumps({"complete": False, "problems": ["north: lost"]}))
    assert (run.exit_code, run.problems) == (4, ("north: lost",))
    assert len(read) == 2
    assert run == cc.open_run(folder)


# ---------------------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize(
    ("of", "name", "arguments"),
    [
        (api, "run", ["run", "study.toml"]),
        (api, "check", ["check", "study.toml"]),
        (api, "plan", ["plan", "study.toml"]),
        (api, "evaluate", ["evaluate", "-p", "p", "-r", "r"]),
        (api, "table", ["table", "."]),
        (cc.Run, "predict", ["predict", ".", "-i", "i", "-o", "o"]),
        (cc.Run, "export", ["export", ".", "-o", "o", "--format", "onnx"]),
        (api, "report", ["report", "."]),
        (api, "tensorboard", ["report", ".", "--tensorboard"]),
    ],
)
def test_a_command_calls_its_function(
    of: Any,
    name: str,
    arguments: list[str],
    phantom: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the function raises ends the command: nothing goes round it."""

    def refuse(*_: object, **__: object) -> None:
        raise StudyError("by design")

    (tmp_path / "study.toml").write_text(
        f'[study]\nname = "small"\n[sites.north]\ndata = "{phantom / "north"}"\n[protocol]\nrounds = 1\nsteps = 1\n'
    )
    if name == "tensorboard":
        monkeypatch.setattr(api, "report", lambda *_: tmp_path)
    monkeypatch.setattr(of, name, refuse)
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    assert "by design" in capsys.readouterr().err
