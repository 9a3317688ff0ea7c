"""Every command and block in README and docs runs: each page in a folder of its own, in process, on the built-in phantom.

How a page is read, in its order:

- A line that is indented by four spaces is a command. `&&` joins several.
- A ```toml block is the page's study from there on (study.toml). A study that no later command runs is run.
- A ```python block is executed; blocks of a page share their names.
- A ```toml site.toml block holds a site's settings, a ```json dataset.json block describes a data set: read as such.
- Any other block (```text, or without a word) is shown, not done.

Commands that are not run here (`ELSEWHERE`) are parsed, as all are, by `test_documents_commands.py`.

What makes it quick, and nothing else: the data (`lay_out`) and the sizes of a study (`shrunk`).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import concilium.demo
import concilium.study.reading
from concilium import api, catalog, cli
from concilium.data._description import read_description
from concilium.data.phantom import PhantomSite, write_phantom
from concilium.deployment.kits import read_settings
from concilium.errors import DataError, StudyError

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/*.ipynb")])
ELSEWHERE = {
    r"concilium (provision|serve|join)\b": "starts FLARE's processes: tests/deployment/test_federation.py",
    r"python3? -m venv |\.venv/bin/pip install -c constraints\.txt \.$": "fetches packages: .ci/run installs as it says",
    r"pip install ": "fetches packages: .ci/run installs with every extra",
    r"\./test\b|ruff |python -m pytest|\. \.venv/bin/activate": "the tests themselves: .ci/run",
    r"python benchmarks/": "takes minutes: tests/test_benchmarks.py runs each with small numbers",
    r"python docs/make_reference\.py": "writes into the repository: tests/test_reference.py compares what it makes",
}
"""Start of a command that is not run here -> why, and where it is."""
BLOCK_OR_COMMAND = re.compile(r"^```([^\n]*)\n(.*?)^```$|^ {4}(\S[^\n]*)$", re.DOTALL | re.MULTILINE)
SLOW = {
    "README.md",
    "docs/compare-methods.md",
    "docs/explanation/local-updates.md",
    "docs/first-federation.ipynb",
    "docs/get-started.md",
    "docs/measured.md",
    "docs/networks.md",
}
LABELS = {"organ": "anterior", "lesion": "posterior"}
"""The phantom's labels are called as in the pages' examples."""
SITES = ("north", "south", "west")
STUDY = """
[study]
name = "hippocampus"
[sites.north]
data = "data/north"
[sites.south]
data = "data/south"
[test]
data = "data/test"
[protocol]
rounds = 1
steps = 1
compare = ["local"]
"""
"""The study of pages that have none of their own."""


# ---------------------------------------------------------------------------------------------------------- what a page says


def steps(path: Path) -> Iterator[tuple[str, str]]:
    """Kind (`command`, `toml`, `python`, ...) and text of everything on a page that is done, in its order."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        yield from (("python", "".join(c["source"])) for c in json.loads(text)["cells"] if c["cell_type"] == "code")
        return
    for part in BLOCK_OR_COMMAND.finditer(text):
        kind, block, command = part.groups()
        if command:
            line = " ".join(shlex.split(command, comments=True, posix=False))
            yield from (("command", c.strip().removeprefix(".venv/bin/")) for c in line.split("&&"))
        else:
            yield kind.strip() or "text", block


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def elsewhere(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in ELSEWHERE)


# -------------------------------------------------------------------------------------------------------- smaller, so quicker


