"""Studies with each local update: from file to results, stopped and resumed, in one process and in two."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file
from sessions import curves
from torch import Tensor

import concilium
from concilium import wire
from concilium.exports import export_run
from concilium.finished import finished_models, open_finished
from concilium.line import Event, Outcome, run
from concilium.predict import predict
from concilium.record import Record
from concilium.reports.table import build, read_runs, to_text
from concilium.study import Study

pytestmark = pytest.mark.slow

Make = Callable[..., Study]
SITES = ("north", "south", "west")
OPTIONS: dict[str, dict[str, Any]] = {
    "proximal": {"mu": 0.1},
    "scaffold": {},
    "fedadamw": {"align": 0.5},
    "ditto": {"weight": 0.5},
    "distill": {"weight": 1.0, "temperature": 2.0},
}


@pytest.fixture
def make(small_study: Make) -> Make:
    """`make("ditto", weight=0.1, protocol__rounds=3)`: two sites, no test set, unless told otherwise."""

    def build(update: str, changes: Mapping[str, Any] | None = None, **options: Any) -> Study:
        table = {f"local_update__{key}": value for key, value in {"name": update, **options}.items()}
        return small_study(**{"sites": SITES[:2], "test": False, **table, **(changes or {})})

    return build


def models(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Every finished model, at the server and at the sites."""
    found = [*folder.glob("weights/*.safetensors"), *folder.glob("sites/*/models/*.safetensors")]
    return {str(path.relative_to(folder)): load_file(path) for path in found}


def same(a: Mapping[str, Mapping[str, Tensor]], b: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def at_site(folder: Path, site: str, model: str) -> dict[str, Tensor]:
    return load_file(folder / "sites" / site / "models" / f"{model}.safetensors")


# --------------------------------------------------------------------------------------------------------- every update


@pytest.mark.parametrize("name", ["proximal", "scaffold", "fedadamw", "distill"])
def test_a_study_with_it_runs_and_is_another_than_plain(name: str, make: Make, tmp_path: Path) -> None:
    """The baseline `local` trains by `plain`, whatever the study's update."""
    changes = {"protocol__compare": ["local"], "training__optimizer": "adamw" if name == "fedadamw" else "sgd"}
    outcome = run(make(name, changes, **OPTIONS[name]), tmp_path / "run")
    run(make("plain", changes), tmp_path / "plain")
    assert outcome.exit_code == 0
    found, plain = models(tmp_path / "run"), models(tmp_path / "plain")
    assert found.keys() == plain.keys()
    differ = {path for path in found if not equal(found[path], plain[path])}
    assert differ == {path for path in found if "local" not in path}


def test_scaffold_sends_as_much_again_as_the_weights(make: Make, tmp_path: Path) -> None:
    """From the second round on in both directions, and once more in the baselines that share nothing."""
    run(make("scaffold", {"protocol__compare": ["local"]}), tmp_path / "run")
    size = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "run/weights/federated.safetensors").values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    took = {(line["model"], line["round"]): line["sites"]["north"] for line in lines}
    near = partial(pytest.approx, rel=0.1)
    assert took["federated", 1]["bytes_down"] == near(size)
    assert took["federated", 1]["bytes_up"] == near(2 * size)
    assert took["federated", 2]["bytes_down"] == near(2 * size)
    assert took["federated", 2]["bytes_up"] == near(2 * size)
    assert took["local", 1]["bytes_up"] < 0.1 * size
    assert took["local", 2]["bytes_up"] < 0.1 * size


# ---------------------------------------------------------------------------------------------------------------- ditto


