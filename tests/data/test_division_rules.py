"""What a study may say of a division and of shifts: every error at once, with table, key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from concilium.data.partition import Partition
from concilium.data.shifts import Shift
from concilium.errors import StudyError
from concilium.study import Study, parse_study, read_study, to_toml

Tables = dict[str, Any]


def raw(sites: Tables | None = None, **tables: Tables) -> Tables:
    return {
        "study": {"name": "x", "seed": 5},
        "partition": {"data": "all", "by": "size"},
        "sites": {"a": {}, "b": {}} if sites is None else sites,
        "protocol": {"rounds": 1, "steps": 1},
    } | tables


def parse(document: Tables, folder: Path = Path("/studies")) -> Study:
    return parse_study(document, folder=folder, check_data=False)


def errors(document: Tables) -> list[str]:
    with pytest.raises(StudyError) as e:
        parse(document)
    return [line.removeprefix("  - ") for line in str(e.value).splitlines()[1:]]


def test_a_divided_study_is_resolved_and_read_back(tmp_path: Path) -> None:
    sites = {"a": {"values": ["1", "x"], "shift": {"gamma": 1.5, "spacing": [1, 1, 3]}}, "b": {}}
    partition = {"data": "all", "by": "csv", "file": "sites.csv", "rest": "b", "test": ["held out"]}
    study = parse(raw(sites, partition=partition, test={"shift": {"noise": 0.5}}), tmp_path)
    assert study.partition == Partition(
        tmp_path / "all", "csv", test=("held out",), file=tmp_path / "sites.csv", rest="b", seed=5
    )
    assert study.sites["a"].shift == Shift(gamma=1.5, spacing=(1.0, 1.0, 3.0))
    assert study.sites["b"].shift is None
    assert study.test is not None
    assert study.test.shift == Shift(noise=0.5)
    (tmp_path / "again.toml").write_text(to_toml(study))
    assert read_study(tmp_path / "again.toml", check_data=False) == study


def test_a_shift_needs_no_partition() -> None:
    document = raw({"a": {"data": "a", "shift": {"blur": 1}}, "b": {"data": "b"}})
    del document["partition"]
    assert parse(document).sites["a"].shift == Shift(blur=1.0)


ONE_ERROR: tuple[tuple[Tables, str], ...] = (
    ({"partition": {"data": "all", "by": "sise"}}, "[partition] by = 'sise' is not allowed. Allowed: 'key', 'csv', "),
    ({"partition": {"by": "size"}}, "[partition] data is missing. Expected a path. Add it."),
    ({"partition": {"data": "d", "by": "size", "test": 1.0}}, "[partition] test = 1.0 is not allowed. Allowed: above 0"),
    ({"partition": {"data": "d", "by": "size", "tset": 1.0}}, "[partition] tset = 1.0 is not known. Did you mean 'test'?"),
    (
        {"partition": {"data": "d", "by": "size", "test": ["a"]}},
        "[partition] test = ['a'] is not allowed by = 'size'. Allowed: above 0 and below 1, the share of patients.",
    ),
    (
        {"partition": {"data": "d", "by": "size", "alpha": 1}},
        "[partition] alpha = 1.0 is not used by = 'size'. Used there: none. Remove it.",
    ),
    (
        {"partition": {"data": "d", "by": "key"}},
        "[partition] key = None, pattern = None is not allowed. Allowed: exactly one of the two.",
    ),
    (
        {"partition": {"data": "d", "by": "key", "key": "k", "pattern": "(.)"}},
        "[partition] key = 'k', pattern = '(.)' is not allowed. Allowed: exactly one of the two.",
    ),
    (
        {"partition": {"data": "d", "by": "key", "pattern": "a.b"}},
        "[partition] pattern = 'a.b' is not allowed. Allowed: a regular expression with one group, like",
    ),
    ({"partition": {"data": "d", "by": "key", "pattern": "(a"}}, "[partition] pattern = '(a' is not allowed. Allowed: "),
    ({"partition": {"data": "d", "by": "csv"}}, "[partition] file is missing. by = 'csv' needs it (a path). Add it."),
    ({"partition": {"data": "d", "by": "dirichlet"}}, "[partition] alpha is missing. by = 'dirichlet' needs it (a number)"),
    ({"partition": {"data": "d", "by": "dirichlet", "alpha": 0}}, "[partition] alpha = 0 is not allowed. Allowed: 0.01 to"),
    (
        {"partition": {"data": "d", "by": "dirichlet", "alpha": float("nan")}},
        "[partition] alpha = nan is not allowed. Allowed: 0.01 to",
    ),
    (
        {"partition": {"data": "d", "by": "key", "key": "k", "rest": "c"}},
        "[partition] rest = 'c' is not allowed. Known: a, b.",
    ),
    (
        {"partition": {"data": "d", "by": "key", "key": "k", "test": ["b", "c"]}},
        "[sites] values: 'b' belongs to b and test. Allowed: one site for each value. Correct them.",
    ),
    ({"sites": {"a": {"data": "d"}, "b": {}}}, "[sites.a] data = 'd' is not allowed with [partition], which divides one"),
    ({"sites": {"a": {"share": 1}, "b": {}}}, "[sites] share is missing for b. Allowed: a share for every site, or for none."),
    ({"sites": {"a": {"share": 0}, "b": {"share": 1}}}, "[sites.a] share = 0 is not allowed. Allowed: more than 0."),
    (
        {"sites": {"a": {"values": ["1"]}, "b": {}}},
        "[sites.a] values = ['1'] is not allowed here. Allowed: at a site, with [partition] by = 'key' or by = 'csv'.",
    ),
    ({"test": {}}, "[test] data is missing. Expected a path, or a share in [partition] test. Add one."),
    (
        {"test": {"data": "t"}, "partition": {"data": "d", "by": "size", "test": 0.5}},
        "[partition] test = 0.5, [test] data = 't' is not allowed. Allowed: one of the two.",
    ),
    ({"test": {"data": "t", "share": 1}}, "[test] share = 1.0 is not allowed here. Allowed: at a site, with"),
    ({"sites": {"a": {"shift": 2}, "b": {}}}, "[sites.a] shift = 2 is not allowed. Expected a table [sites.a.shift]."),
    ({"sites": {"a": {"shift": {"gama": 2}}, "b": {}}}, "[sites.a.shift] gama = 2 is not known. Did you mean 'gamma'?"),
    ({"sites": {"a": {"shift": {"gamma": 0}}, "b": {}}}, "[sites.a.shift] gamma = 0 is not allowed. Allowed: 0.1 to 10."),
    ({"sites": {"a": {"shift": {"noise": -1}}, "b": {}}}, "[sites.a.shift] noise = -1 is not allowed. Allowed: 0 to 10"),
    ({"sites": {"a": {"shift": {"blur": 51}}, "b": {}}}, "[sites.a.shift] blur = 51 is not allowed. Allowed: 0 to 50 mm"),
    ({"sites": {"a": {"shift": {"bias": 1}}, "b": {}}}, "[sites.a.shift] bias = 1 is not allowed. Allowed: 0 to below 1."),
    ({"sites": {"a": {"shift": {"spacing": [1]}}, "b": {}}}, "[sites.a.shift] spacing = [1] is not allowed. Allowed: 2 or 3"),
    (
        {"test": {"data": "t", "shift": {"spacing": [1, 0, 1]}}},
        "[test.shift] spacing = [1, 0, 1] is not allowed. Allowed: 2 or 3 numbers of 0.05 to 50 mm",
    ),
    (
        {"engine": {"name": "flare"}},
        "[partition] is not allowed with engine flare: each hospital has its own data. Remove it.",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("tables", "expected"), ONE_ERROR)
def test_each_error_names_table_key_value_and_what_is_allowed(tables: Tables, expected: str) -> None:
    (line,) = errors(raw(**tables))
    assert line.startswith(expected)


def test_by_labels_every_site_says_what_it_annotates() -> None:
    document = raw({"a": {"annotated": ["liver"]}, "b": {}}, partition={"data": "d", "by": "labels"})
    assert errors(document) == ["[sites.b] annotated is missing. by = 'labels' needs it (a list, each text). Add it."]


def test_a_value_has_one_owner() -> None:
    document = raw({"a": {"values": ["b", "c"]}, "b": {}}, partition={"data": "d", "by": "key", "key": "k"})
    assert errors(document) == [
        "[sites] values: 'b' belongs to a and b. Allowed: one site for each value. Correct them."
    ]


def test_between_hospitals_no_image_is_shifted() -> None:
    document = raw({"a": {"shift": {"gamma": 2}}}, engine={"name": "flare"})
    del document["partition"]
    assert errors(document) == [
        "[sites.a.shift] is not allowed with engine flare. Allowed: in a simulation. Remove it."
    ]


def test_without_a_partition_nobody_reads_what_is_for_one() -> None:
    document = raw({"a": {"data": "a", "share": 2}, "b": {}})
    del document["partition"]
    assert errors(document) == [
        "[sites.b] data is missing. Expected a path. Add it.",
        "[sites.a] share = 2.0 is not allowed here. Allowed: at a site, with [partition] by = 'size'. Remove it, or divide so.",
    ]


def test_all_errors_are_told_at_once() -> None:
    document = raw(
        {"a": {"data": "d", "values": ["x"], "shift": {"gamma": 99}}, "b": {"values": ["x"]}},
        partition={"data": "d", "by": "size", "rest": "c", "alpha": 1},
        training={"momentum": 2},
    )
    found = errors(document)
    assert len(found) == 7
    for start in (
        "[training] momentum",
        "[sites.a.shift] gamma",
        "[sites.a] data",
        "[sites.a] values",
        "[sites.b] values",
        "[partition] alpha",
        "[partition] rest",
    ):
        assert any(line.startswith(start) for line in found), start


def test_the_data_set_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"\[partition\] data = 'all' is no nnU-Net raw folder: it has no dataset\.json"
    ):
        parse_study(raw(), folder=tmp_path)