def shrunk(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a study, made quick: one round of 2 steps, at most 2 folds and seeds, 4 features, small patches, one thread,
    no mirroring, float32.
    """
    tables = {key: dict(table) if isinstance(table, Mapping) else table for key, table in raw.items()}
    network, training, validation = (tables.setdefault(key, {}) for key in ("network", "training", "validation"))
    protocol = tables["protocol"]
    protocol["rounds"] = 1
    protocol["steps"] = min(protocol.get("steps", 2), 2)
    protocol.pop("epochs", None)
    flat = tables.get("plan", {}).get("configuration") == "2d"
    training |= {
        "batch_size": 2,
        "mirror": False,
        "precision": "float32",
        "patch_size": [16, 16] if flat else [16, 16, 8],
    }
    if "base_features" in catalog.options("networks", network.get("name", "nnunet")):
        network["base_features"] = 4
    validation["folds"] = min(validation.get("folds", 5), 2)
    if validation.get("fold", 0) != "all":
        validation["fold"] = min(validation.get("fold", 0), 1)
    if "seeds" in tables["study"]:
        tables["study"]["seeds"] = min(tables["study"]["seeds"], 2)
    if "every" in validation:
        validation["every"] = 1
    if tables.get("engine", {}).get("name", "simulation") == "simulation":
        tables["engine"] = tables.get("engine", {}) | {"threads": 1, "workers": 1, "device": "cpu"}
    return tables


def small_phantom(folder: Path, **_: Any) -> None:
    """As `write_phantom` without more arguments, at half size and with fewer cases."""
    write_phantom(folder, sites=[PhantomSite(site, 3) for site in SITES], n_test=2, scale=0.5)


@contextmanager
def quick_studies() -> Iterator[pytest.MonkeyPatch]:
    """Whatever study is read is `shrunk`."""
    parse = concilium.study.reading._parse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concilium.study.reading, "_parse", lambda raw, *a, **k: parse(shrunk(raw), *a, **k))
        yield patch


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with quick_studies() as patch:
        patch.setattr(concilium.demo, "write_phantom", small_phantom)
        patch.setattr("concilium.data.phantom.write_phantom", small_phantom)
        patch.setenv("MPLBACKEND", "agg")
        patch.setenv("NO_COLOR", "1")
        yield


# -------------------------------------------------------------------------------------------------------- what a page finds


def renamed(folder: Path, names: Mapping[str, str]) -> None:
    """Call a data set's labels otherwise."""
    file = folder / "dataset.json"
    description = json.loads(file.read_text())
    description["labels"] = {names.get(label, label): i for label, i in description["labels"].items()}
    file.write_text(json.dumps(description))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: data (sites, a held-out set, all cases of one centre), images to segment, label maps, finished runs."""
    folder = tmp_path_factory.mktemp("home")
    write_phantom(folder / "data", sites=[PhantomSite(site, 3) for site in SITES], n_test=2, scale=0.5)
    write_phantom(folder / "more", sites=[PhantomSite("all", 15)], n_test=1, scale=0.5)
    shutil.move(folder / "more" / "all", folder / "data" / "all")
    for data in (folder / "data").iterdir():
        renamed(data, LABELS)
    for study in ("hippocampus", "polyps"):
        shutil.copytree(folder / "data", folder / "data" / study, ignore=shutil.ignore_patterns("hippocampus"))
    for site, country in zip(SITES, ("norway", "spain"), strict=False):
        shutil.copytree(folder / "data" / site, folder / "data" / "polyps" / country)
    shutil.copytree(folder / "data" / "test" / "imagesTr", folder / "images")
    for copy in ("labels", "labelsTr", "predictions"):
        shutil.copytree(folder / "data" / "test" / "labelsTr", folder / copy)
    shutil.copytree(ROOT / "studies", folder / "studies")
    (folder / "study.toml").write_text(STUDY)
    with quick_studies():  # made before what is for each test
        assert api.run(folder / "study.toml", folder / "runs" / "hippocampus").complete
    return folder


def lay_out(page: Path, home: Path, folder: Path) -> None:
    """What a page needs before its first command: `home`, and those of the runs that it names and does not make itself."""
    shutil.copytree(home, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs"))
    done = "\n".join(what for kind, what in steps(page) if kind in ("command", "toml"))
    made = set(re.findall(r"--out (runs/[\w-]+)", done))
    made |= {f"runs/{study}" for study in re.findall(r"^\[study\]\nname = \"(.*)\"$", done, re.MULTILINE)}
    for run in set(re.findall(r"(?<!/)\bruns/[a-z][\w-]*", done)) - made:
        shutil.copytree(home / "runs" / "hippocampus", folder / run)
    for own in re.findall(r"\bkits/(\w+)/runs/\w+", done):  # a site's folder of a run
        shutil.copytree(
            home / "runs" / "hippocampus" / "sites" / own, folder / "kits" / own / "runs" / "0123456789abcdef"
        )


# -------------------------------------------------------------------------------------------------------------------- doing it


class Page:
    """A page while it is read from top to bottom."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.unused = 0
        """Studies so far that nothing has run."""
        self.pending: str | None = None

    def read(self, page: Path) -> None:
        for kind, text in steps(page):
            self.do(kind, text)
        self.run_pending()

    def do(self, kind: str, text: str) -> None:
        match kind:
            case "command":
                self.command(text)
            case "toml":
                self.run_pending()
                self.study(text)
            case "python":
                if "study.toml" in text:
                    self.pending = None
                exec(compile(text, "block", "exec"), self.names)
            case "toml site.toml":
                self.settings(text)
            case "json dataset.json":
                self.description(text)
            case "text":
                pass
            case _:
                raise AssertionError(f"```{kind} is no kind of block that is known here.")

    def command(self, text: str) -> None:
        if elsewhere(text):
            return
        if text.startswith("concilium run study.toml"):
            self.pending = None
        program, *arguments = shlex.split(text)
        assert program == "concilium", f"Neither run here nor in ELSEWHERE: {text}"
        self.patch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as e:
            cli.main()
        assert not e.value.code, f"exit code {e.value.code}: {text}"

    def study(self, text: str) -> None:
        (self.folder / "study.toml").write_text(text, encoding="utf-8")
        self.pending = text
        for table in tomllib.loads(text).get("sites", {}).values():
            data = self.folder / table.get("data", "none")
            if "labels" in table and (data / "dataset.json").is_file():
                renamed(data, {ours: own for own, ours in table["labels"].items()})

    def run_pending(self) -> None:
        if self.pending is not None and "flare" not in self.pending:
            self.unused += 1
            self.command(f"concilium run study.toml --out runs/unnamed-{self.unused}")
        self.pending = None

    def description(self, text: str) -> None:
        folder = self.folder / "described"
        folder.mkdir(exist_ok=True)
        (folder / "dataset.json").write_text(text, encoding="utf-8")
        read_description(folder)

    def settings(self, text: str) -> None:
        """The settings are read, with this folder's data in place of a hospital's."""
        (self.folder / "kit" / "local").mkdir(parents=True)
        text = re.sub(r'= "/data/\w+"', f'= "{self.folder}/data/north"', text)
        (self.folder / "kit" / "local" / "site.toml").write_text(text, encoding="utf-8")
        assert read_settings(self.folder / "kit").split


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(p, id=name(p), marks=[pytest.mark.slow] * (name(p) in SLOW)) for p in PAGES]
)
def test_everything_on_the_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if all(kind == "text" or (kind == "command" and elsewhere(text)) for kind, text in steps(page)):
        return
    lay_out(page, request.getfixturevalue("home"), tmp_path)
    monkeypatch.chdir(tmp_path)
    Page(tmp_path, monkeypatch).read(page)