@pytest.fixture(scope="module")
def kept(small_study: Make, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Ditto whose own networks are held to nothing, beside sites that train alone; and a variant that holds them."""
    raw = {"local_update__name": "ditto", "local_update__weight": 0.0, "protocol__compare": ["local"]}
    study = small_study(**raw, validation__every=1, validation__select="best")
    return run(study, tmp_path_factory.mktemp("ditto") / "run")


def test_held_to_nothing_the_sites_own_are_those_that_train_alone(kept: Outcome) -> None:
    """To the bit: the same batches, the same start, the same rates; chosen after the same rounds."""
    assert kept.exit_code == 0
    for site in SITES:
        assert equal(at_site(kept.folder, site, "federated-personal"), at_site(kept.folder, site, "local"))
    assert not list((kept.folder / "weights").glob("*personal*")), "they never leave their sites"
    assert not list(kept.folder.glob("sites/*/models/*.best.safetensors"))
    assert not list(kept.folder.glob("sites/*/states/*")), "what is done is let go"


def test_they_are_scored_like_other_models_that_stay(kept: Outcome) -> None:
    results = json.loads((kept.folder / "results.json").read_text())
    schema = json.loads((Path(concilium.__file__).parent / "results.schema.json").read_text())
    Draft202012Validator(schema).validate(results)
    assert [m["name"] for m in results["models"]] == ["federated", "federated-personal", "local"]
    cases: dict[str, dict[Any, Any]] = {}
    for row in results["cases"]:
        place = (row["site"], row["subset"], row["case"], row["label"])
        cases.setdefault(row["model"], {})[place] = row["dice"]
    for site in SITES:
        assert cases[f"federated-personal:{site}"] == cases[f"local:{site}"]
        assert {place[0] for place in cases[f"federated-personal:{site}"]} == {site, "test"}
    pairs = {frozenset((c["a"], c["b"])) for c in results["comparisons"]}
    assert frozenset(("federated", "federated-personal")) in pairs
    told = [json.loads(line) for line in (kept.folder / "curves.jsonl").read_text().splitlines()]
    dice = {(c["model"], c["round"]): c["dice"] for c in told}
    for number in (1, 2):
        assert dice["federated-personal", number] == dice["local", number] != dice["federated", number]


def test_commands_know_them(kept: Outcome, phantom: Path, tmp_path: Path) -> None:
    own = [f"federated-personal:{site}" for site in SITES]
    assert finished_models(kept.folder) == (
        "federated", *(name for site in SITES for name in (f"federated-personal:{site}", f"local:{site}"))
    )  # fmt: skip
    opened = open_finished(kept.folder, own[1])
    assert equal(opened.weights()[0], at_site(kept.folder, "south", "federated-personal"))
    assert predict(kept.folder, phantom / "test" / "imagesTr", tmp_path / "out", model=own[1]) == []
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3
    assert "federated-personal" in to_text(build(read_runs([kept.folder])), "markdown")
    assert "federated-personal" in concilium.open_run(kept.folder).report().read_text()
    export_run(kept.folder, tmp_path / "card", format="safetensors", model=own[1])
    card = (tmp_path / "card" / "MODEL_CARD.md").read_text()
    assert "which south trained of its own beside `federated`" in card


def test_the_shared_model_is_that_of_plain_training(make: Make, tmp_path: Path) -> None:
    run(make("ditto", weight=0.5), tmp_path / "ditto")
    run(make("plain"), tmp_path / "plain")
    shared = {path: w for path, w in models(tmp_path / "ditto").items() if "personal" not in path}
    assert same(shared, models(tmp_path / "plain"))
    own = [at_site(tmp_path / "ditto", site, "federated-personal") for site in SITES[:2]]
    assert not equal(*own)


@pytest.mark.slow
def test_only_where_weights_are_shared_has_a_site_a_network_of_its_own(small_study: Make, tmp_path: Path) -> None:
    """Seeds and folds have theirs; models that were trained without a site have none."""
    study = small_study(
        sites=SITES[:2], local_update__name="ditto", study__seeds=2, validation__folds=2, validation__fold="all",
        protocol__rounds=1, protocol__steps=1, validation__leave_one_site_out=True,
    )  # fmt: skip
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    found = sorted(
        p.name.removesuffix(".safetensors") for p in (tmp_path / "run/sites/north/models").glob("*personal*")
    )
    assert found == [f"federated-personal{s}.f{f}" for s in ("", ".s4") for f in (0, 1)]
    tested = {(c["model"], c["seed"], c["fold"]) for c in outcome.results["cases"] if c["subset"] == "test"}
    assert ("federated-personal:south", 4, None) in tested, "the members of a model segment the test set together"


# ------------------------------------------------------------------------------------------------------ stops, processes


@pytest.mark.parametrize(("name", "optimizer"), [("scaffold", "sgd"), ("fedadamw", "adamw"), ("ditto", "sgd")])
def test_stopped_and_resumed_is_uninterrupted(
    name: str, optimizer: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, after stops at the end of a round, before a round is written, and before the sites' own were given."""
    changes = {"protocol__rounds": 3, "training__optimizer": optimizer, "validation__every": 2}
    study = make(name, changes, **OPTIONS[name])
    whole = run(study, tmp_path / "whole")

    def after(number: int, event: Event) -> None:
        if event.kind == "round" and event.round == number:
            raise KeyboardInterrupt

    def scored(model: str, event: Event) -> None:
        if (event.kind, event.model) == ("scored", model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=partial(after, 1))
    commit = Record.commit

    def unwritten(self: Record, model: str, done: Any, *, seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Record, "commit", unwritten)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", resume=True)
    monkeypatch.setattr(Record, "commit", commit)
    for stop in (partial(after, 3), *(partial(scored, model["name"]) for model in whole.results["models"])):
        with pytest.raises(KeyboardInterrupt):
            run(study, tmp_path / "run", watch=stop, resume=True)
    resumed = run(study, tmp_path / "run", resume=True)
    assert resumed.exit_code == 0
    assert same(models(tmp_path / "run"), models(tmp_path / "whole"))
    assert resumed.results["cases"] == whole.results["cases"]
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")
    again = run(study, tmp_path / "run", resume=True)
    assert again.results["cases"] == whole.results["cases"], "a run that is done stays as it is"


def test_a_site_that_fails_in_a_round_keeps_the_control_variate_of_before(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's total stays the mean, by training cases, of what the sites keep."""
    import concilium.local_updates.scaffold as scaffold

    finish, failed = scaffold.finish, []

    def fails(local: Any, *, steps: int) -> Any:
        sent = finish(local, steps=steps)
        if len(failed) < 3:
            failed.append(None)
            if len(failed) == 3:  # the first site in the second round, once it has changed its own
                raise RuntimeError
        return sent

    monkeypatch.setattr(scaffold, "finish", fails)
    study = make("scaffold", {"protocol__rounds": 3, "protocol__min_sites": 1})
    kept: dict[int, Any] = {}

    def watch(event: Event) -> None:
        if event.kind != "round":
            return
        folder = tmp_path / "run"
        number = f"{event.round:06d}.safetensors"
        server = wire.part(wire.read_tensors(folder / "checkpoints/federated" / number)[0], "control/")
        own = {}
        for site in SITES[:2]:
            own[site] = wire.part(
                wire.read_tensors(folder / f"sites/{site}/states/federated" / number)[0], "memory/own/"
            )
        kept[event.round] = server, own

    run(study, tmp_path / "run", watch=watch)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    cases = {site: told["n_cases"] for site, told in lines[0]["sites"].items()}
    assert [len(line["sites"]) for line in lines] == [2, 1, 2]
    out = next(iter(cases.keys() - lines[1]["sites"].keys()))
    assert equal(kept[1][1][out], kept[2][1][out])
    for server, own in kept.values():
        for name, tensor in server.items():
            mean = sum(n * own[site][name].double() for site, n in cases.items()) / sum(cases.values())
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", pytest.param("ditto", marks=pytest.mark.exhaustive)])
def test_worker_processes_do_not_change_a_bit(name: str, make: Make, tmp_path: Path) -> None:
    """Fewer workers than sites, so that states go to disk in between."""
    changes: dict[str, Any] = {"sites": SITES}
    run(make(name, changes, **OPTIONS[name]), tmp_path / "one")
    outcome = run(make(name, changes | {"engine__workers": 2}, **OPTIONS[name]), tmp_path / "two")
    assert outcome.exit_code == 0
    assert same(models(tmp_path / "one"), models(tmp_path / "two"))
