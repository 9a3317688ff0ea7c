"""Studies with a secure sum from end to end: the weights of plain sums to rounding, and nothing in the open on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sessions import quick
from torch import Tensor

from concilium import masking
from concilium.errors import EngineError
from concilium.line import Event, run
from concilium.messages import Held, Hold, Masked, Masking, Train, Trained
from concilium.site import Site
from concilium.study import Study
from concilium.wire import part

pytestmark = pytest.mark.slow

Make = Callable[..., Study]
SECURE = {"collect__name": "secure_sum", "collect__threshold": 2}


@pytest.fixture(scope="session")
def brief(small_study: Make) -> Make:
    """Two rounds of two steps of the smallest network, without a test set."""

    def make(**changes: Any) -> Study:
        small = {"protocol__name": "federated", "protocol__cut": None, "protocol__rounds": 2, "test": False}
        return quick(small_study, **small | changes)

    return make


def tensors_of(folder: Path) -> Mapping[str, Tensor]:
    (file,) = (folder / "checkpoints" / "federated").glob("[0-9]*.safetensors")
    return load_file(file)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a if a[n].numel())


def test_one_round_gives_the_plain_mean_to_the_bound(brief: Make, tmp_path: Path) -> None:
    """Three sites, three rounded changes; and the rounding of float32 of the weights and of both means."""
    run(brief(protocol__rounds=1), tmp_path / "plain")
    run(brief(protocol__rounds=1, **SECURE), tmp_path / "secure")
    plain, secure = (part(tensors_of(tmp_path / name), "weights/") for name in ("plain", "secure"))
    largest = max(float(t.abs().max()) for t in plain.values())
    bound = masking.bound(Masking(2, 32, 16.0, "cases"), 3) + largest * 2**-23
    assert largest_difference(plain, secure) <= bound
    assert all(line["failures"] == {} for line in rounds(tmp_path / "secure"))


@pytest.mark.parametrize(
    "changes",
    [
        {"local_update__name": "scaffold"},
        {"sharing__keep": ["norms"], "aggregation__name": "unweighted"},
        {"protocol__participation": 0.67, "aggregation__name": "adam", "protocol__min_sites": 2},
    ],
    ids=["control variates", "norms stay", "two of three sites, and Adam at the server"],
)
def test_what_goes_with_plain_sums_goes_with_masked_ones(
    changes: dict[str, Any], brief: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    answer = Site.answer
    monkeypatch.setattr(Site, "answer", lambda s, r, c: (told.append((r, reply := answer(s, r, c))), reply)[1])
    assert run(brief(**changes, **SECURE), tmp_path / "secure").exit_code == 0
    replies = [reply for _, reply in told]
    held = [r.trained for r in replies if isinstance(r, Held)] + [r for r in replies if isinstance(r, Trained)]
    assert held
    assert not any(t.weights or t.control for t in held), "no update left a site as it is"
    assert any(isinstance(r, Masked) for r in replies)
    assert all(not r.send_weights for r, _ in told if isinstance(r, Train))
    run(brief(**changes), tmp_path / "plain")
    plain, secure = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "secure")
    assert largest_difference(plain, secure) < 2e-4, (
        "two rounds of training from weights that differ in their last bits"
    )
    for a, b in zip(rounds(tmp_path / "plain"), rounds(tmp_path / "secure"), strict=True):
        assert {s: v["n_cases"] for s, v in a["sites"].items()} == {s: v["n_cases"] for s, v in b["sites"].items()}


def test_a_run_that_stopped_goes_on(brief: Make, tmp_path: Path) -> None:
    """Other masks, the same sum: to the bit."""

    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == 1:
            raise KeyboardInterrupt

    run(brief(**SECURE), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(brief(**SECURE), tmp_path / "run", watch=stop)
    run(brief(**SECURE), tmp_path / "run", resume=True)
    whole, resumed = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "run")
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_too_few_sites_end_the_run_with_the_reason(
    brief: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = Site.answer

    def fails(site: Site, request: Any, cancelled: Any) -> Any:
        if isinstance(request, Hold) and site.settings.name != "north":
            raise RuntimeError
        return hold(site, request, cancelled)

    monkeypatch.setattr(Site, "answer", fails)
    with pytest.raises(EngineError, match=r"north: below_threshold .*nothing was unmasked"):
        run(brief(**SECURE), tmp_path / "run")


def test_a_change_out_of_range_is_told_by_its_name(brief: Make, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"out_of_range \(OverflowError.*raise it, and with it bits"):
        run(brief(**SECURE, collect__range=1e-6), tmp_path / "run")
    log = (tmp_path / "run" / "sites" / "north" / "log.jsonl").read_text()
    assert "nothing is clipped" in log
