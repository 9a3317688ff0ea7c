"""The LaTeX of `concilium table` is well formed; where there is a LaTeX, it is set."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from concilium.reports.table import build, to_text

DOCUMENT = """\\documentclass{article}
\\usepackage{booktabs}
\\begin{document}
%s
\\end{document}
"""
NAMES = ("50 % & more", "a_b^c~d", "{x} \\ $y$ #1", "liver <5 mm>", "Gefäß")
"""Names with everything that LaTeX would read as its own."""


def _results(**changes: Any) -> dict[str, Any]:
    """Those of `test_table.py`."""
    spec = spec_from_file_location("made_results", Path(__file__).with_name("test_table.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.results(**changes)
    return found


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    """Name -> table, from one column to many, and with what need not be there."""
    run, named, few = _results(), _results(study=NAMES[0], labels=NAMES), _results(study="few", n=3)
    return {
        "as it comes": to_text(build([run]), "latex"),
        "one metric": to_text(build([run], metrics=["dice"]), "latex"),
        "three runs": to_text(build([run, named, few], metrics=["dice", "iou", "nsd"], margin=0.02), "latex"),
        "names": to_text(build([named]), "latex"),
        "no interval": to_text(build([few]), "latex"),
        "a label that one run lacks": to_text(build([run, named], labels=["liver"]), "latex"),
        "validation": to_text(build([_results(test=False)], margin=0.5), "latex"),
    }


def columns(line: str) -> int:
    """How many of the table's columns a line fills."""
    line = re.sub(r"\\multicolumn\{(\d+)\}", lambda m: "&" * (int(m[1]) - 1), re.sub(r"\\[&\\]", "", line))
    return line.count("&") + 1


def faults(text: str) -> list[str]:
    """What is wrong with it, as far as it can be told without LaTeX."""
    found, open_ones = [], []
    text = re.sub(r"^%.*\n", "", text, flags=re.MULTILINE)
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            open_ones.append(name)
        elif not open_ones or open_ones.pop() != name:
            found.append(f"{name} is closed where it is not open")
    found += [f"{name} is not closed" for name in open_ones]
    plain = re.sub(r"\\[{}\\]", "", text)
    if plain.count("{") != plain.count("}"):
        found.append("braces")
    n = len("".join(re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)))
    body = text[text.find(r"\toprule") : text.find(r"\bottomrule")]
    for line in body.splitlines():
        if line.endswith(r"\\") and columns(line) != n:
            found.append(f"{columns(line)} of {n} columns: {line}")
        if "&" in line and not line.endswith(r"\\"):
            found.append(f"line without an end: {line}")
    rules = re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", body)
    return found + [f"rule {a}-{b} of {n}" for a, b in rules if not 1 < int(a) <= int(b) <= n]


def test_environments_and_columns_are_right(tables: dict[str, str]) -> None:
    for name, text in tables.items():
        assert faults(text) == [], name
        assert text.startswith("% needs \\usepackage{booktabs}\n\\begin{table}\n")
        assert text.count(r"\\") > 4


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("\\end{tabular}\n", "", "table is closed where"),
        ("\\end{table}\n", "", "table is not closed"),
        ("federated & ", "federated ", "1 of 2 columns"),
        ("\\emph{", "{\\emph{", "braces"),
        ("multicolumn{2}", "multicolumn{3}", "3 of 2 columns"),
        ("local & ", "local & & ", "3 of 2 columns"),
    ],
)
def test_what_is_not_well_formed_is_found(old: str, new: str, fault: str, tables: dict[str, str]) -> None:
    text = tables["one metric"]
    assert old in text
    assert any(fault in f for f in faults(text.replace(old, new, 1)))


def log_of(folder: Path, *tables: str) -> str:
    """What LaTeX says of a document with these tables, one on each page."""
    if not shutil.which("pdflatex"):
        pytest.skip("needs pdflatex with booktabs (Debian: texlive-latex-base, texlive-latex-recommended)")
    (folder / "t.tex").write_text(DOCUMENT % "\\clearpage\n".join(tables), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "t.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    log = (folder / "t.log").read_text(encoding="latin-1")
    assert done.returncode == 0, log[-3000:]
    assert f"Output written on t.pdf ({len(tables)} page" in log
    return log


def test_latex_sets_it(tables: dict[str, str], tmp_path: Path) -> None:
    """Without errors, and without characters that the font lacks."""
    assert "Missing character" not in log_of(tmp_path, *tables.values())


def test_two_metrics_of_one_run_fit_a_column(tables: dict[str, str], tmp_path: Path) -> None:
    """As docs/statistics.md says."""
    assert "Overfull" not in log_of(tmp_path, tables["as it comes"], tables["one metric"])
