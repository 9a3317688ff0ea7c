"""Names to plug-ins, options to values; every refusal says what is allowed."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from concilium import catalog
from concilium.catalog import allowed, coerce, fill, load, names, options, spell
from concilium.errors import StudyError

ROOT = Path(catalog.__file__).parent
ELSEWHERE = """
from __future__ import annotations
from typing import Literal

CONSTANT = 3

def rule(total, state, *, mu: float, kind: Literal["a", "b"] = "a", n: int = 3, plain=None):
    return {}, {}

def unreadable(total, state, *, mu: Missing = 1):
    return {}, {}
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module outside the package; the result is its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(content: str = ELSEWHERE) -> str:
        name = f"elsewhere_{abs(hash((tmp_path, content)))}"
        (tmp_path / f"{name}.py").write_text(content)
        return name

    return write


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("kind", catalog.ENTRIES)
def test_names_are_the_files_of_the_folder(kind: str) -> None:
    files = {p.stem for p in (ROOT / kind).glob("*.py") if not p.stem.startswith("_")}
    assert set(names(kind)) == files
    assert list(names(kind)) == sorted(files)
    assert files


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in catalog.ENTRIES for name in names(kind)])
def test_every_name_loads(kind: str, name: str) -> None:
    function = load(kind, name)
    assert function.__name__ == (catalog.ENTRIES[kind] or name)
    assert function.__module__ == f"concilium.{kind}.{name}"
    supplied = catalog.SUPPLIED.get(kind, frozenset())
    keyword_only = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(options(kind, name)) == keyword_only - supplied


def test_names_import_nothing() -> None:
    code = "import sys; from concilium import catalog; catalog.names('networks'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(StudyError, match=r"aggregation has no 'maen'\. Did you mean 'mean'\? Known: .*\bmean\b"):
        load("aggregation", "maen")
    with pytest.raises(StudyError) as e:
        load("aggregation", "xyzzy")
    assert "Did you mean" not in str(e.value)
    assert "Known: " + ", ".join(names("aggregation")) in str(e.value)


@pytest.mark.parametrize("name", ["_alone", "__init__", "", "..mean", "os", "mean.rule"])
def test_private_modules_and_paths_are_no_names(name: str) -> None:
    with pytest.raises(StudyError):
        load("protocols", name)


def test_a_function_elsewhere_is_named_module_and_function(elsewhere: Callable[[str], str]) -> None:
    module = elsewhere(ELSEWHERE)
    assert list(options("aggregation", f"{module}:rule")) == ["mu", "kind", "n", "plain"]
    filled, problems = fill("aggregation", f"{module}:rule", {"mu": 1}, "[aggregation]")
    assert filled == {"mu": 1.0, "kind": "a", "n": 3, "plain": None}
    assert problems == []


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        ("", "{}:rule", "AttributeError"),
        ("def rule(:", "{}:rule", "SyntaxError"),
        ("raise RuntimeError('no licence')", "{}:rule", "no licence"),
        ("import not_there_at_all", "{}:rule", "not_there_at_all"),
        (ELSEWHERE, "{}:CONSTANT", "is a int. Expected a function"),
        (ELSEWHERE, "{}:", "has no"),
        (ELSEWHERE, ":rule", "ValueError"),
        (ELSEWHERE, "{}.rule:rule", "ModuleNotFoundError"),
        (ELSEWHERE, "{}:a.b:c", "AttributeError"),
    ],
)
def test_code_elsewhere_that_cannot_be_loaded_is_an_error_of_the_study(
    content: str, name: str, reason: str, elsewhere: Callable[[str], str]
) -> None:
    """Whatever happens as it is imported: it is not our fault (exit code 70), and the user is told."""
    with pytest.raises(StudyError, match=reason):
        load("aggregation", name.format(elsewhere(content)))


def test_options_that_cannot_be_read_are_an_error_of_the_study(elsewhere: Callable[[str], str]) -> None:
    with pytest.raises(StudyError, match="NameError: name 'Missing'"):
        options("aggregation", f"{elsewhere(ELSEWHERE)}:unreadable")
    with pytest.raises(StudyError, match="cannot be read"):
        options("aggregation", "builtins:dict")


# ------------------------------------------------------------------------------------------------------------- options


def test_what_is_wrong_with_options_is_told_all_at_once(elsewhere: Callable[[str], str]) -> None:
    name = f"{elsewhere(ELSEWHERE)}:rule"
    _, problems = fill("aggregation", name, {"kimd": "a", "kind": "c", "n": 1.5, "plain": [1]}, "[aggregation]")
    assert problems == [
        "[aggregation] kimd = 'a' is not known. Did you mean 'kind'? Known: kind, mu, n, plain.",
        f"[aggregation] mu is missing. {name} needs it (a number). Add it.",
        "[aggregation] kind = 'c' is not allowed. Allowed: 'a', 'b'.",
        "[aggregation] n = 1.5 is not allowed. Allowed: a whole number.",
        "[aggregation] plain = [1] is not allowed. Allowed: true or false or a whole number or a number or text.",
    ]


def test_an_unknown_plug_in_is_told_with_table_key_value_and_nearest() -> None:
    filled, (problem,) = fill("networks", "nnunett", {"base_features": 3}, "[network]")
    assert filled == {}
    assert problem.startswith("[network] name = 'nnunett' is not allowed: ")
    assert "Did you mean 'nnunet'?" in problem


