"""Which cases all parties have, found without a name being shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from scipy import stats
from torch import Tensor

from concilium.alignment import BYTES, Found, blinded, hidden, intersect, order_of, secret_in
from concilium.errors import ContractError

NAMES = {
    "a": [f"case{i}" for i in range(60)],
    "b": [f"case{i}" for i in range(20, 80)],
    "c": [f"case{i}" for i in range(50, 9, -1)],
}


def found(
    change: Callable[[str, tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda _, points: points,
    unusable: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[dict[str, Found], dict[str, list[str]]]:
    """What each party finds, and its cases in the order in which it showed them. `case30` lies elsewhere at `c`."""
    secrets = {party: os.urandom(BYTES) for party in NAMES}
    offered, shown = {}, {}
    for party, names in NAMES.items():
        cases = hidden(names, secrets[party])
        places = hidden([n + (" there" if (party, n) == ("c", "case30") else " here") for n in names], secrets[party])
        order = order_of(cases)
        shown[party] = [names[i] for i in order]
        offered[party] = (cases[order], places[order])
    broken = {party: {shown[party].index(name) for name in names} for party, names in unusable.items()}
    made = intersect(offered, lambda p, points: change(p, tuple(blinded(x, secrets[p]) for x in points)), broken)
    return made, shown


def test_every_party_finds_the_same_cases() -> None:
    made, shown = found()
    for party in NAMES:
        assert sorted(shown[party][i] for i in made[party].rows) == sorted(f"case{i}" for i in range(20, 51) if i != 30)
        assert [shown[party][i] for i in made[party].apart] == ["case30"]


def test_a_case_that_one_party_cannot_use_is_lost_to_all() -> None:
    made, shown = found(unusable={"b": ("case25", "case70")})
    for party in NAMES:
        assert [shown[party][i] for i in made[party].lost] == ["case25"]
        assert "case25" not in [shown[party][i] for i in made[party].rows + made[party].apart]


def test_the_order_in_which_cases_are_shown_tells_nothing() -> None:
    """Neither that of the names, nor the same twice."""
    _, first = found()
    _, second = found()
    assert first["a"] != second["a"]
    assert first["a"] != NAMES["a"]


def test_a_blinded_name_is_that_of_no_list() -> None:
    """Whoever hashes a name that it guesses finds it neither at one party's blinding nor at all parties'."""
    guess = hidden(NAMES["a"], bytes(BYTES))
    once = hidden(NAMES["a"], os.urandom(BYTES))
    twice = blinded(once, os.urandom(BYTES))
    rows = [{row.numpy().tobytes() for row in points} for points in (guess, once, twice)]
    assert not rows[0] & (rows[1] | rows[2])
    assert not rows[1] & rows[2]


def test_blinded_names_look_drawn_at_random() -> None:
    points = hidden([f"patient {i}" for i in range(2000)], os.urandom(BYTES))
    counts = torch.bincount(points[:, :-1].flatten().long(), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-6


def test_the_secret_stays_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "site" / "alignment.key"
    secret = secret_in(file)
    assert len(secret) == BYTES
    assert secret_in(file) == secret != secret_in(tmp_path / "other.key")
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "points",
    [torch.zeros(3, BYTES), torch.zeros(3, 31, dtype=torch.uint8), torch.zeros(BYTES, dtype=torch.uint8)],
    ids=["float", "short", "flat"],
)
def test_what_is_no_point_is_refused(points: Tensor) -> None:
    with pytest.raises(ContractError, match="Expected uint8"):
        blinded(points, os.urandom(BYTES))


def test_a_point_of_small_order_is_refused() -> None:
    """Zero to any power is zero: whoever had it blinded would see nothing, and two parties' would be equal."""
    with pytest.raises(ContractError, match="cannot be blinded"):
        blinded(torch.zeros(1, BYTES, dtype=torch.uint8), os.urandom(BYTES))


def test_a_party_that_loses_points_is_noticed() -> None:
    with pytest.raises(ContractError, match="gave back"):
        found(lambda party, points: tuple(p[:-1] for p in points) if party == "b" else points)


def test_a_case_that_is_shown_twice_is_noticed() -> None:
    with pytest.raises(ContractError, match="cases were shown"):
        found(lambda party, points: tuple(torch.cat([p[:1], p[:-1]]) for p in points) if party == "b" else points)


def test_no_name_at_all() -> None:
    assert hidden([], os.urandom(BYTES)).shape == (0, BYTES)
