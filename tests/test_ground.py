"""Rules of the house that no other tool checks. A rule that is in the way is changed here, not worked around."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "concilium"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager"}
MAX_LINES, MAX_FUNCTION_LINES = 300, 50
LONGER = {"messages.py": 950, "data/plan.py": 310}
"""File -> lines it may have. `messages.py` is the one list of what may leave a site."""
UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"torch.load", "torch.save", "eval", "exec"}
MAY_CALL = {"exports/_torch_file.py": {"torch.save"}}
"""nnU-Net and MONAI read nothing but PyTorch's own format. Writing it executes nothing; nothing here reads it."""
PRINTS: set[str] = set()
"""Files that may print; the commands use consoles."""
PLUG_INS = (
    *("aggregation", "attacks", "collect", "defences", "engines", "exports", "filters", "local_updates", "losses"),
    *("metrics", "networks", "protocols", "reports"),
)


def where(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a file; the module itself is the first."""
    return list(ast.walk(ast.parse(text(path))))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules, and names in them, that a file imports."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ("concilium", *path.relative_to(PACKAGE).parts[:-1])
            parent = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (parent, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_file_or_folder_has_a_name_that_says_nothing() -> None:
    tops = ("src", "tests", "benchmarks", "docs")
    files = [p for top in tops for p in (ROOT / top).rglob("*.py")]
    found = [p for p in files if NAMELESS & {*re.split(r"[_.]", p.stem.lower()), p.parent.name}]
    assert not found


# One test for a rule, not one for a rule and a file: there are hundreds of files, and each test has a price of its own.


def offenders(rule: Callable[[Path], Iterable[object]]) -> list[str]:
    """What a rule finds in all files of the package, each with the file's name."""
    return [f"{where(path)}: {found}" for path in MODULES for found in rule(path)]


def prints(path: Path) -> Iterator[str]:
    if where(path) not in PRINTS:
        yield from (f"line {call.lineno}" for name, call in calls(path) if name == "print")


def unpickles(path: Path) -> Iterator[str]:
    yield from (name for name in imports(path) if name.split(".")[0] in UNSAFE_IMPORTS or name in UNSAFE_CALLS)
    for name, call in calls(path):
        if name in UNSAFE_CALLS - MAY_CALL.get(where(path), set()):
            yield f"{name} in line {call.lineno}"
        if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in call.keywords):
            yield f"allow_pickle in line {call.lineno}"


def is_long(path: Path) -> Iterator[str]:
    n_lines, limit = len(text(path).splitlines()), LONGER.get(where(path), MAX_LINES)
    if n_lines > limit:
        yield f"{n_lines} lines, {limit} are allowed"
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name} has {lines} lines, {MAX_FUNCTION_LINES} are allowed"


def test_there_are_files_to_look_at() -> None:
    assert len(MODULES) > 300


def test_nothing_prints_below_the_command_line() -> None:
    assert not offenders(prints)


def test_nothing_is_unpickled() -> None:
    assert not offenders(unpickles)


def test_nothing_asserts_outside_tests() -> None:
    assert not offenders(lambda path: [f"line {node.lineno}" for node in nodes(path) if isinstance(node, ast.Assert)])


def test_files_and_functions_are_short() -> None:
    assert not offenders(is_long)


def test_every_module_says_what_it_is() -> None:
    assert not offenders(lambda path: [] if ast.get_docstring(nodes(path)[0]) else ["no docstring"])


def test_no_path_of_a_developers_machine() -> None:
    assert not offenders(lambda path: re.findall(r"""["'](/root|/home|/work|/Users|C:\\)""", text(path)))


@pytest.mark.parametrize("kind", PLUG_INS)
def test_plug_ins_of_a_folder_do_not_import_each_other(kind: str) -> None:
    """Private modules of the folder (`_name.py`) and its contract (`__init__.py`) may be imported."""
    plug_ins = {p.stem for p in (PACKAGE / kind).glob("*") if not p.stem.startswith(("_", "."))}
    for path in (PACKAGE / kind).glob("*.py"):
        others = {f"concilium.{kind}.{name}" for name in plug_ins - {path.stem}}
        assert not [name for name in imports(path) if name in others or name.rpartition(".")[0] in others], path.name


def test_the_release_of_nnunet_is_bounded() -> None:
    """`nnunet_parts` depends on names that no release of nnunetv2 promises to keep."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [r for r in project["dependencies"] if r.startswith("nnunetv2")]
    assert re.fullmatch(r"nnunetv2>=\d+\.\d+\.\d+,<\d+\.\d+", requirement)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", pytest.param("import matplotlib.pyplot; ", marks=pytest.mark.exhaustive)])
def test_figures_are_shown_as_before(before: str) -> None:
    """nnU-Net chooses a backend of matplotlib as it is imported. A notebook that has trained goes on with its own."""
    code = f"import matplotlib; {before}matplotlib.use('svg'); import concilium.nnunet_parts; print(matplotlib.get_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["svg"]


def test_constraints_name_no_host() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in lines if line)


@pytest.mark.skipif(not find_spec("concilium.cli"), reason="there is no command line yet")
def test_the_command_line_starts_without_torch() -> None:
    """`concilium --help` answers at once; torch alone takes seconds to import."""
    slow = "{'torch', 'nnunetv2', 'monai', 'scipy'}"
    code = f"import sys, concilium.cli; sys.exit(', '.join({slow} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.stderr
    assert done.returncode == 0
