"""`concilium check`: exit codes, what is shown, and the file of all findings."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from concilium import cli
from concilium.data._check_types import Mend
from concilium.data.check import Checked, Finding
from concilium.reports.findings import lines, to_json

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command(...)`: exit code of `concilium check ...`, what is on stdout, what is on stderr."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["concilium", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as e:
            cli.main()
        shown = capsys.readouterr()
        return int(e.value.code or 0), shown.out, " ".join(shown.err.split())

    return run


def study(folder: Path, phantom: Path, *, test: str = "test", engine: str = "simulation") -> Path:
    path = folder / "study.toml"
    sites = "".join(f'[sites.{s}]\ndata = "{phantom / s}"\n' for s in ("north", "south", "west"))
    path.write_text(
        f'[study]\nname = "s"\n{sites}[test]\ndata = "{phantom / test}"\n[protocol]\nrounds = 1\nsteps = 1\n'
        f'[validation]\nfolds = 2\n[engine]\nname = "{engine}"\n'
    )
    return path


def test_a_study_without_errors_ends_with_0(phantom: Path, tmp_path: Path, command: Command) -> None:
    code, out, err = command(study(tmp_path, phantom), "--json", tmp_path / "all.json")
    assert code == 0, out + err
    assert [line.split(":")[0] for line in out.splitlines() if line and line[0] != " "][:4] == [
        "north",
        "south",
        "west",
        "test",
    ]
    written = json.loads((tmp_path / "all.json").read_text())
    assert set(written["cases"]) == {"north", "south", "west", "test"}
    assert all(f["severity"] != "error" for f in written["findings"])


def test_the_test_set_as_a_site_is_found(phantom: Path, command: Command) -> None:
    code, out, _ = command(phantom / "north", "--test", phantom / "north")
    assert code == 3
    assert "error: in_test_set" in out


def test_one_bad_case_ends_with_3_and_is_named(phantom: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "own"
    shutil.copytree(phantom / "north", folder)
    broken = sorted((folder / "imagesTr").iterdir())[0]
    broken.write_bytes(b"nothing")
    code, out, _ = command(folder)
    assert code == 3
    assert "error: unreadable, 1 case" in out
    assert broken.name in out


def test_copies_are_mended_and_the_exit_code_is_that_of_what_was_checked(
    phantom: Path, tmp_path: Path, command: Command
) -> None:
    folder, out = tmp_path / "own", tmp_path / "mended"
    shutil.copytree(phantom / "north", folder)
    image = sorted((folder / "imagesTr").iterdir())[0]
    image.rename(image.with_name(image.name.replace("_0000", "")))
    code, shown, _ = command(folder, "--json", tmp_path / "all.json")
    assert code == 3
    assert "    → Rename it so. (--fix does it.)" in shown
    assert "--fix OUT mends 1 of them, in copies of the data." in shown
    assert sum(f["safe"] for f in json.loads((tmp_path / "all.json").read_text())["findings"]) == 1
    code, shown, _ = command(folder, "--fix", out)
    assert code == 3
    assert f"1 change in copies: {out}" in shown
    code, shown, _ = command(out / "own", "--fix", tmp_path / "again")
    assert code == 0
    assert f"Nothing can be mended safely: {tmp_path / 'again'} is not written." in shown
    code, _, err = command(folder, "--fix", out)
    assert code == 2
    assert "is not empty" in err


def test_no_such_study_or_data_set_ends_with_2(phantom: Path, tmp_path: Path, command: Command) -> None:
    for arguments in (
        ["nowhere.toml"],
        [tmp_path],
        [phantom / "north", "--test", tmp_path],
        [phantom / "north", "nowhere"],
    ):
        code, _, err = command(*arguments)
        assert code == 2, err
        assert "Error" in err
        assert "Traceback" not in err


def test_a_study_that_does_not_say_where_data_lie(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        '[study]\nname = "s"\n[sites.a]\n[sites.b]\n[protocol]\nrounds = 1\nsteps = 1\n[engine]\nname = "flare"\n'
    )
    code, _, err = command(path)
    assert code == 2
    assert "Give the raw folders" in err


def test_two_folders_of_one_name_stay_two(phantom: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(phantom / "south", tmp_path / "north")
    _, out, _ = command(phantom / "north", tmp_path / "north")
    assert f"{phantom / 'north'}: " in out
    assert f"{tmp_path / 'north'}: " in out


# --------------------------------------------------------------------------------------------------------------- lines


def finding(i: int, **changes: Any) -> Finding:
    return Finding(
        **(
            {"severity": "error", "code": "x", "site": "a", "case": f"c{i}", "text": f"Bad {i}.", "fix": "Mend."}
            | changes
        )
    )


def shown(*findings: Finding, most: int = 20, sites: str = "a") -> list[str]:
    return [text for _, text in lines(Checked(dict.fromkeys(sites, 30), findings), most=most)]


def test_many_cases_are_counted() -> None:
    assert shown(*map(finding, range(25)), most=3)[:7] == [
        "a: 30 cases. 25 errors.", "  error: x, 25 cases", "    c0: Bad 0.", "    c1: Bad 1.", "    c2: Bad 2.",
        "    and 22 more", "    → Mend.",
    ]  # fmt: skip


def test_one_text_for_many_cases_stands_once() -> None:
    found = [finding(i, text="Empty.") for i in range(25)]
    assert shown(*found, most=3)[2:4] == ["    Empty. In c0, c1, c2 and 22 more.", "    → Mend."]


def test_how_many_can_be_mended_is_said_of_a_group_and_of_all() -> None:
    safe = Mend("rename", (Path("a"),), Path("b"))
    found = [finding(0, mend=safe), finding(1), finding(2, mend=safe, code="y")]
    assert shown(*found)[1:] == [
        "  error: x, 2 cases", "    c0: Bad 0.", "    c1: Bad 1.", "    → Mend. (--fix does it for 1 of 2.)",
        "  error: y, 1 case", "    c2: Bad 2.", "    → Mend. (--fix does it.)", "",
        "1 data set, 30 cases. 3 errors.", "--fix OUT mends 2 of them, in copies of the data.",
    ]  # fmt: skip


def test_what_is_said_of_every_data_set_stands_once() -> None:
    found = [finding(0, severity="note", case=None, site=s, text="Pixels.") for s in "ab"]
    assert shown(*found, sites="ab") == [
        "a: 30 cases. 1 note.", "", "b: 30 cases. 1 note.", "", "All of them:", "  note: x", "    Pixels.", "    → Mend.", "",
        "2 data sets, 60 cases. 2 notes.",
    ]  # fmt: skip
    assert "All of them:" not in shown(found[0], sites="ab")
    three = [finding(0, severity="note", case=None, site=s, text="Pixels.") for s in "abd"]
    assert shown(*three, sites="abcd")[-6:-1] == ["a, b, d:", "  note: x", "    Pixels.", "    → Mend.", ""]
    assert shown(*three[:2], sites="abcd").count("    Pixels.") == 2


def test_nothing_found_is_said() -> None:
    assert shown() == ["a: 30 cases. Nothing found.", "", "1 data set, 30 cases. Nothing found."]


def test_every_code_is_in_the_documentation() -> None:
    """Found in the source: the word after a severity."""
    root = Path(__file__).parents[1]
    source = "".join(p.read_text(encoding="utf-8") for p in (root / "src/concilium/data").glob("_check_*.py"))
    codes = set(re.findall(r'"(?:error|warning|note)"[^"\n]*,\s*"([a-z_]+)"', source)) - {"warning", "note"}
    codes |= set(re.findall(r'Unusable\("([a-z_]+)"', source))
    meant, _, mended = (root / "docs/check.md").read_text(encoding="utf-8").partition("## Mend")
    documented, safe = (re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE) for text in (meant, mended))
    assert len(codes) > 30
    assert sorted(codes) == sorted(documented)
    assert len(safe) == 5
    assert set(safe) < codes


def test_json_holds_everything() -> None:
    findings = tuple(map(finding, range(25)))
    assert len(json.loads(to_json(Checked({"a": 25}, findings)))["findings"]) == 25
