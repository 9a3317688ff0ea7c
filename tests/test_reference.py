"""The reference says what the code does: it is made from it, and whoever changes one makes the other again."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from concilium import catalog
from concilium.messages import REPLIES, REQUESTS

FOLDER = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = spec_from_file_location("make_reference", FOLDER / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_code_gives(made: ModuleType) -> None:
    pages = made.pages()
    assert {p.name for p in (FOLDER / "reference").iterdir()} == set(pages)
    for name, text in pages.items():
        same = (FOLDER / "reference" / name).read_text(encoding="utf-8") == text
        assert same, f"docs/reference/{name} is not what the code says. Run: python docs/make_reference.py"


def test_every_key_of_a_study_has_a_meaning(made: ModuleType) -> None:
    assert made.undocumented() == [], "Write a sentence below each of these keys."


def test_nothing_is_missing(made: ModuleType) -> None:
    """Counted another way than the pages are made."""
    pages = made.pages()
    for kind in catalog.ENTRIES:
        for name in catalog.names(kind):
            assert f"\n### {name}\n" in pages["plug-ins.md"]
    for message in (*REQUESTS, *REPLIES):
        assert f"\n### {message.__name__}\n" in pages["messages.md"]
    assert "| `learning_rate` | a number: more than 0 |  | Omitted: 0.01 for sgd" in pages["study.md"]
    assert (
        "| `cut` | 'shallow', 'deep' or a list, each text | `\"deep\"` | `shallow`, `deep`, or" in pages["plug-ins.md"]
    )
    assert "| `--resume` |  | Go on with the run in --out" in pages["commands.md"]
    assert "| 4 | `EngineError` |" in pages["codes.md"]
