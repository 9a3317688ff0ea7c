"""What the documents say is true of the program."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from concilium.study import parse_study, read_study

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("decisions/*.md")]
)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_study_files_in_documents_are_valid(path: Path) -> None:
    for block in blocks(path, "toml"):
        parse_study(tomllib.loads(block), folder=ROOT, check_data=False)


@pytest.mark.parametrize("path", sorted(ROOT.glob("studies/*.toml")), ids=lambda p: p.name)
def test_preset_studies_are_valid(path: Path) -> None:
    assert read_study(path, check_data=False).study.name == path.stem


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_notebook_is_clean_and_its_links_lead_somewhere() -> None:
    """Nothing that was shown once is kept: it would be of another machine, and of another state of the code."""
    (path,) = ROOT.glob("docs/*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [c for c in cells if c.get("outputs") or c.get("execution_count")]
    text = "".join("".join(c["source"]) for c in cells)
    targets = re.findall(r"\]\(([^)#\s]+)\)", text)
    assert "get-started.md" in targets
    assert not [t for t in targets if not (path.parent / t).exists()]


def test_the_index_lists_every_page() -> None:
    docs = ROOT / "docs"
    listed = set(re.findall(r"\]\(([^)#\s]+)\)", (docs / "README.md").read_text(encoding="utf-8")))
    pages = {p.relative_to(docs).as_posix() for pattern in ("**/*.md", "*.ipynb") for p in docs.glob(pattern)}
    assert pages - {"README.md"} <= listed


@pytest.mark.parametrize("number", ["2503.02549", "2503.20830", "2301.07074", "2208.10553", "2403.05408"])
def test_the_papers_that_set_the_aims_can_be_found(number: str) -> None:
    """By the same full title and the same number, in the README and in the citation file."""
    url = f"https://arxiv.org/abs/{number}"
    entries = (ROOT / "CITATION.cff").read_text(encoding="utf-8").split("\n  - type: ")[1:]
    (entry,) = (e for e in entries if f'url: "{url}"' in e)
    (title,) = re.findall(r'^    title: "(.+)"$', entry, re.MULTILINE)
    assert len(title.split()) > 5, "the title, not the short name of the method"
    assert f"arXiv:{number}" in entry
    assert len(re.findall("family-names: .*\n +given-names: ", entry)) == entry.count("family-names") > 0
    (row,) = (line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if url in line)
    assert title in row
    assert f"[arXiv:{number}]({url})" in row


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_documents_exist(path: Path) -> None:
    from concilium.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    code = "\n".join(re.findall(r"^ {4}(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    for command in re.findall(r"(?:^|\s|/)concilium (\w+)", code):
        assert command in known, command


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    readme, ci = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^ {4}\./test ", readme, re.MULTILINE)
    assert re.search(r"^\./test", ci, re.MULTILINE)
