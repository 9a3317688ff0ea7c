"""The command line: help, exit codes, and what is shown where something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import concilium.api
import concilium.deployment
import concilium.line
from concilium import cli
from concilium.errors import ContractError, DataError, EngineError, PrivacyError, StudyError

Command = Callable[..., tuple[int, str, str]]
COMMANDS = sorted(c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback)
STUDY = """
[study]
name = "small"
[sites.north]
data = "n"
[protocol]
rounds = 1
steps = 1
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("run", ...)`: exit code, what is on stdout, what is on stderr."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["concilium", *arguments])
        with pytest.raises(SystemExit) as e:
            cli.main()
        shown = capsys.readouterr()
        assert isinstance(e.value.code, int)
        return e.value.code, shown.out, shown.err

    return run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study file whose data are there, as far as reading it goes."""
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "dataset.json").write_text("{}")
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path / "study.toml"


# ---------------------------------------------------------------------------------------------------------------- help


def test_help_of_every_command_comes_without_torch() -> None:
    """In a process of its own: what other tests imported does not count."""
    code = f"""
import sys
from concilium import cli
for arguments in [["--help"], *[[name, "--help"] for name in {COMMANDS}]]:
    try:
        cli.app(arguments)
    except SystemExit as e:
        assert e.code == 0, arguments
for package in ("torch", "nnunetv2", "monai", "scipy", "numpy", "pandas", "SimpleITK"):
    assert package not in sys.modules, package
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"concilium {name}" in re.sub(r"\s+", " ", done.stdout) or f" {name} " in done.stdout


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "concilium", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "without moving an image" in " ".join(done.stdout.split())


def test_every_command_and_option_says_what_it_does(command: Command) -> None:
    assert {"demo", "predict", "run"} <= set(COMMANDS)
    code, out, _ = command("--help")
    assert code == 0
    for name in COMMANDS:
        assert re.search(rf"\b{name}\s+\w+", out), f"{name} has no sentence in the list"
        code, shown, _ = command(name, "--help")
        assert code == 0
        options = re.findall(r"^\W*(--?[a-z][\w-]*.*)$", shown, re.MULTILINE)
        assert options
        for line in options:
            assert len(re.findall(r"[A-Za-z]{2,}", line)) >= 3, f"{name}: {line}"


def test_without_a_command_help_is_shown(command: Command) -> None:
    code, out, err = command()
    assert code in (0, 2)
    assert "demo" in out + err


# ---------------------------------------------------------------------------------------------------------- exit code 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument"),
        (["run", "a.toml", "--outt", "x"], "No such option: --outt"),
        (["predict", "run", "-i", "images"], "Missing option '-o'"),
    ],
)
def test_a_wrong_command_ends_with_2(arguments: list[str], words: str, command: Command) -> None:
    code, out, err = command(*arguments)
    assert code == 2
    assert words in err
    assert out == ""


def test_a_wrong_study_ends_with_2_and_lists_every_error(command: Command, study: Path) -> None:
    study.write_text(STUDY.replace("rounds", "rouns") + '[network]\nname = "nnunett"\n[sites.test]\ndata = "none"\n')
    code, out, err = command("run", str(study))
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == f"Error: {study} has 5 errors:"
    assert [line.split(" ", 4)[3] for line in lines[1:]] == ["[protocol]"] * 2 + [
        "[network]",
        "[sites.test]",
        "[sites.test]",
    ]
    assert not (Path.cwd() / "runs" / "small").exists()


def test_lines_are_not_broken(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path or a word of a message can be searched for in a log, however narrow the terminal was."""
    monkeypatch.setenv("COLUMNS", "40")
    missing = tmp_path / ("long-" * 20) / "no such study.toml"
    _, _, err = command("run", str(missing))
    assert f"Error: The study file {missing} cannot be read (No such file or directory)." in err


def test_a_missing_study_ends_with_2(command: Command, tmp_path: Path) -> None:
    code, _, err = command("run", str(tmp_path / "none.toml"))
    assert code == 2
    assert "cannot be read (No such file or directory)" in err
    assert "Traceback" not in err


def test_a_folder_that_holds_a_run_ends_with_2(command: Command, study: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.toml").write_text("")
    code, _, err = command("run", str(study), "--out", str(tmp_path / "run"))
    assert code == 2
    assert "already holds a run" in err


def test_predicting_without_a_run_folder_ends_with_2(command: Command, tmp_path: Path) -> None:
    code, out, err = command("predict", str(tmp_path / "none"), "-i", str(tmp_path), "-o", str(tmp_path / "out"))
    assert code == 2
    assert "none is no run folder: it has no study.toml" in err
    assert out == ""
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- other exit codes


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(concilium.api, "run", run)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StudyError("s"), 2),
        (DataError("d"), 3),
        (EngineError("e"), 4),
        (PrivacyError("p"), 5),
        (ContractError("c"), 70),
    ],
)
def test_each_of_our_errors_has_its_exit_code(
    error: Exception, code: int, command: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, error)
    got, _, err = command("run", str(study))
    assert got == code
    assert err.strip() == f"Error: {error}"


def test_a_fault_of_ours_ends_with_70_and_its_traceback(
    command: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, ZeroDivisionError("[bold]1/0[/bold]"))
    code, _, err = command("run", str(study))
    assert code == 70
    assert "Traceback" in err
    assert "ZeroDivisionError: [bold]1/0[/bold]" in err, "the text of an error is no markup"
    assert "fault of Concilium" in err


def test_a_run_that_is_stopped_says_how_to_go_on(
    command: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    code, _, err = command("run", str(study), "--out", "runs/mine")
    assert code == 130
    assert "concilium run runs/mine/study.toml --out runs/mine --resume" in err


@pytest.mark.parametrize("code", [0, 4])
def test_a_run_shows_its_table_and_ends_as_the_run_did(
    code: int, command: Command, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    model = {
        "name": "federated",
        "updates": 60,
        "patches": 120,
        "seconds": 12.4,
        "sites": {"north": {"bytes_up": 2_500_000}},
    }
    row = {
        "model": "federated",
        "site": "north",
        "subset": "validation",
        "label": "liver",
        "metric": "dice",
        "mean": 0.8125,
    }
    results = {
        "models": [model],
        "summary": [row | {"n": 7}],
        "excluded": [{"site": "north", "case": "c1", "text": "c1 is empty."}],
        "warnings": ["No test set."],
        "problems": ["south: lost"] if code else [],
    }

    def run(read: Any, out: Path, *, resume: bool, watch: Callable[[Any], None]) -> Any:
        given.update(study=read, out=out, resume=resume)
        watch(SimpleNamespace(kind="warning", text="federated, round 1: [north] lost"))
        return SimpleNamespace(folder=out, results=results, exit_code=code, report_file=out / "report.html")

    monkeypatch.setattr(concilium.api, "run", run)
    got, out, err = command("run", str(study), "--out", str(tmp_path / "run"), "--resume")
    assert got == code
    assert (given["study"].study.name, given["out"], given["resume"]) == ("small", tmp_path / "run", True)
    assert "0.812" in out
    assert re.search(r"federated\W+60\W+120\W+12\W+2\.5", out)
    assert f"Run folder: {tmp_path / 'run'}" in out
    assert "Excluded: north, case c1: c1 is empty." in err
    assert "Note: No test set." in err
    assert "Warning: federated, round 1: [north] lost" in err
    assert ("Not as asked: south: lost" in err) == (code == 4)


def test_between_hospitals_the_table_shows_no_figure_of_few(
    command: Command, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"subset": "validation", "label": "liver", "metric": "dice", "model": "federated"}
    rows = [("north", 0.8, 8), ("tiny", 0.4242, 3), ("all", 0.6975, 11)]
    results = {
        "models": [
            {"name": "federated", "updates": 1, "patches": 1, "seconds": 1.0, "sites": {"north": {"bytes_up": 1}}}
        ],
        "summary": [
            about | {"site": site, "mean": mean, "n": n, "ci_low": None, "ci_high": None} for site, mean, n in rows
        ],
        "comparisons": [],
        "excluded": [{"site": "tiny", "case": None, "reason": "unreadable", "text": None, "count": 2}],
        "warnings": ["tiny: 2 cases set aside (unreadable)."],
        "problems": [],
    }
    (tmp_path / "study.toml").write_text(STUDY + '[engine]\nname = "flare"\n')
    outcome = SimpleNamespace(folder=tmp_path, results=results, exit_code=0, report_file=tmp_path / "report.html")
    monkeypatch.setattr(concilium.api, "run", lambda *_, **__: outcome)
    code, out, err = command("run", str(study))
    assert code == 0
    assert "0.800" in out
    assert "0.424" not in out
    assert "0.69" not in out
    assert "n < 5" in out
    assert "not shown" in out
    assert "Excluded: tiny, 2 × unreadable" in err


@pytest.mark.parametrize("seeds", [None, 3])
def test_a_study_between_hospitals_takes_seeds_too(
    seeds: int | None, command: Command, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `run`; and what goes on after a stop asks for them again."""
    given: list[int] = []

    def serve(kit: Path, read: Any, out: Path, **_: Any) -> Any:
        given.append(read.study.seeds)
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "concilium.deployment.serve", SimpleNamespace(serve=serve))
    monkeypatch.setattr(concilium.deployment, "require_flare", lambda: None)
    code, _, err = command("serve", "kit", str(study), *(["--seeds", str(seeds)] if seeds else []))
    assert (code, given) == (130, [seeds or 1])
    assert f"--out runs/small{' --seeds 3' if seeds else ''} --resume" in err


def test_a_folder_that_is_no_run_ends_with_2(command: Command, tmp_path: Path) -> None:
    code, _, err = command("export", str(tmp_path), "-o", str(tmp_path / "out"), "--format", "onnx")
    assert code == 2
    assert f"{tmp_path} is no run folder: it has no study.toml" in err


def test_a_run_goes_to_a_folder_of_its_name(command: Command, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Path] = []

    def run(read: Any, out: Path, **_: Any) -> Any:
        given.append(out)
        raise EngineError("enough")

    monkeypatch.setattr(concilium.api, "run", run)
    command("run", str(study))
    assert given == [Path("runs/small")]
