"""Studies that start from what another has learnt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import concilium.line
from concilium.data.plan import open_plan
from concilium.errors import DataError, StudyError
from concilium.line import Event, Outcome, run
from concilium.messages import Tensors
from concilium.networks.nnunet import to_library
from concilium.protocols import Round, start_with
from concilium.study import Study

Make = Callable[..., Study]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Tensors]:
    """What each model starts from, in the order of training."""
    seen: list[Tensors] = []

    def starting(weights: Tensors) -> Round:
        seen.append({name: t.clone() for name, t in weights.items()})
        return start_with(weights)

    monkeypatch.setattr(concilium.line, "start_with", starting)
    return seen


@pytest.fixture(scope="module")
def first(small_study: Make, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run to start from."""
    study = small_study(protocol__rounds=2, protocol__steps=12, training__learning_rate=0.01, test=False)
    return run(study, tmp_path_factory.mktemp("first") / "run")


def weights(outcome: Outcome) -> dict[str, Tensor]:
    return load_file(outcome.folder / "weights" / "federated.safetensors")


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def losses(folder: Path) -> dict[tuple[str, int], float]:
    """Mean over the sites, by model and round."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return {
        (line["model"], line["round"]): sum(s["loss"] for s in line["sites"].values()) / len(line["sites"])
        for line in lines
    }


def table(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "start_from.json").read_text()))


@pytest.mark.slow
def test_every_model_starts_from_a_run_and_its_loss_is_lower(
    first: Outcome, small_study: Make, starts: list[Tensors], tmp_path: Path
) -> None:
    changes = {"study__seed": 8, "protocol__rounds": 1, "test": False}
    run(small_study(**changes), tmp_path / "scratch")
    told: list[Event] = []
    study = small_study(**changes, network__weights=str(first.folder), protocol__compare=["local", "centralized"])
    outcome = run(study, tmp_path / "run", watch=told.append)
    assert outcome.exit_code == 0
    assert not same(starts[0], starts[1])
    assert len(starts) == 5
    assert all(same(start, weights(first)) for start in starts[1:])
    scratch, further = losses(tmp_path / "scratch"), losses(outcome.folder)
    for model in ("federated", "local"):
        assert further[model, 1] < 0.75 * scratch["federated", 1]
    n = len(weights(first))
    file = first.folder / "weights" / "federated.safetensors"
    assert [e.text for e in told if e.text.startswith("Starting")] == [f"Starting from {file}: {n} of {n} tensors"]
    assert table(outcome.folder) == {
        "file": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "fraction": 1.0,
        "tensors": n,
        "matched": list(starts[0]),
        "missing": [],
        "other_shape": [],
        "refitted": [],
        "unused": [],
        "min_matched": 0.9,
    }


def test_a_model_folder_of_nnunet_gives_its_tensors(
    first: Outcome, small_study: Make, starts: list[Tensors], tmp_path: Path
) -> None:
    plans = (first.folder / "plans.json").read_text()
    about = json.loads((first.folder / "dataset.json").read_text())
    size = {"n_channels": len(about["channel_names"]), "n_labels": len(about["labels"])}
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(plans)
    theirs = to_library(weights(first), plan=open_plan(plans, "3d_fullres").architecture, **size)
    torch.save({"network_weights": theirs, "trainer_name": "x"}, folder / "fold_0" / "checkpoint_final.pth")
    run(small_study(test=False, protocol__rounds=1, network__weights=str(folder), study__seed=9), tmp_path / "run")
    assert same(starts[0], weights(first))


def test_heads_and_what_is_not_there_are_drawn(
    first: Outcome, small_study: Make, starts: list[Tensors], tmp_path: Path
) -> None:
    kept = {n: t for n, t in weights(first).items() if not n.startswith("up0.")}
    kept |= {n: torch.ones(7, *t.shape[1:]) for n, t in kept.items() if n.startswith("head0")}
    save_file(kept, tmp_path / "w.safetensors")
    changes = {"test": False, "protocol__rounds": 1, "study__seed": 3}
    changes |= {"network__weights": str(tmp_path / "w.safetensors"), "network__min_matched": 0.5}
    told: list[Event] = []
    run(small_study(**changes), tmp_path / "run", watch=told.append)
    run(small_study(test=False, protocol__rounds=1, study__seed=3), tmp_path / "scratch")
    start, drawn = starts
    new = {n for n in start if n.startswith(("up0.", "head0."))}
    assert all(torch.equal(start[n], drawn[n] if n in new else kept[n]) for n in start)
    (note,) = [e.text for e in told if e.text.startswith("Starting")]
    assert f"{len(start) - len(new)} of {len(start)} tensors; drawn anew: up0." in note
    shapes = {e["name"]: (e["there"][0], e["here"][0]) for e in table(tmp_path / "run")["other_shape"]}  # type: ignore[attr-defined]
    assert shapes == {n: (7, len(drawn[n])) for n in new if n.startswith("head0.")}


def test_too_little_or_nothing_stops_the_run(first: Outcome, small_study: Make, tmp_path: Path) -> None:
    wider = small_study(test=False, network__base_features=8, network__weights=str(first.folder))
    with pytest.raises(StudyError, match=r"2 of \d+ tensors fit .* 0% .* of another shape: .* instead of"):
        run(wider, tmp_path / "wider")
    assert not (tmp_path / "wider" / "cache").exists()  # before anything is preprocessed
    with pytest.raises(StudyError, match="does not exist"):
        run(small_study(network__weights=str(tmp_path / "gone.pth")), tmp_path / "gone")
    assert not (tmp_path / "gone" / "fingerprint.json").exists()  # before a case is read
    with pytest.raises(StudyError, match=r"no finished model 'local'\. Known: federated\. Choose one with RUN#MODEL"):
        run(small_study(network__weights=f"{first.folder}#local"), tmp_path / "local")
    (tmp_path / "w.pth").write_bytes(b"\x80\x02}.")
    with pytest.raises(DataError, match=r"w\.pth cannot be used as weights"):
        run(small_study(test=False, network__weights=str(tmp_path / "w.pth")), tmp_path / "damaged")


class Stopped(Exception):
    """A kill, without the process."""


@pytest.mark.parametrize("change", [pytest.param("as it was", marks=pytest.mark.exhaustive), "changed", "gone"])
def test_a_run_goes_on_from_what_it_began_with(
    change: str, first: Outcome, small_study: Make, starts: list[Tensors], tmp_path: Path
) -> None:
    source = tmp_path / "w.safetensors"
    save_file(weights(first), source)
    study = small_study(test=False, protocol__rounds=1, protocol__compare=["local"], network__weights=str(source))

    def stop(event: Event) -> None:
        if event.kind == "scored":
            raise Stopped

    with pytest.raises(Stopped):
        run(study, tmp_path / "run", watch=stop)
    if change == "changed":
        save_file({n: t + 1 for n, t in weights(first).items()}, source)
    elif change == "gone":
        source.unlink()
    outcome = run(study, tmp_path / "run", resume=True)
    assert len(starts) == 2  # of `federated`, and after the stop of `local`
    assert all(same(start, weights(first)) for start in starts)
    warned = [w for w in outcome.results["warnings"] if "has changed since the run began" in w]
    assert len(warned) == (change == "changed")
