"""What a site does with weights that are passed on: never in the open again, each message once, and only as its owner allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from concilium import catalog
from concilium.answers import Policy, Settings
from concilium.beginning import initial_weights
from concilium.errors import ContractError, PrivacyError
from concilium.line import _connect
from concilium.messages import Fetch, Forget, Front, Hand, Introduce, Pass, Restore, Snapshot, Take, Train
from concilium.preparation import Ledger, ask_sites, plan_for, prepare_sites
from concilium.record import Record
from concilium.schedule import settings
from concilium.sealing import NOTHING
from concilium.site import Site
from concilium.study import parse_study

Make = Callable[..., "Pair"]


class Pair:
    """Two simulated sites that are prepared, asked directly: what they raise is seen."""

    def __init__(self, phantom: Path, folder: Path) -> None:
        raw: dict[str, Any] = {
            "study": {"name": "small", "seed": 3},
            "sites": {name: {"data": str(phantom / name)} for name in ("north", "west")},
            "protocol": {"rounds": 3, "steps": 1},
            "network": {"name": "unet", "levels": 2, "base_features": 2},
            "training": {"optimizer": "sgd", "batch_size": 2, "patch_size": [16, 16, 8], "mirror": False},
            "engine": {"threads": 1, "device": "cpu"},
        }
        study = parse_study(raw, folder=phantom)
        record = Record(folder, study, resume=False)
        engine: Any = _connect(study, record, catalog.load("engines", "simulation"))
        (setting,) = settings(study)[0]
        plans = plan_for(setting, ask_sites(study, engine, record, Ledger()), record, Ledger())
        prepare_sites(setting, engine, record, plans, Ledger())
        self.sites: dict[str, Site] = engine._workers[0]._host.sites
        self.initial = initial_weights(study, plans)
        record.close()

    def ask(self, site: str, request: Any) -> Any:
        return self.sites[site].answer(request, lambda: False)

    def card(self, site: str) -> Any:
        return self.ask(site, Introduce("m", 1)).card

    def first(self, *, number: int = 1, reveal: bool = False, to: str | None = "west", model: str = "m") -> Tensor:
        """The north trains first; what it sealed for the other in the same round."""
        train = Train(model, number, 0, 1, 3, self.initial, False)
        card = self.card(to) if to else None
        return self.ask("north", Pass(train, None, NOTHING, card, number, reveal)).sealed  # type: ignore[no-any-return]

    def second(
        self, sealed: Tensor, *, number: int = 1, reveal: bool = False, sender: str = "north", model: str = "m"
    ) -> Any:
        train = Train(model, number, 0, 1, 3, {}, False)
        return self.ask("west", Pass(train, self.card(sender), sealed, None, number, reveal))


@pytest.fixture
def pair(phantom: Path, tmp_path: Path) -> Pair:
    return Pair(phantom, tmp_path / "run")


def test_a_message_is_opened_once_in_its_own_round_and_place(pair: Pair) -> None:
    sealed = pair.first()
    with pytest.raises(ContractError, match="cannot be opened"):
        pair.second(sealed, number=2)  # another round's
    with pytest.raises(ContractError, match="cannot be opened"):
        pair.second(sealed, model="other")
    with pytest.raises(ContractError, match="cannot be opened"):
        pair.second(sealed, sender="west")
    with pytest.raises(ContractError, match="cannot be opened"):  # one of passing on is none to keep
        pair.ask("west", Take("m", 1, pair.card("north"), sealed, False))
    pair.second(sealed)
    with pytest.raises(ContractError, match=r"for round 1 came to west\. It has taken those of round 1"):
        pair.second(sealed)
    pair.ask("west", Restore("m", 0))  # the round is taken again: a server that was stopped goes on so
    pair.second(sealed)


def test_a_failed_turn_can_be_taken_again(pair: Pair) -> None:
    sealed = pair.first()
    with pytest.raises(ContractError):
        pair.second(sealed[:-1])
    pair.second(sealed)


def test_what_was_passed_on_does_not_leave_in_the_open_whatever_life_the_site_is_in(pair: Pair) -> None:
    pair.second(pair.first())
    west = pair.sites["west"]
    pair.ask("west", Snapshot("m", 1))
    opening = [
        Train("m", 2, 1, 1, 3, {}, True), Train("m", 2, 1, 1, 3, pair.initial, True), Train("m", 2, 1, 1, 3, {}, False),
        Front("m", 2, ("down0", "up0"), False, 0, 1, 1, 3, {}, ()), Hand("m", 1, None, False, False),
        Fetch("m"),
    ]  # fmt: skip
    again = Site(west.settings, run=west.run, epoch=1)
    again._job = west._job
    for site in (west, again):
        site.answer(Restore("m", 1), lambda: False)
        for request in opening:
            with pytest.raises(PrivacyError) as e:
                site.answer(request, lambda: False)
            assert e.value.rule == "sealed"
        with pytest.raises(PrivacyError, match=r"came with reveal = True\. It began here with reveal = False"):
            site.answer(Hand("m", 1, None, False, True), lambda: False)
    pair.ask("west", Forget("m"))  # and then there is nothing left to send
    with pytest.raises(ContractError, match="never trained here"):
        pair.ask("west", Hand("m", 1, None, False, True))


def test_the_server_has_the_model_where_all_were_told_from_the_start(pair: Pair) -> None:
    sealed = pair.first(reveal=True)
    with pytest.raises(ContractError, match="cannot be opened"):  # sites are not told different things
        pair.second(sealed, reveal=False, model="m")
    pair.ask("west", Forget("m"))
    pair.second(sealed, reveal=True)
    weights = pair.ask("west", Hand("m", 1, None, False, True)).weights
    assert weights.keys() == pair.initial.keys()
    assert any(not torch.equal(weights[n], t) for n, t in pair.initial.items())


@pytest.mark.parametrize(
    ("policy", "rule"), [(Policy(reveal=False), "reveal"), (Policy(open_weights=False), "open_weights")]
)
def test_a_sites_owner_decides(policy: Policy, rule: str, pair: Pair) -> None:
    west = pair.sites["west"]
    west.settings = replace(west.settings, policy=policy)
    sealed = pair.first(reveal=rule == "reveal")
    card = pair.card("north")
    forbidden: dict[str, list[Any]] = {
        "reveal": [
            Pass(Train("m", 1, 0, 1, 3, {}, False), card, sealed, None, 1, True), Hand("m", 1, None, False, True),
            Take("m", 1, card, sealed, True),
        ],
        "open_weights": [
            Train("o", 1, 0, 1, 3, pair.initial, True), Front("o", 1, ("down0", "up0"), False, 0, 1, 0, 3, {}, ()),
            Hand("m", 1, None, False, True), Fetch("m"),
        ],
    }  # fmt: skip
    for request in forbidden[rule]:
        with pytest.raises(PrivacyError) as e:
            pair.ask("west", request)
        assert e.value.rule == rule
    if rule == "open_weights":
        pair.second(sealed)
        pair.ask("west", Train("alone", 1, 0, 1, 3, pair.initial, False))  # what does not leave may be trained


def test_weights_that_are_not_finite_are_not_taken(pair: Pair) -> None:
    pair.initial = {n: torch.full_like(t, float("nan")) for n, t in pair.initial.items()}
    north = pair.sites["north"]
    learner = north._models.learner(north._prepared_job(), "m")
    learner.load_weights(pair.initial)
    north._models.changed()
    sealed = pair.ask("north", Hand("m", 1, pair.card("west"), False, False)).sealed
    with pytest.raises(ContractError, match=r"are not finite\. Expected finite ones"):
        pair.second(sealed)


def test_the_key_lies_where_the_site_says(pair: Pair, tmp_path: Path) -> None:
    west = pair.sites["west"]
    assert isinstance(west.settings, Settings)
    before = pair.card("west").key
    moved = Site(replace(west.settings, sealing_key=tmp_path / "kit" / "sealing.key"), run=west.run, epoch=1)
    assert not torch.equal(moved.answer(Introduce("m", 1), lambda: False).card.key, before)  # type: ignore[union-attr]
    assert (tmp_path / "kit" / "sealing.key").is_file()
