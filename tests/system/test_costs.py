"""What training costs: told before, and beside what a run measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import concilium as cc
from concilium import advice
from concilium.errors import StudyError
from concilium.forecast import Cost
from concilium.line import run
from concilium.reports._bytes import forecasts
from concilium.reports.planned import grids
from concilium.study import Study, forecast_by, parse_study, to_toml

Make = Callable[..., Study]
HARDWARE = {
    "forecast__mbit": 8.0, "forecast__ms": 10.0, "forecast__site_gflops": 2.0, "forecast__server_gflops": 4.0
}  # fmt: skip
"""A megabyte takes a second, a reply a hundredth."""


def costs(study: Study) -> dict[tuple[str, ...], Cost]:
    return {(c.protocol, *c.cut, c.transport): c for c in cc.plan(study).found.costs}


@pytest.fixture(scope="module")
def told(split_study: Make) -> dict[tuple[str, ...], Cost]:
    return costs(split_study(protocol__steps=3, protocol__rounds=5, protocol__cut=["encode0", "decode1"], **HARDWARE))


def test_every_way_to_train_is_told(told: dict[tuple[str, ...], Cost]) -> None:
    kinds = ("float32", "float16", "bfloat16", "int8")
    cuts = (("shallow",), ("deep",), ("encode0", "decode1"))
    assert list(told) == [("federated", "float32"), *(("splitfed", *cut, kind) for cut in cuts for kind in kinds)]
    for cost in told.values():
        assert cost.sites.keys() == {"north", "south", "west"}
        assert {s.steps for s in cost.sites.values()} == {3}
        assert cost.rounds == 5
    full, short = (told["splitfed", "deep", kind].sites["north"] for kind in ("float32", "int8"))
    assert 0.25 < short.up / full.up < 0.4  # the weights of front and tail do not become shorter
    assert short.memory == full.memory


def test_seconds_are_operations_over_speed_and_bytes_over_the_link(told: dict[tuple[str, ...], Cost]) -> None:
    whole, split = told["federated", "float32"], told["splitfed", "deep", "float32"]
    site = whole.sites["south"]
    assert whole.server_seconds == 0
    assert whole.seconds == pytest.approx(site.seconds + (site.up + site.down) / 1e6 + 0.01)
    of_split = split.sites["south"]
    # the same operations in two places, at a speed each
    assert of_split.seconds * 2.0 + split.server_seconds / 3 * 4.0 == pytest.approx(site.seconds * 2.0)
    assert split.seconds == pytest.approx(
        of_split.seconds + split.server_seconds / 3 + (of_split.up + of_split.down) / 1e6 + 7 * 0.01
    )


@pytest.mark.parametrize("variant", ["v2", "sequential"])
def test_sites_that_wait_for_each_other_take_longer(variant: str, split_study: Make, told: dict[Any, Cost]) -> None:
    found = costs(split_study(protocol__steps=3, protocol__variant=variant, **HARDWARE))["splitfed", "deep", "int8"]
    beside = told["splitfed", "deep", "int8"]
    one_by_one = sum(s.seconds + found.server_seconds / 3 + (s.up + s.down) / 1e6 + 0.07 for s in found.sites.values())
    if variant == "sequential":
        assert found.seconds == pytest.approx(one_by_one)
    assert beside.seconds < found.seconds <= one_by_one
    assert beside.server_memory == 3 * found.server_memory, "a body for each site"


@pytest.mark.slow
def test_unequal_sites_are_told_apart(small_study: Make) -> None:
    """By their cases, where a round is an epoch; and one computes a batch in parts."""
    study = small_study(protocol__steps=None, protocol__epochs=2.0, training__batch_size=4, **HARDWARE)
    raw = {"north": {"micro_batch": 1}}
    sites = {n: {"data": str(s.data), **raw.get(n, {})} for n, s in study.sites.items()}
    tables = {"study": {"name": "s"}, "sites": sites, "protocol": {"rounds": 1, "epochs": 2.0}}
    tables |= {"network": {"base_features": 4}, "training": {"batch_size": 4, "patch_size": [16, 16, 8]}}
    tables["forecast"] = {"site_gflops": 1.0, "server_gflops": 1.0}
    found = costs(parse_study(tables, folder=Path.cwd()))["federated", "float32"].sites
    assert found["north"].memory < found["south"].memory
    assert len({s.steps for s in found.values()}) > 1
    for site in found.values():
        assert site.seconds / site.steps == pytest.approx(found["north"].seconds / found["north"].steps)


def test_what_stays_at_a_site_is_not_counted(small_study: Make) -> None:
    whole, body = (
        costs(small_study(**{**HARDWARE, **keep}))["federated", "float32"].sites["north"]
        for keep in ({}, {"sharing__keep": ["decoder"]})
    )
    assert body.up < 0.9 * whole.up
    assert body.memory == whole.memory


def test_variants_stand_beside_the_study(small_study: Make) -> None:
    study = small_study(
        variants__heads={"training": {"tensors": ["heads"]}},
        variants__split={"protocol": {"name": "splitfed", "cut": "deep", "transport": "int8"}},
        variants__wider={"network": {"base_features": 8}, "training": {"patch_size": [16, 16, 16]}},
        variants__own={"plan": {"fingerprint": "site"}},
        variants__scaffold={"local_update": {"name": "scaffold"}},
    )
    told = cc.plan(forecast_by(study, mbit=8.0, ms=10.0, site_gflops=2.0, server_gflops=4.0)).found
    by_name = {cost.name: cost for cost in told.costs if cost.name}
    assert by_name.keys() == {"heads", "split", "wider"}
    (whole,) = (cost for cost in told.costs if cost.protocol == "federated" and not cost.name)
    assert by_name["wider"].sites["north"].up > 2.5 * whole.sites["north"].up, "planned with its own width"
    few = by_name["heads"].sites["north"]
    assert few.up < 0.05 * whole.sites["north"].up
    assert few.memory < whole.sites["north"].memory
    assert few.seconds < 0.8 * whole.sites["north"].seconds, "on the same machine"
    same = [c for c in told.costs if (c.cut, c.transport) == (("deep",), "int8")]
    assert [replace(c, name="") for c in same] == 2 * [same[0]]
    untold = "\n".join(told.warnings)
    assert "Variant own is not in the forecast: its sites have plans of their own." in untold
    assert "Variant scaffold is not in the forecast: its local update scaffold sends more than weights." in untold
    times = grids(told)[3]
    assert [row[0] for row in times.rows][-3:] == ["heads", "split", "wider"]


@pytest.mark.slow
def test_without_figures_a_step_is_timed_here(small_study: Make) -> None:
    found = costs(small_study())
    assert all(c.seconds and all(s.seconds for s in c.sites.values()) for c in found.values())
    table = grids(cc.plan(small_study(), forecast=False).found)
    assert len(table) == 3
    titles = [grid.title for grid in grids(cc.plan(small_study(**HARDWARE)).found)][3:]
    assert titles[0].endswith("links of 8 Mbit/s and 10 ms, sites 2 GFLOP/s, server 4 GFLOP/s")


def test_a_variant_that_cannot_be_forecast_is_named_and_the_others_are_told(
    small_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = advice.own_cost

    def fails(setting: Any, *told: Any) -> Any:
        if setting.name == "wider":
            raise RuntimeError("values are needed")
        return real(setting, *told)

    monkeypatch.setattr(advice, "own_cost", fails)
    study = small_study(**HARDWARE)
    found = cc.plan(replace(study, variants={"wider": study, "other": study})).found
    assert "federated" in {cost.protocol for cost in found.costs if not cost.name}
    assert {cost.name for cost in found.costs if cost.name} == {"other"}
    (text,) = [w for w in found.warnings if "could not be forecast" in w]
    assert text == "What variant wider would cost could not be forecast (RuntimeError: values are needed)."


@pytest.mark.parametrize(
    ("name", "why"), [("scaffold", "sends more than weights"), ("ditto", "computes more than a step")]
)
def test_a_local_update_that_costs_more_than_plain_steps_is_said_to(small_study: Make, name: str, why: str) -> None:
    found = cc.plan(small_study(local_update__name=name, **HARDWARE)).found
    assert len(found.costs) > 1
    assert [w for w in found.warnings if "of plain steps" in w] == [
        f"The forecast is of plain steps, and training costs more: its local update {name} {why}. What it costs, a run tells."
    ]


def test_sites_that_take_turns_take_less_of_a_round(split_study: Make) -> None:
    def of(**protocol: Any) -> Cost:
        told = {f"protocol__{key}": value for key, value in protocol.items()}
        return costs(split_study(protocol__variant="sequential", **told, **HARDWARE))["splitfed", "deep", "float32"]

    every, one, turns = (
        of(),
        of(participation=0.34, min_sites=1),
        of(cohorts=[["north"], ["south", "west"]], min_sites=1),
    )
    assert one.seconds == pytest.approx(every.seconds / 3)
    assert one.server_seconds == pytest.approx(every.server_seconds / 3)
    assert turns.seconds == pytest.approx(every.seconds / 2)
    assert one.sites == every.sites, "of a round in which a site takes part"


def test_a_network_that_does_not_run_on_shapes_is_planned_all_the_same(
    small_study: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no(*_: Any, **__: Any) -> Any:
        raise RuntimeError("values are needed")

    monkeypatch.setattr("concilium.costs.whole_load", no)
    study = small_study(protocol__rounds=1, protocol__steps=1, test=False, **HARDWARE)
    found = cc.plan(study)
    assert found.found.costs == ()
    assert "could not be forecast (RuntimeError: values are needed)" in found.found.warnings[-1]
    outcome = run(study, tmp_path / "run")
    assert outcome.exit_code == 0
    assert any("could not be forecast (RuntimeError" in text for text in outcome.results["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["federated", "splitfed"])
def test_a_run_puts_what_it_measured_beside(protocol: str, small_study: Make, tmp_path: Path) -> None:
    network = {"network__base_features": 16, "training__patch_size": [32, 32, 16]}  # headers weigh little
    study = small_study(protocol__name=protocol, protocol__rounds=2, test=False, **network, **HARDWARE)
    out = cc.run(study, tmp_path / "run").folder
    cost = json.loads((out / "forecast" / f"{protocol}.json").read_text())
    (model,) = json.loads((out / "results.json").read_text())["models"]
    for site, measured in model["sites"].items():
        for key in ("up", "down"):
            assert measured[f"bytes_{key}"] == pytest.approx(2 * cost["sites"][site][key], rel=0.02)
        assert measured["memory"] > cost["sites"][site]["memory"] > 1e6
    assert model.get("server_seconds", 0.0) > 0 or protocol == "federated"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Measured, and forecast" in page
    assert "(server)" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"validation__every": 1},
        {"protocol__name": "splitfed", "protocol__variant": "v3"},
        {"sharing__keep": ["decoder"], "validation__every": 2},
    ],
    ids=["every round", "split, front and tail stay", "a part is shared"],
)
def test_what_is_sent_outside_of_rounds_is_forecast_and_measured(
    changes: dict[str, Any], small_study: Make, tmp_path: Path
) -> None:
    changes = {"network__base_features": 16, "protocol__rounds": 2, "protocol__steps": 1, "test": False} | changes
    study = small_study(**changes, **HARDWARE)
    out = run(study, tmp_path / "run").folder
    cost = json.loads((out / f"forecast/{study.protocol.name}.json").read_text())
    (model,) = json.loads((out / "results.json").read_text())["models"]
    assert model["sites"].keys() == cost["sites"].keys()
    times = 1 + 2 // (study.validation.every or 3)
    for site, measured in model["sites"].items():
        told = cost["sites"][site]
        assert told["besides_down"] <= measured["besides_down"] <= 1.02 * told["besides_down"] + 6_000 * times
        assert told["besides_up"] == 0 < measured["besides_up"] < 20_000 * times, "scores, and no weights"


def test_a_site_that_hands_its_model_on_sends_it_to_every_other(small_study: Make, tmp_path: Path) -> None:
    study = small_study(
        protocol__name="cyclic", protocol__rounds=1, protocol__steps=1, network__base_features=16, test=False
    )
    told = forecasts(study)["cyclic"]
    assert not isinstance(told, str)
    (model,) = json.loads((run(study, tmp_path / "run").folder / "results.json").read_text())["models"]
    sent = {site: measured["besides_up"] for site, measured in model["sites"].items()}
    holder = max(sent, key=lambda site: sent[site])
    assert 0 < told[holder].besides_up <= sent[holder] <= 1.02 * told[holder].besides_up + 40_000
    assert all(told[site].besides_up == told[holder].besides_up for site in sent)
    assert all(sent[site] < 40_000 for site in sent if site != holder)


def test_without_the_table_a_run_forecasts_nothing(small_study: Make, tmp_path: Path) -> None:
    out = cc.run(small_study(protocol__rounds=1, test=False), tmp_path / "run").folder
    assert not (out / "forecast").exists()
    assert "Measured, and forecast" not in (out / "report.html").read_text(encoding="utf-8")


def test_what_exchanges_more_than_weights_is_not_forecast(small_study: Make, tmp_path: Path) -> None:
    study = small_study(protocol__rounds=1, local_update__name="scaffold", test=False, **HARDWARE)
    assert not (cc.run(study, tmp_path / "run").folder / "forecast").exists()


def test_a_command_line_takes_the_place_of_the_studys_figures(small_study: Make) -> None:
    study = small_study(**HARDWARE)
    changed = forecast_by(study, mbit=50.0, ms=None)
    assert changed.forecast is not None
    assert (changed.forecast.mbit, changed.forecast.ms) == (50.0, 10.0)
    assert "[forecast]" in to_toml(changed)
    assert forecast_by(small_study(), mbit=None).forecast is None
    with pytest.raises(StudyError, match=r"\[forecast\] mbit = -1.0 is not allowed. Allowed: more than 0"):
        forecast_by(study, mbit=-1.0)
