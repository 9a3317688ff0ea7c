"""Every command that is written down can be given: it is parsed by what would parse it, and not run.

So that a misspelt option is found also where a command takes minutes, needs several machines, or stands in a benchmark's page,
a decision or the head of a study. What can be run is run besides (`test_documents_run.py`).
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer.main

from concilium.cli import app

ROOT = Path(__file__).parents[1]
STUDIES = sorted(ROOT.glob("studies/*.toml"))
PLACES = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("decisions/*.md"), *STUDIES
]  # fmt: skip
OURS = re.compile(r"(?:^|&&) *(?:\.venv/bin/)?(?:concilium|python) \S")
COMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})


def indented(path: Path) -> Iterator[str]:
    """Commands on lines of their own: indented by four spaces on a page, in the comment at the head of a study."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    margin = "# +" if path.suffix == ".toml" else " {4}"
    for line in re.findall(rf"^{margin}(\S.*)$", text, re.MULTILINE):
        if OURS.search(line):
            said = " ".join(shlex.split(line, comments=True, posix=False))
            yield from (c.strip().removeprefix(".venv/bin/") for c in said.split("&&") if OURS.search(c))


def in_sentences(path: Path) -> Iterator[str]:
    """Commands between backticks, of which the rest may be left out."""
    text = path.read_text(encoding="utf-8")
    yield from (said for said in re.findall(r"`(concilium \w[^`]*)`", text) if said.split()[1] != "for")


# ------------------------------------------------------------------------------------------------------------- parsing it


class Parsed(Exception):
    """Everything up to here could be read."""


def parse(command: str) -> None:
    """As a shell would give it."""
    program, first, *arguments = shlex.split(command)
    for named in (a for a in arguments if a.startswith("studies/")):
        assert (ROOT / named).is_file(), named
    if program == "concilium":
        assert first in COMMANDS, f"There is no concilium {first}."
        with COMMANDS[first].make_context(first, arguments):
            pass
    elif first == "-m":
        assert arguments[0] in ("pytest", "venv"), command
        assert all((ROOT / a).exists() for a in arguments[1:] if arguments[0] == "pytest" and a[0] != "-"), command
    else:
        parse_script(ROOT / first, arguments)


def parse_script(script: Path, arguments: list[str]) -> None:
    """Start a script and stop it where it has read its arguments."""
    read = argparse.ArgumentParser.parse_args

    def only_read(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.allow_abbrev = False
        raise Parsed(read(parser, arguments))

    assert script.is_file(), script
    if "argparse" not in script.read_text(encoding="utf-8"):
        assert not arguments, f"{script.name} takes none."
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", only_read)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


def options(command: str) -> set[str]:
    """All that a command of ours knows."""
    assert command in COMMANDS, f"There is no concilium {command}."
    return {spelt for p in COMMANDS[command].params for spelt in (*p.opts, *p.secondary_opts)}


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize(
    "command", sorted({c for path in PLACES for c in indented(path) if not re.match("python3? -m venv", c)})
)
def test_a_command_can_be_given(command: str) -> None:
    parse(command)


@pytest.mark.parametrize("command", sorted({c for path in PLACES for c in in_sentences(path)}))
def test_a_command_in_a_sentence_exists_and_its_options_do(command: str) -> None:
    _, name, *rest = command.split()
    assert {word for word in rest if word[0] == "-"} <= options(name)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.name)
def test_the_head_of_a_study_says_how_to_run_it(path: Path) -> None:
    assert list(indented(path)) == [f"concilium run studies/{path.name} --out runs/{path.stem}"]


def test_the_places_where_commands_stand_are_looked_at() -> None:
    """One command of each kind of place."""
    found = {path.relative_to(ROOT).as_posix(): list(indented(path)) for path in PLACES}
    assert "concilium demo" in found["README.md"]
    assert (
        "concilium join kits/north --data /data/hippocampus --threads 8 --split" in found["docs/between-hospitals.md"]
    )
    assert len(found["benchmarks/README.md"]) >= 6
    assert "concilium serve ... --resume" in in_sentences(ROOT / "docs/between-hospitals.md")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("concilium join kits/north --thread 8", "No such option: --thread"),
        ("concilium join kits/north --threads many", "valid int"),
        ("concilium serve kits/server", "Missing parameter: study"),
        ("concilium provision study.toml --out kits", "Missing parameter: host"),
        ("concilium rum study.toml", "no concilium rum"),
        ("concilium run studies/none.toml", "studies/none.toml"),
        ("python benchmarks/none.py", "none.py"),
        ("python docs/make_reference.py --all", "takes none"),
        ("python -m pytest tests/none", "tests/none"),
    ],
)
def test_what_cannot_be_given_is_found(command: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        parse(command)


@pytest.mark.parametrize("arguments", ["--size large", "--sise 8", "--repeat 3"])
def test_what_a_benchmark_does_not_know_is_found(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"python benchmarks/metrics.py {arguments}")
    assert arguments.split()[0] in capsys.readouterr().err
