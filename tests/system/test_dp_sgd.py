"""Differentially private training through the whole line: its account in rounds and results, stopped and gone on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from sessions import lines, same, weights

import concilium
from concilium.errors import StudyError
from concilium.line import Event, Outcome, run
from concilium.local_updates.dp_sgd import account
from concilium.reports.html import write_report
from concilium.study import Study

pytestmark = pytest.mark.slow

Make = Callable[..., Study]
DP: dict[str, Any] = {
    "protocol__name": "federated", "protocol__cut": None, "protocol__rounds": 2, "protocol__compare": ["local"],
    "sites": ("north", "south"), "local_update__name": "dp_sgd", "local_update__rate": 0.3, "local_update__delta": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def study(make: Make) -> Study:
    return make(**DP)


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(study, tmp_path_factory.mktemp("private") / "run")


def test_the_account_is_in_every_round_and_in_the_results(finished: Outcome) -> None:
    assert (finished.exit_code, finished.results["problems"]) == (0, [])
    schema = json.loads((Path(concilium.__file__).parent / "results.schema.json").read_text())
    Draft202012Validator(schema).validate(json.loads((finished.folder / "results.json").read_text()))
    for number, line in enumerate(lines(finished.folder, "federated"), start=1):
        for site in line["sites"].values():
            expected = account([(1.0, 0.3, 2)] * number, delta=0.01, accountant="rdp")
            assert site["privacy"]["epsilon"] == expected
            assert (site["privacy"]["steps"], site["loss"]) == (2 * number, 0.0)
    private, local = finished.results["models"]
    assert {t["privacy"]["steps"] for t in private["sites"].values()} == {4}
    assert not any("privacy" in t for t in local["sites"].values())
    assert all(line["sites"]["north"]["loss"] > 0 for line in lines(finished.folder, "local"))


def test_the_report_shows_it(finished: Outcome) -> None:
    page = write_report(finished.folder).read_text(encoding="utf-8")
    assert "Differential privacy of a patient" in page
    assert "Not accounted for" in page


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_and_the_same_account(
    study: Study, finished: Outcome, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if (event.kind, event.model, event.round) == ("round", "federated", 1):
            raise Stopped

    with pytest.raises(Stopped):
        run(study, tmp_path / "run", watch=stop)
    again = run(study, tmp_path / "run", resume=True)
    assert same(weights(finished.folder, "federated"), weights(again.folder, "federated"))
    told = [[line["sites"]["north"]["privacy"] for line in lines(o.folder, "federated")] for o in (finished, again)]
    assert told[0] == told[1]


def test_no_two_models_have_the_same_noise(study: Study, tmp_path: Path) -> None:
    """Their difference would have none. One step from the same weights, with noise a hundred times as large."""
    training = replace(study.training, optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=1e-3)
    much = replace(study.local_update, options={**study.local_update.options, "noise": 100.0})
    short = replace(study.protocol, rounds=1, steps=1, compare=())
    one = replace(study, training=training, local_update=much, protocol=short, test=None)
    made = run(replace(one, variants={"again": one}), tmp_path / "run")
    first, again = (weights(made.folder, name) for name in ("federated", "again"))
    off = torch.cat([(first[n] - again[n]).flatten() for n in first])
    assert float(off.std()) > 1e-6
    more = [json.loads(one)["start"] for one in (made.folder / "sites/north/privacy.jsonl").read_text().splitlines()]
    assert len(more) == len(set(more)) == 2


@pytest.mark.parametrize("protocol", ["local", "cyclic", "splitfed"])
def test_protocols_with_other_messages_are_refused(make: Make, protocol: str) -> None:
    with pytest.raises(StudyError) as refused:
        make(**DP | {"protocol__name": protocol, "protocol__compare": []})
    assert "'dp_sgd' is not allowed with" in str(refused.value)
    assert "Allowed: 'federated'" in str(refused.value) or "Allowed: 'plain'" in str(refused.value)


def test_a_batch_norm_is_refused_before_anything_trains(make: Make, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="normalise over the batch"):
        run(make(**DP | {"network__norm": "batch"}), tmp_path / "run")
