"""What goes wrong is a value: recorded, shown, in the exit code, and never in the words of the site."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import SECRET
from safetensors.torch import load_file

from concilium import wire
from concilium.data.phantom import write_phantom
from concilium.errors import DataError, EngineError
from concilium.line import run
from concilium.study import Study

Make = Callable[..., Study]


@pytest.fixture
def fuse(tmp_path: Path) -> str:
    path = tmp_path / "fuse"
    path.touch()
    return str(path)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def faulty(small_study: Make, name: str, fuse: str, **changes: Any) -> Study:
    study = small_study(local_update__name=f"faults:{name}", local_update__fuse=fuse, **changes)
    return study


@pytest.mark.parametrize(("fault", "code"), [("raises", "failed"), ("diverges", "not_finite")])
def test_a_site_that_fails_is_left_out_of_its_round_and_everything_says_so(
    fault: str, code: str, small_study: Make, fuse: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    pack = wire.pack
    monkeypatch.setattr(wire, "pack", lambda message: sent.append(pack(message)) or sent[-1])
    outcome = run(faulty(small_study, fault, fuse, protocol__compare=["local"], protocol__rounds=1), tmp_path / "run")
    assert outcome.exit_code == 4
    assert not outcome.results["complete"]
    (problem,) = outcome.results["problems"]
    assert problem.startswith("federated, round 1: north: ")
    assert code in problem
    first = lines(tmp_path / "run")[0]
    assert set(first["sites"]) == {"south", "west"}
    assert set(first["failures"]) == {"north"}
    # its words stay in its own log
    assert SECRET.encode() not in b"".join(sent)
    log = (tmp_path / "run" / "sites" / "north" / "log.jsonl").read_text()
    assert (SECRET in log) == (fault == "raises")
    # the others' mean went on without it: they are local training, one round of it
    updates = {s: load_file(tmp_path / f"run/sites/{s}/models/local.safetensors") for s in ("south", "west")}
    n = {s: first["sites"][s]["n_cases"] for s in updates}
    shared = load_file(tmp_path / "run/weights/federated.safetensors")
    for name, tensor in shared.items():
        mean = sum(updates[s][name].double() * n[s] for s in updates) / sum(n.values())
        assert torch.allclose(tensor, mean.float(), rtol=0, atol=1e-7)


def test_a_failed_step_leaves_the_site_as_it_was(small_study: Make, fuse: str, tmp_path: Path) -> None:
    """A local model whose first round failed begins in the second from the initial weights, not from half a round."""
    study = faulty(small_study, "raises", fuse, protocol__name="local", sites=("north", "south"))
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 4
    first, second = lines(tmp_path / "run")
    assert (set(first["failures"]), set(second["sites"])) == ({"north"}, {"north", "south"})
    assert second["sites"]["north"]["bytes_down"] > 10 * second["sites"]["south"]["bytes_down"]
    (model,) = outcome.results["models"]
    assert {site: took["n_steps"] for site, took in model["sites"].items()} == {"north": 2, "south": 4}


def test_a_site_that_never_trained_gives_no_model(small_study: Make, tmp_path: Path) -> None:
    study = small_study(local_update__name="faults:never", protocol__name="local", protocol__rounds=1, sites=("north",))
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 4
    assert outcome.results["cases"] == []
    assert any("final push: north" in problem for problem in outcome.results["problems"])


def test_too_few_sites_stop_the_run_and_what_there_is_is_kept(small_study: Make, fuse: str, tmp_path: Path) -> None:
    study = faulty(small_study, "raises", fuse, protocol__min_sites=3)
    with pytest.raises(EngineError, match=r"2 of 3 sites answered \(north: .*--resume"):
        run(study, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not results["complete"]
    assert results["models"] == []
    outcome = run(study, tmp_path / "run", resume=True)  # the fuse is burnt: the site is mended
    assert outcome.exit_code == 0


def test_a_site_that_takes_too_long_times_out(small_study: Make, fuse: str, tmp_path: Path) -> None:
    study = faulty(
        small_study, "sleeps", fuse, local_update__seconds=3.0, protocol__round_seconds=2.0, protocol__rounds=1
    )
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 4
    assert lines(tmp_path / "run")[0]["failures"] == {"north": {"type": "SiteTimeout", "text": "no reply within 2 s"}}


@pytest.mark.slow
def test_a_worker_that_is_killed_comes_back_for_the_next_round(small_study: Make, fuse: str, tmp_path: Path) -> None:
    study = faulty(small_study, "dies", fuse, engine__workers=3, protocol__rounds=2)
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 4
    first, second = lines(tmp_path / "run")
    assert [f["type"] for f in first["failures"].values()] == ["SiteLost"]
    assert set(second["sites"]) == {"north", "south", "west"}


def broken(folder: Path, site: str, n: int) -> Path:
    """The phantom with all its cases, and the last `n` images of a site cut off."""
    write_phantom(folder, n_test=3, scale=0.5)
    for path in sorted((folder / site / "imagesTr").iterdir())[-n:]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder


def test_an_unreadable_case_is_set_aside_with_its_reason(small_study: Make, tmp_path: Path) -> None:
    data = broken(tmp_path / "data", "north", 1)
    outcome = run(small_study(data=data, protocol__rounds=1), tmp_path / "run")
    assert outcome.exit_code == 0  # one of twelve is within the study's limit
    (excluded,) = outcome.results["excluded"]
    assert (excluded["site"], excluded["reason"]) == ("north", "unreadable")
    assert excluded["case"] not in {c["case"] for c in outcome.results["cases"]}
    n_cases = json.loads((tmp_path / "run" / "fingerprint.json").read_text())["n_cases"]
    assert n_cases == 12 + 8 + 3 - 1


def test_too_many_unreadable_cases_stop_the_study(small_study: Make, tmp_path: Path) -> None:
    data = broken(tmp_path / "data", "north", 2)
    with pytest.raises(DataError, match=r"north: too_many_excluded.*2 of 12 cases cannot be used"):
        run(small_study(data=data, protocol__rounds=1), tmp_path / "run")


def test_sites_that_disagree_on_labels_are_refused(small_study: Make, phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom, tmp_path / "data")
    path = tmp_path / "data" / "south" / "dataset.json"
    about = json.loads(path.read_text())
    about["labels"] = {"background": 0, "organ": 1, "cyst": 2}
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="south has labels"):
        run(small_study(data=tmp_path / "data"), tmp_path / "run")
