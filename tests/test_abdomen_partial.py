"""The benchmark of partial labels: one test set of several, and a table that counts what was looked for."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import concilium as cc
from concilium.data.dataset import open_dataset
from concilium.data.phantom import PhantomSite, write_phantom

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "abdomen_partial.py"
DRAWN = {"test_a": ["organ"], "test_b": ["lesion", "organ"], "a": ["organ"], "b": ["lesion"]}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_file_location("abdomen_partial", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sites a and b, and two test sets, each of which was searched for other labels; test_a's last two cases are one patient."""
    numbers = {"test_a": 5, "test_b": 2, "a": 4, "b": 4}
    write_phantom(tmp_path / "data", sites=[PhantomSite(n, k) for n, k in numbers.items()], n_test=1, scale=0.5)
    for name, annotated in DRAWN.items():
        change(tmp_path / "data" / name, annotated=annotated)
    return tmp_path / "data"


def change(folder: Path, **more: object) -> None:
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(about | more))


def sets(data: Path) -> list[Path]:
    return [data / "test_a", data / "test_b"]


def test_one_set_of_several_says_for_each_case_what_was_looked_for(script: ModuleType, data: Path) -> None:
    assert script.lay_out(sets(data), data / "all") == {"test_a": 5, "test_b": 2}
    dataset = open_dataset(data / "all")
    assert len(dataset.cases) == 7
    assert {c.name: set(c.annotated or ()) for c in dataset.cases} == {
        **{f"test_a_{i:03d}": {"organ"} for i in range(5)}, **{f"test_b_{i:03d}": {"lesion", "organ"} for i in range(2)}
    }  # fmt: skip
    assert len({c.patient for c in dataset.cases}) == 6
    assert dataset.cases[0].images[0].resolve().parent == (data / "test_a" / "imagesTr").resolve()
    assert dict(dataset.labels) == {"background": 0, "organ": 1, "lesion": 2}


def test_what_cannot_be_laid_out_is_refused(script: ModuleType, data: Path) -> None:
    with pytest.raises(ValueError, match="0 test sets"):
        script.lay_out([], data / "all")
    with pytest.raises(ValueError, match="is not empty"):
        script.lay_out(sets(data), data / "a")
    with pytest.raises(ValueError, match="is in two test sets"):
        script.lay_out([data / "test_a", data / "test_a"], data / "twice")
    change(data / "test_b", labels={"background": 0, "organ": 2, "lesion": 1})
    with pytest.raises(ValueError, match="test_b has labels"):
        script.lay_out(sets(data), data / "all")


def test_the_table_counts_the_patients_in_whom_a_structure_was_looked_for(
    script: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["abdomen_partial.py", str(data), "--out", str(data / "all")])
    script.main()
    assert capsys.readouterr().out == "test_a: 5 cases\ntest_b: 2 cases\n"
    study = {
        "study": {"name": "partial"},
        "sites": {name: {"data": str(data / name)} for name in "ab"},
        "test": {"data": str(data / "all")},
        "protocol": {"rounds": 1, "steps": 1, "compare": ["local"]},
        "network": {"base_features": 4},
        "training": {"batch_size": 2, "patch_size": [8, 16, 16], "mirror": False},
        "loss": {"name": "marginal"},
        "engine": {"threads": 1, "device": "cpu"},
    }
    run = cc.run(study, data.parent / "run")
    script.main(["--table", str(run.folder)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["model", "lesion", "organ"]
    shown = {line[0].split(": ")[0]: line[1:] for line in lines[2:]}
    assert list(shown) == ["federated", "local:a", "local:b"]
    assert [cell.split(", n = ")[-1] for cell in shown["federated"]] == ["2", "6"]
    assert shown["local:a"][0] == shown["local:b"][1] == "–"
    assert [shown["local:a"][1][-1], shown["local:b"][0][-1]] == ["6", "2"]
    means = run.summary.set_index(["model", "site", "subset", "label", "metric"])["mean"]
    assert shown["federated"][1].startswith(f"{means['federated', 'test', 'test', 'organ', 'dice']:.3f}")


def test_nothing_to_do_is_said(script: ModuleType) -> None:
    with pytest.raises(SystemExit):
        script.main(["data"])