def test_what_concilium_supplies_is_no_option() -> None:
    _, (problem,) = fill("losses", "dice_ce", {"batch_dice": True}, "[loss]")
    assert "batch_dice = True is not known" in problem


def test_defaults_are_filled_in() -> None:
    assert fill("losses", "dice_ce", {"ce_weight": 2}, "[loss]") == (
        {"dice_weight": 1.0, "ce_weight": 2.0, "unannotated": "refuse"},
        [],
    )


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (3.5, float, 3.5),
        (True, bool, True),
        ("x", str, "x"),
        ("a/b", Path, Path("a/b")),
        (3, float | None, 3.0),
        (None, float | None, None),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((1, 2), tuple[float, ...], (1.0, 2.0)),
        ([], tuple[int, ...], ()),
        ("a", Literal["a", "b"], "a"),
        (["a"], tuple[Literal["a", "b"], ...], ("a",)),
        (3, int | str, 3),
        ("3", int | str, "3"),
        (True, inspect.Parameter.empty, True),
        (2, inspect.Parameter.empty, 2),
        ("x", inspect.Parameter.empty, "x"),
    ],
    ids=str,
)
def test_values_become_what_is_annotated(value: Any, annotation: Any, expected: Any) -> None:
    got = coerce(value, annotation)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        (True, int, "a whole number"),
        (True, float, "a number"),
        (False, float | None, "a number"),
        (1, bool, "true or false"),
        (1.0, int, "a whole number"),
        ("1", int, "a whole number"),
        (1, str, "text"),
        (1, Path, "a path"),
        (None, int, "a whole number"),
        ("12", tuple[int, ...], "a list, each a whole number"),
        ([1, "2"], tuple[int, ...], "a whole number"),
        ([1, True], tuple[int, ...], "a whole number"),
        (1, tuple[int, ...], "a list, each a whole number"),
        ("c", Literal["a", "b"], "'a', 'b'"),
        ([], Literal["a", "b"], "'a', 'b'"),
        ({}, float | None, "a number"),
        ([1], inspect.Parameter.empty, "text"),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_is_refused_with_what_is_allowed(value: Any, annotation: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^Allowed: ") as e:
        coerce(value, annotation)
    assert words in str(e.value)


def test_annotations_in_the_words_of_a_toml_file() -> None:
    assert spell(float | None) == "a number"
    assert spell(int | str) == "a whole number or text"
    assert spell(tuple[Literal["a", "b"], ...]) == "a list, each 'a', 'b'"
    for annotation in (int, float, str, bool, Path):
        assert annotation.__name__ not in spell(annotation)


def test_allowed_lists_all_and_the_nearest() -> None:
    assert allowed("rond", ["steps", "rounds"]) == "Did you mean 'rounds'? Known: rounds, steps."
    assert allowed("zzz", ["b", "a"]) == "Known: a, b."
    assert allowed("a", []) == "Known: none."


# ------------------------------------------------------------------------------------ what every plug-in keeps to

POSITIONAL: dict[str, tuple[str, ...]] = {
    "attacks": ("transcript", "network", "auxiliary"),
    "aggregation": ("total", "state"),
    "collect": ("ask", "requests"),
    "defences": (),
    "engines": (),
    "exports": ("finished", "out"),
    "filters": ("update", "about"),
    "local_updates": ("local", "batch"),
    "losses": ("logits", "labels", "annotated"),
    "metrics": ("pair",),
    "networks": (),
    "protocols": ("engine", "start"),
}
"""Kind -> what its functions are given, before their options."""
ALSO: dict[str, tuple[str, ...]] = {"aggregation": ("updates", "state")}
"""Another way to be given it."""
METHODS = ("aggregation", "filters", "local_updates", "losses", "metrics", "networks")
"""Kinds whose plug-ins are methods that somebody published."""

every_plug_in = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in catalog.ENTRIES for name in names(kind)]
)


@every_plug_in
def test_a_plug_in_has_the_signature_of_its_kind(kind: str, name: str) -> None:
    parameters = inspect.signature(load(kind, name)).parameters.values()
    positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    assert positional in (POSITIONAL[kind], ALSO.get(kind))
    assert not any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters)
    assert kind == "protocols" or not any(p.kind is p.VAR_KEYWORD for p in parameters), (
        "it would swallow misspelt options"
    )
    supplied = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} & catalog.SUPPLIED.get(kind, frozenset())
    assert kind == "protocols" or supplied == catalog.SUPPLIED.get(kind, frozenset())


@every_plug_in
def test_options_of_a_plug_in_can_be_written_in_a_study(kind: str, name: str) -> None:
    for option in options(kind, name).values():
        assert option.annotation is not option.empty
        if option.default is not option.empty:
            assert coerce(option.default, option.annotation) == option.default
        with pytest.raises(ValueError, match="Allowed: "):
            coerce(object(), option.annotation)


@every_plug_in
def test_a_plug_in_says_what_it_is_and_where_it_comes_from(kind: str, name: str) -> None:
    function = load(kind, name)
    module = inspect.getmodule(function)
    assert function.__doc__
    assert module is not None
    assert module.__doc__
    if kind in METHODS:
        assert re.search(r"\b(19|20)\d\d\b", module.__doc__), "name the year of the paper"
        assert re.search(r"doi:10\.|arXiv:\d|et al\.", module.__doc__), "name the paper"
