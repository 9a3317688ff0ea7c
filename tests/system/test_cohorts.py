"""Rounds in which only some sites take part: recorded, resumed to the bit, and fit for every local update and rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import digests, go_on

from concilium.line import Event, run
from concilium.record import Record
from concilium.study import Study

Make = Callable[..., Study]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def study(small_study: Make) -> Study:
    """SGD keeps its momentum at the site between the rounds in which that takes part."""
    return small_study(
        protocol__rounds=5, protocol__participation=0.4, protocol__min_sites=1, training__optimizer="sgd", test=False
    )


@pytest.fixture(scope="module")
def uninterrupted(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(study, folder).exit_code == 0
    return folder


def test_the_record_says_who_was_asked(uninterrupted: Path) -> None:
    found = lines(uninterrupted)
    assert [line["round"] for line in found] == [1, 2, 3, 4, 5]
    assert all(len(line["asked"]) == 1 and list(line["sites"]) == line["asked"] for line in found)
    assert len({line["asked"][0] for line in found}) > 1, "the seed draws several"
    assert all(line["failures"] == {} for line in found)
    (model,) = json.loads((uninterrupted / "results.json").read_text())["models"]
    times = {site: sum(site in line["asked"] for line in found) for site in ("north", "south", "west")}
    assert {site: took["n_steps"] for site, took in model["sites"].items()} == {s: 2 * n for s, n in times.items()}
    for site, took in model["sites"].items():
        assert (took["bytes_down"] > 0) == (times[site] > 0)
    warned = [
        text for text in json.loads((uninterrupted / "results.json").read_text())["warnings"] if "no round" in text
    ]
    assert bool(warned) == (0 in times.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "after", [pytest.param(1, marks=pytest.mark.exhaustive), 2, pytest.param(3, marks=pytest.mark.exhaustive), 4]
)
def test_a_stopped_run_goes_on_with_the_same_sites(
    after: int, study: Study, uninterrupted: Path, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop)
    (go_on if after == 2 else lambda s, f: run(s, f, resume=True))(study, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(uninterrupted)
    assert [line["asked"] for line in lines(tmp_path / "run")] == [line["asked"] for line in lines(uninterrupted)]


@pytest.mark.parametrize(
    "number",
    [1, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 4)), 3, pytest.param(5, marks=pytest.mark.slow)],
)
def test_a_kill_between_the_sites_snapshots_and_the_rounds_commit(
    number: int, study: Study, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the round in which a site takes part for the first time, and has no snapshot to go back to."""
    commit = Record.commit

    def stop(self: Record, model: str, done: Any, *, seconds: float) -> None:
        if done.number == number:
            raise KeyboardInterrupt
        commit(self, model, done, seconds=seconds)

    monkeypatch.setattr(Record, "commit", stop)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run")
    monkeypatch.undo()
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    assert digests(tmp_path / "run") == digests(uninterrupted)


def test_a_cohort_of_one_is_local_training(small_study: Make, tmp_path: Path) -> None:
    """In a round that only the west takes part in, the mean is the west's own update, to the bit."""
    cohorts = [["west"], ["north", "south"]]
    study = small_study(protocol__cohorts=cohorts, protocol__rounds=1, protocol__compare=["local"], test=False)
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    assert any("north, south took part in no round" in text for text in outcome.results["warnings"])
    files = ("weights/federated", "sites/west/models/local", "sites/north/models/federated")
    found = [load_file(tmp_path / f"run/{file}.safetensors") for file in files]
    assert all(torch.equal(found[0][n], other[n]) for other in found[1:] for n in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("update", ["scaffold", "ditto", pytest.param("fedadamw", marks=pytest.mark.exhaustive)])
def test_updates_that_keep_something_at_the_site(update: str, small_study: Make, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "local_update__name": update, "protocol__cohorts": [["north", "south"], ["west"]], "protocol__rounds": 4,
        "training__optimizer": "adamw", "validation__every": 1, "test": False,
    }  # fmt: skip
    study = small_study(**changes)
    outcome = run(study, tmp_path / "whole")
    assert outcome.results["problems"] == []

    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop)
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")
    if update == "ditto":
        curve = [json.loads(line) for line in (tmp_path / "whole/curves.jsonl").read_text().splitlines()]
        first = next(line for line in curve if line["model"] == "federated-personal" and line["round"] == 1)
        assert "west" not in first["dice"]
        assert "north" in first["dice"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"sharing__keep": ["norms"], "sharing__unseen": "mean"}, {"plan__fingerprint": "site"}]
)
def test_tensors_that_stay_at_the_sites(how: dict[str, Any], small_study: Make, tmp_path: Path) -> None:
    """A site that has not had its turn is not validated: it has nothing of its own yet."""
    study = small_study(
        protocol__cohorts=[["north", "south"], ["west"]], protocol__rounds=4, validation__every=1, **how
    )
    outcome = run(study, tmp_path / "whole")
    assert outcome.results["problems"] == []
    curve = [json.loads(line) for line in (tmp_path / "whole/curves.jsonl").read_text().splitlines()]
    assert [("west" in line["dice"], "north" in line["dice"]) for line in curve[:2]] == [(False, True), (True, True)]

    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop)
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    "rule",
    [*(pytest.param(r, marks=pytest.mark.exhaustive) for r in ("fednova", "momentum")), "adam", "median", "agreement"],
)
def test_rules_take_what_they_get(rule: str, small_study: Make, tmp_path: Path) -> None:
    n = 3 if rule == "agreement" else 2  # of two it could tell nothing, which is refused
    study = small_study(
        aggregation__name=rule, protocol__participation=0.7, protocol__min_sites=n, protocol__rounds=3, test=False
    )
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    assert [len(line["asked"]) for line in lines(tmp_path / "run")] == [n, n, n]
    weights = load_file(tmp_path / "run/weights/federated.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())


@pytest.mark.slow
def test_splitfed_in_turns(make: Make, tmp_path: Path) -> None:
    study = make(protocol__cohorts=[["north", "south"], ["west"]], protocol__rounds=4)
    assert run(study, tmp_path / "whole").exit_code == 0
    assert [line["asked"] for line in lines(tmp_path / "whole")] == [["north", "south"], ["west"]] * 2

    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop)
    run(study, tmp_path / "run", resume=True)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_a_site_that_failed_comes_back_in_its_next_turn(small_study: Make, tmp_path: Path) -> None:
    fuse = tmp_path / "fuse"
    fuse.touch()
    study = small_study(
        local_update__name="faults:raises", local_update__fuse=str(fuse), protocol__rounds=3, test=False,
        protocol__cohorts=[["north", "south"], ["west"]], protocol__min_sites=1,
    )  # fmt: skip
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 4
    first, second, third = lines(tmp_path / "run")
    assert (list(first["sites"]), list(first["failures"])) == (["south"], ["north"])
    assert (list(second["sites"]), second["failures"]) == (["west"], {})
    assert (list(third["sites"]), third["failures"]) == (["north", "south"], {})
