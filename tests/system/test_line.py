"""The line from study to results, against what must be equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file
from torch import Tensor

import concilium
import concilium.messages
from concilium import wire
from concilium.line import Outcome, run
from concilium.study import Study

Make = Callable[..., Study]


def weights(folder: Path, model: str = "federated") -> dict[str, Tensor]:
    return load_file(folder / "weights" / f"{model}.safetensors")


def at_site(folder: Path, site: str, model: str) -> dict[str, Tensor]:
    return load_file(folder / "sites" / site / "models" / f"{model}.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def whole(small_study: Make, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Federated with both baselines."""
    study = small_study(protocol__compare=["local", "centralized"])
    return run(study, tmp_path_factory.mktemp("whole") / "run")


def test_it_ends_as_asked_and_says_everything(whole: Outcome) -> None:
    results = json.loads((whole.folder / "results.json").read_text())
    schema = json.loads((Path(concilium.__file__).parent / "results.schema.json").read_text())
    Draft202012Validator(schema).validate(results)
    assert whole.exit_code == 0
    assert results["complete"]
    assert [m["name"] for m in results["models"]] == ["federated", "local", "centralized", "centralized_long"]
    for name in ("study.toml", "fingerprint.json", "plans.json", "dataset.json", "environment.json", "rounds.jsonl"):
        assert (whole.folder / name).stat().st_size > 0


def test_models_take_the_steps_that_make_them_comparable(whole: Outcome) -> None:
    models = {m["name"]: m for m in whole.results["models"]}
    assert {n: (m["updates"], m["patches"]) for n, m in models.items()} == {
        "federated": (4, 24),  # 2 rounds x 2 steps at each of 3 sites, batch 2
        "local": (4, 24),
        "centralized": (4, 8),
        "centralized_long": (12, 24),
    }


def test_every_model_is_scored_on_the_same_cases(whole: Outcome) -> None:
    seen: dict[tuple[str, str], set[str]] = {}
    for case in whole.results["cases"]:
        seen.setdefault((case["model"], case["site"]), set()).add(case["case"])
    for site in ("north", "south", "west", "test"):
        assert seen["federated", site] == seen["centralized", site] == seen["centralized_long", site]
        if site != "test":
            assert seen[f"local:{site}", site] == seen["federated", site]
            assert seen[f"local:{site}", "test"] == seen["federated", "test"]


def test_server_and_sites_hold_the_same_tensors_at_the_end(whole: Outcome) -> None:
    for site in ("north", "south", "west", "test"):
        assert same(weights(whole.folder), at_site(whole.folder, site, "federated"))


def test_a_round_sends_the_weights_once_each_way(whole: Outcome) -> None:
    size = sum(t.numel() * t.element_size() for t in weights(whole.folder).values())
    lines = [json.loads(line) for line in (whole.folder / "rounds.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["model"] == "federated"):
        assert line["matched"] == len(weights(whole.folder))
        for site in line["sites"].values():
            assert (
                size < site["bytes_down"] < size * 1.01 + 20_000
            )  # a header names the tensors: 2 % of this tiny network
            assert size < site["bytes_up"] < size * 1.01 + 20_000


def test_one_site_alone_is_local_training_to_the_bit(small_study: Make, tmp_path: Path) -> None:
    run(small_study(sites=("north",), test=False, protocol__compare=["local"], protocol__rounds=3), tmp_path / "run")
    assert same(weights(tmp_path / "run"), at_site(tmp_path / "run", "north", "local"))


def one_round(small_study: Make, folder: Path, rule: str = "mean") -> bool:
    """Whether one federated round gave the mean, weighted by cases, of what the sites make of the initial weights alone.

    The local models are those updates: same initial weights, same batches.
    """
    study = small_study(protocol__rounds=1, protocol__compare=["local"], test=False, aggregation__name=rule)
    outcome = run(study, folder)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    cases = {
        site: line["sites"][site]["n_cases"] for line in lines if line["model"] == "federated" for site in line["sites"]
    }
    assert outcome.exit_code == 0
    assert len(set(cases.values())) == 3  # else the weights would not matter
    updates = {site: at_site(folder, site, "local") for site in cases}
    mean = {
        name: (sum(updates[s][name].double() * n for s, n in cases.items()) / sum(cases.values())).float()  # type: ignore[union-attr]
        for name in updates["north"]
    }
    shared = weights(folder)
    return all(torch.allclose(shared[n], mean[n], rtol=0, atol=1e-7) for n in mean)


def test_aggregation_is_the_weighted_mean_of_what_the_sites_learnt(small_study: Make, tmp_path: Path) -> None:
    assert one_round(small_study, tmp_path / "run")


@pytest.mark.parametrize("rule", [pytest.param("faults:nothing", marks=pytest.mark.slow), "faults:swapped"])
def test_a_wrong_aggregation_would_be_noticed(rule: str, small_study: Make, tmp_path: Path) -> None:
    assert not one_round(small_study, tmp_path / "run", rule)


@pytest.mark.slow
def test_loader_workers_do_not_change_a_bit(small_study: Make, whole: Outcome, tmp_path: Path) -> None:
    run(small_study(training__loader_workers=2, test=False), tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(whole.folder))


@pytest.mark.slow
def test_worker_processes_do_not_change_a_bit(small_study: Make, whole: Outcome, tmp_path: Path) -> None:
    study = small_study(engine__workers=2, protocol__compare=["local"])
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    assert same(weights(tmp_path / "run"), weights(whole.folder))
    for site in ("north", "south", "west"):
        assert same(at_site(tmp_path / "run", site, "local"), at_site(whole.folder, site, "local"))


def test_nothing_that_names_a_case_leaves_a_site(
    small_study: Make, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    pack = wire.pack

    def recording(message: object) -> bytes:
        packed = pack(message)
        if type(message).__name__ not in {r.__name__ for r in concilium.messages.REQUESTS}:
            sent.append(packed)
        return packed

    monkeypatch.setattr(wire, "pack", recording)
    run(small_study(), tmp_path / "run")
    everything = b"".join(sent)
    assert len(sent) > 20
    names = [p.name.removesuffix(".nii.gz") for p in phantom.glob("*/labelsTr/*.nii.gz")]
    patients = {p for d in phantom.glob("*/dataset.json") for p in json.loads(d.read_text())["patient"].values()}
    assert len(names) == 16
    for secret in (*names, *patients, str(tmp_path), str(phantom)):
        assert secret.encode() not in everything


def test_epochs_are_passes_over_the_sites_own_cases(small_study: Make, tmp_path: Path) -> None:
    study = small_study(test=False, protocol__steps=None, protocol__epochs=1.0)
    outcome = run(study, tmp_path / "run")
    (model,) = outcome.results["models"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    for site, took in model["sites"].items():
        n_cases = lines[0]["sites"][site]["n_cases"]
        assert took["n_steps"] == 2 * -(-n_cases // 2)  # 2 rounds, batch 2, rounded up