@pytest.mark.parametrize(
    "text",
    [
        "    concilium rum study.toml\n",
        "    concilium run nowhere.toml      # no such file\n",
        "    conciliun run study.toml\n",
        "    ls && concilium check study.toml\n",
        "```python\nimport concilium as cc\ncc.runn\n```\n",
        "```pyhton\nimport concilium\n```\n",
        '```toml\n[study]\nname = "x"\n[sites.north]\ndata = "data/north"\n[protocol]\nrounds = 1\nstep = 1\n```\n',
        '```toml site.toml\ndata = "/data/north"\nsplitt = true\n```\n',
        '```json dataset.json\n{"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 2}, "file_ending": ".nii"}\n```\n',
        '```json dataset.json\n{"labels": \n```\n',
    ],
)
def test_what_is_wrong_on_a_page_is_found(
    text: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{text}")
    lay_out(page, home, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, AttributeError, StudyError, DataError)):
        Page(tmp_path, monkeypatch).read(page)


def test_what_is_shrunk_is_small_and_still_the_study() -> None:
    for path in ROOT.glob("studies/*.toml"):
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        small = shrunk(raw)
        assert small["protocol"]["rounds"] == 1
        assert shrunk(small) == small
        assert {key for key in small if key not in raw} <= {"network", "training", "validation", "engine"}
        assert small["protocol"].get("name") == raw["protocol"].get("name")


def test_what_is_run_elsewhere_is_there() -> None:
    """The files that `ELSEWHERE` names exist, and each entry is used by some page."""
    commands = [text for page in PAGES for kind, text in steps(page) if kind == "command"]
    for pattern, reason in ELSEWHERE.items():
        assert [c for c in commands if re.match(pattern, c)], pattern
        assert [p for p in re.findall(r"[\w./]+/[\w.]+", reason) if (ROOT / p).is_file()], reason
