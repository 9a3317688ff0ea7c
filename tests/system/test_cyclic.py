"""Weights passed on from site to site: what they become, who sees them, what happens when a site fails or the run stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sessions import curves
from test_resume import digests, go_on
from torch import Tensor

import concilium
from concilium import catalog, wire
from concilium.beginning import initial_weights
from concilium.engines import ask
from concilium.exports import export_run
from concilium.finished import finished_models, open_finished
from concilium.line import Event, _connect, run
from concilium.messages import Card, Train, Trained
from concilium.predict import predict
from concilium.preparation import Ledger, ask_sites, plan_for, prepare_sites
from concilium.protocols._turns import order_of
from concilium.record import Record
from concilium.schedule import settings
from concilium.study import Study

pytestmark = pytest.mark.slow

Make = Callable[..., Study]
SITES = ("north", "south", "west")


@pytest.fixture(scope="module")
def cyclic(small_study: Make) -> Make:
    """SGD keeps its momentum at the site from round to round."""

    def make(**changes: Any) -> Study:
        given = {"protocol__name": "cyclic", "protocol__rounds": 3, "training__optimizer": "sgd", "test": False}
        return small_study(**given | changes)

    return make


@pytest.fixture(scope="module")
def whole(cyclic: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, with validation in between."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(cyclic(validation__every=2, test=True), folder).exit_code == 0
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def at(folder: Path, site: str, model: str = "cyclic") -> dict[str, Tensor]:
    return load_file(folder / "sites" / site / "models" / f"{model}.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --------------------------------------------------------------------------------------------------- what the weights become


def test_with_one_site_it_is_local_training(cyclic: Make, tmp_path: Path) -> None:
    assert run(cyclic(sites=("west",), protocol__compare=["local"]), tmp_path / "run").exit_code == 0
    assert same(at(tmp_path / "run", "west"), at(tmp_path / "run", "west", "local"))


def by_hand(study: Study, folder: Path) -> dict[str, Tensor]:
    """The same sites, trained one after the other with weights that travel in the open."""
    record = Record(folder, study, resume=False)
    engine = _connect(study, record, catalog.load("engines", "simulation"))
    (setting,) = settings(study)[0]
    plans = plan_for(setting, ask_sites(study, engine, record, Ledger()), record, Ledger())
    prepare_sites(setting, engine, record, plans, Ledger())
    weights = dict(initial_weights(study, plans))
    p = study.protocol
    n, order = p.steps or 0, p.options["order"]
    for number in range(1, p.rounds + 1):
        for site in order_of(study.sites, number, order=order, seed=study.study.seed):
            request = Train("hand", number, (number - 1) * n, n, p.rounds * n, weights, True)
            ((_, reply),) = ask(engine, {site: request})
            assert isinstance(reply, Trained)
            weights = dict(reply.weights)
    engine.close()
    record.close()
    return weights


@pytest.mark.parametrize("order", [None, ["south", "north"]])
def test_with_two_sites_it_is_one_after_the_other(order: Any, cyclic: Make, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sites": ("north", "south")} | ({"protocol__order": order} if order else {})
    study = cyclic(**changes)
    assert run(study, tmp_path / "run").exit_code == 0
    expected = by_hand(study, tmp_path / "hand")
    assert same(at(tmp_path / "run", "north"), expected)
    assert same(at(tmp_path / "run", "south"), expected)


def test_all_sites_and_that_of_the_test_set_end_with_the_same_model(whole: Path) -> None:
    assert all(same(at(whole, "north"), at(whole, site)) for site in ("south", "west", "test"))
    assert not list((whole / "weights").glob("*"))
    assert finished_models(whole) == ("cyclic:north", "cyclic:south", "cyclic:west")
    results = json.loads((whole / "results.json").read_text())
    assert {(c["model"], c["site"], c["subset"]) for c in results["cases"]} == {
        *(("cyclic", site, "validation") for site in SITES), ("cyclic", "test", "test"),
    }  # fmt: skip
    assert {site: took["n_steps"] for site, took in results["models"][0]["sites"].items()} == dict.fromkeys(SITES, 6)
    (curve,) = [json.loads(line) for line in (whole / "curves.jsonl").read_text().splitlines()]
    assert (curve["round"], set(curve["dice"])) == (2, {*SITES, "all"})


def test_it_predicts_and_is_exported_from_a_simulation(whole: Path, phantom: Path, tmp_path: Path) -> None:
    assert open_finished(whole).name == open_finished(whole, "cyclic:west").name == "cyclic"
    assert predict(whole, phantom / "test" / "imagesTr", tmp_path / "maps") == []
    assert len(list((tmp_path / "maps").glob("*.nii.gz"))) == 3
    export_run(whole, tmp_path / "out", format="safetensors", model="cyclic")
    (card,) = (path.read_text() for path in (tmp_path / "out").glob("*.md"))
    assert "passed on from site to site" in card
    assert concilium.Run(whole).models == finished_models(whole)


# ----------------------------------------------------------------------------------------------------------- who sees what


def canaries(weights: dict[str, Tensor]) -> list[bytes]:
    """Pieces of the tensors' bytes, of 64 bytes each, that would show anywhere they are not encrypted."""
    flat = [t.numpy().tobytes() for t in weights.values() if t.numel() >= 64 and t.is_floating_point()]
    return [raw[i : i + 64] for raw in flat for i in (0, len(raw) // 2 // 4 * 4)]


@pytest.mark.parametrize("protocol", ["cyclic", "federated"])
def test_nothing_that_the_server_gets_or_keeps_holds_weights(
    protocol: str, cyclic: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked for in all messages and in the server's files; in a federated run they are found: the search works."""
    sent: list[bytes] = []
    trained: list[dict[str, Tensor]] = []
    pack = wire.pack
    from concilium.answers.train import Learner

    finish = Learner.finish

    def noted(self: Learner, *args: Any, **options: Any) -> Trained:
        trained.append(self.weights())
        return finish(self, *args, **options)

    monkeypatch.setattr(Learner, "finish", noted)
    monkeypatch.setattr(wire, "pack", lambda message: sent.append(pack(message)) or sent[-1])
    study = cyclic(validation__every=1, **{} if protocol == "cyclic" else {"protocol__name": protocol})
    assert run(study, tmp_path / "run").exit_code == 0
    assert len(trained) == 9
    kept = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and "sites" not in p.parts]
    assert len(kept) > 5
    searched = b"".join([*sent, *kept])
    found = [piece in searched for weights in trained for piece in canaries(weights)]
    assert len(found) >= 9 * 10
    assert all(found) if protocol == "federated" else not any(found)


def test_the_server_gets_the_finished_model_where_the_study_reveals_it(
    cyclic: Make, whole: Path, tmp_path: Path
) -> None:
    outcome = run(cyclic(protocol__reveal=True, validation__every=2, test=True), tmp_path / "run")
    assert outcome.exit_code == 0
    assert same(load_file(tmp_path / "run/weights/cyclic.safetensors"), at(whole, "north"))
    assert same(at(tmp_path / "run", "test"), at(whole, "north"))
    assert finished_models(tmp_path / "run") == ("cyclic",)
    whole_results = json.loads((whole / "results.json").read_text())
    assert outcome.results["summary"] == whole_results["summary"]
    assert curves(tmp_path / "run") == curves(whole)


# ------------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("after", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_model(after: int, cyclic: Make, whole: Path, tmp_path: Path) -> None:
    study = cyclic(validation__every=2, test=True)

    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop)
    (go_on if after == 2 else lambda s, f: run(s, f, resume=True))(study, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(whole)
    assert [line["sites"].keys() for line in lines(tmp_path / "run")] == [dict.fromkeys(SITES).keys()] * 3


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_between_the_snapshots_and_the_commit(
    number: int, cyclic: Make, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = cyclic(validation__every=2, test=True)
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
    assert digests(tmp_path / "run") == digests(whole)


def test_a_site_that_fails_is_gone_round_and_comes_back(cyclic: Make, tmp_path: Path) -> None:
    """The north fails in round 1; from the south's weights on it goes by hand, then."""
    (tmp_path / "fuse").touch()
    order = ["north", "south", "west"]
    broken = cyclic(
        protocol__order=order, local_update__name="faults:raises", local_update__fuse=str(tmp_path / "fuse")
    )
    outcome = run(broken, tmp_path / "run")
    assert outcome.exit_code == 4
    first, *others = lines(tmp_path / "run")
    assert (list(first["sites"]), list(first["failures"])) == (["south", "west"], ["north"])
    assert all(list(line["sites"]) == ["north", "south", "west"] and line["failures"] == {} for line in others)
    (problem,) = outcome.results["problems"]
    assert problem.startswith("cyclic, round 1: north: failed")
    assert same(at(tmp_path / "run", "north"), at(tmp_path / "run", "south"))


def test_a_server_that_changes_what_it_carries_stops_a_turn_and_no_more(
    cyclic: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits changed on the way to the west in round 2: refused there, recorded, and the chain goes on from the one before it."""
    from concilium.protocols import cyclic as protocol

    one = protocol.one

    def tampering(engine: Any, site: str, request: Any, deadline_s: Any) -> Any:
        if isinstance(request, protocol.Pass) and (site, request.round) == ("west", 2):
            request.sealed[100] ^= 1
        return one(engine, site, request, deadline_s)

    monkeypatch.setattr(protocol, "one", tampering)
    outcome = run(cyclic(protocol__order=list(SITES)), tmp_path / "run")
    assert outcome.exit_code == 4
    assert [list(line["failures"]) for line in lines(tmp_path / "run")] == [[], ["west"], []]
    assert "contract" in outcome.results["problems"][0]


def test_a_server_that_puts_its_own_key_on_a_card_is_not_noticed_in_a_simulation_only(
    cyclic: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cards are not signed there (one owner's data); what is sealed for another key is of no use to the site it was for."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from concilium.protocols import cyclic as protocol
    from concilium.sealing import as_tensor

    introduced = protocol.introduced
    key = as_tensor(X25519PrivateKey.generate().public_key().public_bytes_raw())

    def lying(*given: Any) -> Any:
        cards, failures = introduced(*given)
        west = cards["west"]
        return cards | {"west": Card("west", key.clone(), west.certificate, west.signature)}, failures

    monkeypatch.setattr(protocol, "introduced", lying)
    outcome = run(cyclic(protocol__order=list(SITES), protocol__rounds=1), tmp_path / "run")
    assert outcome.exit_code == 4
    assert list(lines(tmp_path / "run")[0]["failures"]) == ["west"]


def test_the_finished_model_is_given_again_where_its_holder_was_gone(
    cyclic: Make, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concilium.errors import EngineError
    from concilium.messages import SiteLost
    from concilium.protocols import cyclic as protocol

    study = cyclic(validation__every=2, test=True)
    one = protocol.one

    def gone(engine: Any, site: str, request: Any, deadline_s: Any) -> Any:
        lost = isinstance(request, protocol.Keep) and (tmp_path / "run/checkpoints/cyclic/000003.safetensors").is_file()
        return SiteLost() if lost else one(engine, site, request, deadline_s)

    monkeypatch.setattr(protocol, "one", gone)
    with pytest.raises(EngineError, match=r"round 3: .*: lost\. It has the weights, and must give them to the others"):
        run(study, tmp_path / "run")
    monkeypatch.undo()
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    assert digests(tmp_path / "run") == digests(whole)


def test_folds_seeds_and_sites_left_out(cyclic: Make, tmp_path: Path) -> None:
    study = cyclic(protocol__rounds=1, validation__folds=2, validation__fold="all", validation__leave_one_site_out=True,
                   sites=("north", "south"), test=True, protocol__min_sites=1)  # fmt: skip
    outcome = run(study, tmp_path / "run")
    assert outcome.results["problems"] == []
    found = {(c["model"], c["site"], c["subset"]) for c in outcome.results["cases"]}
    assert {("cyclic", "test", "test"), ("cyclic-without-north", "north", "unseen")} <= found
    assert "cyclic:north" in finished_models(tmp_path / "run")
    assert len(open_finished(tmp_path / "run").files) == 2
    assert len(open_finished(tmp_path / "run", "cyclic.f1").files) == 1


@pytest.mark.parametrize("update", ["proximal", "distill"])
def test_with_other_local_updates_and_fine_tuning_at_each_site(update: str, cyclic: Make, tmp_path: Path) -> None:
    study = cyclic(local_update__name=update, personalize__steps=1, protocol__rounds=2, sites=("north", "west"))
    outcome = run(study, tmp_path / "run")
    assert outcome.results["problems"] == []
    own = {f"cyclic-finetuned:{site}" for site in ("north", "west")}
    assert {c["model"] for c in outcome.results["cases"]} == {"cyclic", *own}
    assert own <= set(finished_models(tmp_path / "run"))
    assert not same(at(tmp_path / "run", "west"), at(tmp_path / "run", "west", "cyclic-finetuned"))


@pytest.mark.exhaustive
def test_two_processes_give_the_same_bits(cyclic: Make, whole: Path, tmp_path: Path) -> None:
    assert run(cyclic(validation__every=2, test=True, engine__workers=2), tmp_path / "run").exit_code == 0
    assert digests(tmp_path / "run") == digests(whole)


def test_the_mark_goes_with_the_model(whole: Path) -> None:
    assert not any((whole / "sites" / site / "states" / "cyclic").exists() for site in SITES)
