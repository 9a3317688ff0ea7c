"""Runs of splitfed that are watched from inside, and answers of a site that are wrong on purpose."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import SECRET
from safetensors.torch import load_file
from torch import Tensor

import concilium.line
from concilium import wire
from concilium.answers import Settings
from concilium.answers.split import Session
from concilium.engines import Engine
from concilium.engines._workers import InlineWorker, News
from concilium.line import Event, Outcome, run
from concilium.messages import Front, Maps, Trained
from concilium.optimization import state_of
from concilium.protocols import Round
from concilium.record import Record
from concilium.study import Study

Make = Callable[..., Study]
SITES = {"north", "south", "west"}
VARIANTS, METHODS = ("v1", "v2", "v3", "sequential"), ("front", "tail", "finish")
Answer = Callable[[Any], Any]


def several(
    *chosen: tuple[Any, ...], names: tuple[str, ...], of: Sequence[Sequence[Any]], indirect: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Every value of each, with some of the others; all combinations with `./test --all`."""
    every = list(itertools.product(*of))
    assert all({one[i] for one in chosen} == set(values) for i, values in enumerate(of))
    assert set(chosen) <= set(every)
    return pytest.mark.parametrize(
        names,
        [one if one in chosen else pytest.param(*one, marks=pytest.mark.exhaustive) for one in every],
        indirect=indirect,
    )


@dataclass
class Watched:
    """What a run that is watched from inside has shown."""

    rounds: list[Round] = field(default_factory=list)
    updates: dict[tuple[str, int], Trained] = field(default_factory=dict)
    optimizers: dict[tuple[str, int, str], Mapping[str, Tensor]] = field(default_factory=dict)
    """Of front and tail, by site, round, and `before` or `after` it."""
    engines: list[Any] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)

    def nothing_is_left(self, event: Event) -> None:
        """At the end of a round: no request on its way, and no session at a site of this process."""
        if event.kind == "round":
            assert self.engines[-1]._pending == {}
            for worker in self.engines[-1]._workers:
                assert not any(site._models.is_between_steps for site in worker._host.sites.values())


def watch(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Have what the next runs do seen."""
    seen = Watched()
    front, finish, commit = Session.front, Session.finish, Record.commit
    connect, pack = concilium.line._connect, wire.pack

    def fronts(self: Session, request: Front, cancelled: Any) -> Maps:
        if request.step == 0:
            seen.optimizers[(*whose(self), "before")] = copied(self)
        return front(self, request, cancelled)

    def finishes(self: Session, request: Any) -> Trained:
        trained = finish(self, request)
        seen.optimizers[(*whose(self), "after")] = copied(self)
        seen.updates[whose(self)] = trained
        return trained

    def commits(self: Record, model: str, done: Round, *, seconds: float) -> None:
        if model == "splitfed":
            seen.rounds.append(done)
        commit(self, model, done, seconds=seconds)

    def connects(*args: Any) -> Engine:
        seen.engines.append(connect(*args))
        return seen.engines[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(Session, "front", fronts)
    monkeypatch.setattr(Session, "finish", finishes)
    monkeypatch.setattr(Record, "commit", commits)
    monkeypatch.setattr(concilium.line, "_connect", connects)
    monkeypatch.setattr(wire, "pack", lambda message: seen.sent.append(pack(message)) or seen.sent[-1])
    return seen


def whose(session: Session) -> tuple[str, int]:
    """Site and round."""
    return session._keys[0][1], session.round


def copied(session: Session) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in state_of(session.learner.optimizer)[0].items()}


def spoil(
    monkeypatch: pytest.MonkeyPatch, method: str, wrong: Answer, *, site: str = "south", number: int = 2, step: int = 1
) -> None:
    """Let a site's answer in one step of a round be `wrong` of what it would be."""
    original = getattr(Session, method)

    def instead(self: Session, request: Any, *rest: Any) -> Any:
        reply = original(self, request, *rest)
        at = whose(self) == (site, number) and getattr(request, "step", step) == step
        return wrong(reply) if at else reply

    monkeypatch.setattr(Session, method, instead)


def fails(_: Any) -> Any:
    raise RuntimeError(SECRET)


def quick(split_study: Make, **changes: Any) -> Study:
    """A study of three rounds of two steps, as quick as there is."""
    small = {"network__name": "unet", "network__levels": 2, "network__base_features": 2, "protocol__cut": "shallow"}
    small |= {"protocol__rounds": 3, "training__optimizer": "sgd", "training__deep_supervision": False}
    return split_study(**small | changes)


def weights(folder: Path, model: str = "splitfed") -> dict[str, Tensor]:
    return load_file(folder / "weights" / f"{model}.safetensors")


def at_site(folder: Path, site: str, model: str = "splitfed") -> dict[str, Tensor]:
    return load_file(folder / "sites" / site / "models" / f"{model}.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def lines(folder: Path, model: str = "splitfed") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [line for line in found if line["model"] == model]


def told(outcome: Outcome, *, failed: str = "south", code: str) -> None:
    """The second round went on without one site, the third is whole, and everything says so."""
    assert outcome.exit_code == 4
    assert not outcome.results["complete"]
    (problem,) = outcome.results["problems"]
    assert problem.startswith(f"splitfed, round 2: {failed}: ")
    assert code in problem
    first, second, third = lines(outcome.folder)
    assert first["failures"] == third["failures"] == {}
    assert set(first["sites"]) == set(third["sites"]) == SITES
    assert set(second["sites"]) == SITES - {failed}
    assert set(second["failures"]) == {failed}
    assert code in second["failures"][failed]["text"]
    (model,) = outcome.results["models"]
    assert {site: took["n_steps"] for site, took in model["sites"].items()} == {
        site: 4 if site == failed else 6 for site in SITES
    }


def rounds_without_south(split_study: Make, folder: Path) -> list[Round]:
    """Rounds of `v1` in which the south is out of the second, before it has begun."""
    with pytest.MonkeyPatch.context() as patch:
        rounds: list[Round] = []
        commit = Record.commit
        patch.setattr(
            Record,
            "commit",
            lambda self, m, done, *, seconds: (rounds.append(done), commit(self, m, done, seconds=seconds)),
        )
        spoil(patch, "front", fails, step=0)
        run(quick(split_study, protocol__variant="v1"), folder)
    return rounds


class Killed(BaseException):
    """Stands for the signal that ends a process."""


class Mortal(InlineWorker):
    """A worker in this process that can die."""

    def __init__(self, settings: Sequence[Settings], run: str, epochs: Mapping[str, int]) -> None:
        super().__init__(settings, run, epochs)
        self.hosted = (settings, run)

    def news(self) -> list[News]:
        try:
            return super().news()
        except Killed:
            return [News("lost")]

    def restart(self, epochs: Mapping[str, int]) -> None:
        self._calls.clear()
        self._begun = None
        self._host = type(self._host)(*self.hosted, epochs)


def curves(folder: Path) -> list[dict[str, Any]]:
    """Of a run: Dice after rounds, without the bytes, in which seconds are written as text."""
    lines = map(json.loads, (folder / "curves.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "bytes"} for line in lines]
