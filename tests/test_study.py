"""The study file: what is filled in, what is refused, and in which words."""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import concilium
from concilium import constraints
from concilium.constraints import LIST_RANGES, OPTION_RANGES, RANGES
from concilium.errors import StudyError
from concilium.messages import PlugIn
from concilium.study import RESERVED, StartTable, Study, parse_study, read_study, to_toml, training_of

SMALL: dict[str, dict[str, Any]] = {
    "study": {"name": "small"},
    "sites": {"north": {"data": "n"}, "south": {"data": "s"}},
    "protocol": {"rounds": 3, "steps": 2},
}


def raw(**tables: Any) -> dict[str, Any]:
    """The smallest study, with keys of tables added; `None` takes one out."""
    merged = {name: dict(table) for name, table in SMALL.items()}
    for name, table in tables.items():
        merged[name] = {k: v for k, v in (merged.get(name, {}) | table).items() if v is not None}
    return merged


def parse(folder: Path = Path("/studies"), **tables: Any) -> Study:
    return parse_study(raw(**tables), folder=folder, check_data=False)


def errors(document: dict[str, Any]) -> list[str]:
    """The errors of a study, one by one."""
    with pytest.raises(StudyError) as e:
        parse_study(document, folder=Path("/studies"), source="my.toml", check_data=False)
    first, *lines = str(e.value).splitlines()
    assert first == f"my.toml has {len(lines)} error{'s' if len(lines) > 1 else ''}:"
    assert all(line.startswith("  - ") for line in lines)
    return [line.removeprefix("  - ") for line in lines]


# -------------------------------------------------------------------------------------------------------- what is read


def test_defaults_are_filled_in() -> None:
    study = parse()
    assert study.network.name == "nnunet"
    assert "base_features" in study.network.options
    assert study.aggregation == PlugIn("mean", {})
    assert study.loss == PlugIn("dice_ce", {"dice_weight": 1.0, "ce_weight": 1.0, "unannotated": "refuse"})
    assert study.protocol.name == "federated"
    assert study.protocol.min_sites == 2
    assert study.training.learning_rate == 0.01
    assert study.engine.threads >= 1
    assert study.test is None


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.01), ("adam", 0.001), ("adamw", 0.001)])
def test_the_learning_rate_goes_with_the_optimiser(optimizer: str, rate: float) -> None:
    assert parse(training={"optimizer": optimizer}).training.learning_rate == rate
    assert training_of(parse(training={"optimizer": optimizer})).learning_rate == rate
    assert parse(training={"optimizer": optimizer, "learning_rate": 1}).training.learning_rate == 1.0


@pytest.mark.parametrize(("n_sites", "expected"), [(1, 1), (2, 2), (5, 2)])
def test_at_least_two_sites_must_answer_where_there_are_two(n_sites: int, expected: int) -> None:
    study = raw() | {"sites": {f"s{i}": {"data": "d"} for i in range(n_sites)}}
    assert parse_study(study, folder=Path("/"), check_data=False).protocol.min_sites == expected


def test_a_whole_number_is_a_number() -> None:
    study = parse(protocol={"steps": None, "epochs": 1, "round_seconds": 60}, training={"momentum": 0})
    assert [type(x) for x in (study.protocol.epochs, study.protocol.round_seconds, study.training.momentum)] == [
        float
    ] * 3


def test_a_site_trains_as_the_study_says() -> None:
    study = parse(training={"optimizer": "adamw", "precision": "bfloat16", "mirror": False, "clip_norm": 1.5})
    training = training_of(study)
    for name in (
        "optimizer",
        "learning_rate",
        "weight_decay",
        "momentum",
        "precision",
        "foreground",
        "mirror",
        "augmentation",
    ):
        assert getattr(training, name) == getattr(study.training, name)
    assert (training.clip_norm, training.deep_supervision, training.loader_workers) == (1.5, True, 0)
    assert (training.loss, training.local_update) == (study.loss, study.local_update)


def test_paths_are_relative_to_the_study_file(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "study.toml"
    file.parent.mkdir()
    file.write_text(
        textwrap.dedent(
            """
            [study]
            name = "x"
            [sites.a]
            data = "../data/a"
            [sites.b]
            data = "/elsewhere/b"
            [test]
            data = "t"
            [protocol]
            rounds = 1
            steps = 1
            [engine]
            cache = "cache"
            """
        )
    )
    study = read_study(file, check_data=False)
    folder = tmp_path.resolve()
    assert study.sites["a"].data == folder / "data" / "a"
    assert study.sites["b"].data == Path("/elsewhere/b")
    assert study.test is not None
    assert study.test.data == folder / "sub" / "t"
    assert study.engine.cache == folder / "sub" / "cache"


def test_what_to_start_from_stands_with_the_network_and_is_none_of_its_options() -> None:
    study = parse(network={"name": "unet", "levels": 3, "weights": "../run#local:a", "min_matched": 1})
    assert study.start == StartTable(Path("/run#local:a"), 1.0)
    assert study.network.options["levels"] == 3
    assert not {"weights", "min_matched"} & set(study.network.options)
    assert tomllib.loads(to_toml(study))["network"]["weights"] == "/run#local:a"
    assert not {"weights", "min_matched"} & set(tomllib.loads(to_toml(parse()))["network"])


def test_a_variant_may_start_from_nothing() -> None:
    """Read, and written so that it is read again."""
    study = parse(
        network={"name": "unet", "weights": "w", "min_matched": 1},
        variants={
            "scratch": {"network": {"weights": ""}},
            "other": {"network": {"name": "nnunet"}},
            "same": {"training": {"foreground": 0.5}},
        },
    )
    again = parse_study(tomllib.loads(to_toml(study)), folder=Path("/"), check_data=False)
    for of in (study, again):
        starts = {name: variant.start.weights for name, variant in of.variants.items()}
        assert starts == {"scratch": None, "other": None, "same": study.start.weights}
        assert of.variants["scratch"].start.min_matched == 0.9


@pytest.mark.parametrize(
    ("network", "told"),
    [
        ({"weights": 3}, "[network] weights = 3 is not allowed. Allowed: a path."),
        ({"weights": "w", "min_matched": "all"}, "[network] min_matched = 'all' is not allowed. Allowed: a number."),
        ({"min_matched": 0.5}, "[network] min_matched = 0.5 is not allowed without weights."),
        (
            {"weigths": "w"},
            "[network] weigths = 'w' is not known. Did you mean 'weights'? Known: base_features, min_matched",
        ),
    ],
)
def test_what_to_start_from_is_checked(network: dict[str, Any], told: str) -> None:
    assert errors(raw(network=network))[0].startswith(told)


FULL: dict[str, dict[str, Any]] = {
    "study": {"name": "size-1_2.a", "seed": -3, "max_excluded": 0.25},
    "sites": {"a": {"data": "a b"}, "B-2_c": {"data": "/x", "micro_batch": 2}, "3": {"data": 'ö "1" \\ 2'}},
    "test": {"data": "t"},
    "protocol": {
        "name": "federated", "rounds": 3, "epochs": 0.1, "compare": ["local", "centralized"], "min_sites": 3,
        "round_seconds": 1e-3, "time_box": True,
    },
    "plan": {"configuration": "2d", "planner": "resenc_l", "memory_gb": 11, "exact_geometry": True},
    "network": {"name": "nnunet", "base_features": 8, "weights": "run#local:a", "min_matched": 0.5},
    "training": {
        "optimizer": "adam", "learning_rate": 1 / 3, "batch_size": 4, "patch_size": [16, 32, 8], "precision": "bfloat16",
    },
    "aggregation": {"name": "mean"},
    "collect": {"name": "plain"},
    "loss": {"name": "dice_ce", "ce_weight": 0},
    "local_update": {"name": "plain"},
    "validation": {"folds": 3, "fold": 2, "tolerance": 2},
    "engine": {"workers": 2, "threads": 3, "device": "cpu", "cache": "c"},
}  # fmt: skip


SPLIT: dict[str, dict[str, Any]] = SMALL | {
    "protocol": {
        "name": "splitfed", "rounds": 3, "steps": 2, "variant": "v2", "cut": ["down0", "up0"], "exchange_seconds": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("document", [SMALL, FULL, SPLIT], ids=["small", "full", "split"])
def test_the_resolved_study_is_read_back_as_it_was(document: dict[str, Any], tmp_path: Path) -> None:
    study = parse_study(document, folder=tmp_path, check_data=False)
    file = tmp_path / "elsewhere" / "study.toml"
    file.parent.mkdir()
    file.write_text(to_toml(study), encoding="utf-8")
    assert read_study(file, check_data=False) == study
    assert to_toml(read_study(file, check_data=False)) == to_toml(study)


def test_the_resolved_study_says_everything() -> None:
    written = tomllib.loads(to_toml(parse()))
    assert written["loss"] == {"name": "dice_ce", "dice_weight": 1.0, "ce_weight": 1.0, "unannotated": "refuse"}
    assert written["training"]["learning_rate"] == 0.01
    assert written["engine"]["threads"] >= 1
    tables = {f.name for f in dataclasses.fields(Study)}
    assert set(written) == tables - {"test", "variants", "start", "partition", "forecast", "defences", "filters"}


def test_the_protocols_own_options_stand_in_its_table() -> None:
    everybody = {"participation": 1.0, "cohorts": ()}
    defaults = everybody | {"variant": "v1", "cut": "deep", "reveal_labels": False, "exchange_seconds": None}
    defaults |= {"transport": "float32"}
    assert parse().protocol.options == everybody
    assert parse(protocol={"name": "splitfed"}).protocol.options == defaults
    given = parse(protocol=SPLIT["protocol"]).protocol
    assert given.options == defaults | {
        "variant": "v2",
        "cut": ("down0", "up0"),
        "reveal_labels": False,
        "exchange_seconds": 2.0,
    }
    assert given.rounds == 3
    written = tomllib.loads(to_toml(parse(protocol=SPLIT["protocol"])))["protocol"]
    assert written == SPLIT["protocol"] | {
        "reveal_labels": False,
        "transport": "float32",
        "compare": [],
        "min_sites": 2,
        "participation": 1.0,
        "cohorts": [],
        "time_box": False,
    }
    assert "options" not in written


def test_the_presets_are_studies() -> None:
    presets = sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))
    assert presets
    for preset in presets:
        assert read_study(preset, check_data=False).sites


# ------------------------------------------------------------------------------------------------------- what is wrong

TEN = """
[studdy]
[study]
seed = "seven"
[sites.test]
data = "t"
[sites.north]
dta = "n"
[protocol]
rouns = 3
rounds = 0
steps = 2
[network]
name = "nnunett"
[training]
optimizer = "sdg"
momentum = true
[loss]
dice_weigth = 1
[validation]
folds = 5
fold = 5
"""


def test_a_file_with_many_errors_is_told_all_of_them_at_once(tmp_path: Path) -> None:
    (tmp_path / "ten.toml").write_text(TEN)
    with pytest.raises(StudyError) as e:
        read_study(tmp_path / "ten.toml", check_data=False)
    lines = str(e.value).splitlines()
    assert lines[0] == f"{tmp_path / 'ten.toml'} has 12 errors:"
    expected = [
        "[studdy] is not a known table. Did you mean 'study'? Known: ",
        "[protocol] rouns = 3 is not known. Did you mean 'rounds'? Known: cohorts, compare, ",
        "[protocol] rounds = 0 is not allowed. Allowed: 1 or more.",
        "[study] seed = 'seven' is not allowed. Allowed: a whole number.",
        "[study] name is missing. Expected text. Add it.",
        "[training] optimizer = 'sdg' is not allowed. Allowed: 'sgd', 'adam', 'adamw'.",
        "[training] momentum = True is not allowed. Allowed: a number.",
        "[network] name = 'nnunett' is not allowed: networks has no 'nnunett'. Did you mean 'nnunet'? Known: ",
        "[loss] dice_weigth = 1 is not known. Did you mean 'dice_weight'? Known: ce_weight, dice_weight, unannotated.",
        "[sites.test] is not a name for a site. Allowed: letters, digits, - and _, but not test, pooled, server, all. Rename it.",
        "[sites.north] dta = 'n' is not known. Did you mean 'data'? Known: annotated, channels, data, holds, labels, ",
        "[validation] fold = 5 is not allowed. Allowed: 0 to 4.",
    ]
    for line, start in zip(lines[1:], expected, strict=True):
        assert line.startswith(f"  - {start}")


ONE_ERROR: tuple[tuple[dict[str, Any], str], ...] = (
    (
        {"protocol": {"name": "federatd"}},
        "[protocol] name = 'federatd' is not allowed. Did you mean 'federated'? Known: ",
    ),
    (
        {"engine": {"name": "simulaton"}},
        "[engine] name = 'simulaton' is not allowed. Did you mean 'simulation'? Known: ",
    ),
    (
        {"plan": {"configuration": "4d"}},
        "[plan] configuration = '4d' is not allowed. Did you mean '2d'? Known: 2d, 3d_fullres,",
    ),
    (
        {"plan": {"configuration": "3d_cascade_fullres"}},
        "[plan] configuration = '3d_cascade_fullres' is not allowed. The cascade",
    ),
    (
        {"protocol": {"steps": None}},
        "[protocol] steps = None, epochs = None is not allowed. Allowed: exactly one of the two.",
    ),
    (
        {"protocol": {"epochs": 1}},
        "[protocol] steps = 2, epochs = 1.0 is not allowed. Allowed: exactly one of the two.",
    ),
    (
        {"protocol": {"variant": "v2"}},
        "[protocol] variant = 'v2' is not known. Known: cohorts, compare, ",
    ),
    (
        {"protocol": {"name": "splitfed", "varient": "v2"}},
        "[protocol] varient = 'v2' is not known. Did you mean 'variant'? Known: cohorts, compare, cut, ",
    ),
    (
        {"protocol": {"name": "splitfed", "variant": "v4"}},
        "[protocol] variant = 'v4' is not allowed. Allowed: 'v1', 'v2', 'v3', 'sequential'.",
    ),
    (
        {"protocol": {"name": "splitfed", "cut": 3}},
        "[protocol] cut = 3 is not allowed. Allowed: 'shallow', 'deep' or a list, each text.",
    ),
    (
        {"protocol": {"name": "splitfed"}, "training": {"precision": "float16"}},
        "[training] precision = 'float16' is not allowed with splitfed: the scale of the loss would have to travel. "
        "Allowed: 'float32', 'bfloat16'.",
    ),
    (
        {"protocol": {"name": "splitfed"}, "local_update": {"name": "collections:Counter"}},
        "[local_update] name = 'collections:Counter' is not allowed with splitfed: ",
    ),
    (
        {"protocol": {"name": "splitfed"}, "local_update": {"name": "scaffold"}},
        "[local_update] name = 'scaffold' is not allowed with splitfed: ",
    ),
    (
        {"training": {"optimizer": "sgd"}, "local_update": {"name": "fedadamw"}},
        "[training] optimizer = 'sgd' is not allowed with [local_update] name = 'fedadamw'. Allowed: 'adam', 'adamw'. Choose",
    ),
    (
        {"protocol": {"name": "local"}, "local_update": {"name": "ditto"}},
        "[local_update] name = 'ditto' is not allowed with protocol 'local', which shares no weights for it to refer to. Allowed",
    ),
    (
        {"sites": {"north": {"data": "n", "micro_batch": 0}}},
        "[sites.north] micro_batch = 0 is not allowed. Allowed: 1 or more, or 'auto'.",
    ),
    (
        {"sites": {"north": {"data": "n", "micro_batch": 1}}, "protocol": {"name": "splitfed"}},
        "[sites.north] micro_batch = 1 is not allowed with splitfed: the body sees whole batches. Allowed: another protocol",
    ),
    (
        {
            "sites": {"north": {"data": "n", "micro_batch": 1}},
            "local_update": {
                "name": "nnunet_trainer",
                "trainer": "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer",
            },
        },
        "[sites.north] micro_batch = 1 is not allowed with [local_update] name = 'nnunet_trainer': its trainer runs whole",
    ),
    (
        {"test": {"data": "t", "micro_batch": 1}},
        "[test] micro_batch = 1 is not allowed: nobody trains there. Allowed: at a site.",
    ),
    (
        {"protocol": {"time_box": True}},
        "[protocol] time_box = true is not allowed without round_seconds. Allowed: with it. Add it.",
    ),
    (
        {"protocol": {"name": "splitfed", "time_box": True, "round_seconds": 9}},
        "[protocol] time_box = true is not allowed with 'splitfed', whose sites do not choose their steps. Allowed with: ",
    ),
    (
        {"local_update": {"name": "proximal", "weight": 1}},
        "[local_update] weight = 1 is not known. Known: mu.",
    ),
    *(
        (
            {"protocol": {"name": "splitfed", "variant": "sequential"}, "aggregation": {"name": rule}},
            f"[aggregation] name = '{rule}' is not allowed with splitfed, variant = 'sequential': it compares sites' updates",
        )
        for rule in ("fednova", "median", "trimmed_mean", "krum", "agreement")
    ),
    (
        {"protocol": {"name": "splitfed"}, "aggregation": {"name": "quality"}, "collect": {"name": "judged"}},
        "[collect] name = 'judged' is not allowed with splitfed: a site has no whole network to judge.",
    ),
    (
        {"aggregation": {"name": "quality"}},
        "[aggregation] name = 'quality' is not allowed with [collect] name = 'plain': nobody judges the updates.",
    ),
    (
        {"collect": {"name": "judged"}},
        "[aggregation] name = 'mean' is not allowed with [collect] name = 'judged': it does not look at single updates",
    ),
    *(
        ({"collect": {"name": "secure_sum"}} | tables, f"[collect] name = 'secure_sum' is not allowed with {reason}")
        for tables, reason in (
            ({"aggregation": {"name": "fednova"}}, "[aggregation] name = 'fednova': it must see each site's update"),
            ({"protocol": {"name": "splitfed"}}, "splitfed: its server has each site's body"),
            ({"protocol": {"name": "local"}}, "local: no updates are added up there"),
            ({"plan": {"fingerprint": "site"}}, "[plan] fingerprint = 'site': of tensors that few sites have"),
            ({"protocol": {"participation": 0.5, "min_sites": 1}}, "one site in a round"),
        )
    ),
    (
        {"collect": {"name": "secure_sum"}, "local_update": {"name": "fedadamw"}, "training": {"optimizer": "adamw"}},
        "[local_update] name = 'fedadamw' is not allowed with [collect] bits = 32: its second moments, squares of gradients, are",
    ),
    (
        {"collect": {"name": "secure_sum", "threshold": 3}},
        "[collect] threshold = 3 is not allowed with 2 sites in a round. Allowed: 2 to 2.",
    ),
    (
        {"aggregation": {"name": "krum", "faulty": 1}},
        "[aggregation] faulty = 1 is not allowed with 2 sites in a round. Allowed: 0 to 0, since krum needs 2 · faulty + 3",
    ),
    *(
        (
            {"local_update": {"name": "condistfl"}, "sharing": {"keep": keep}},
            f"[local_update] name = 'condistfl' is not allowed with [sharing] keep = {keep}: heads that stay were taught",
        )
        for keep in (["heads"], ["decoder"], ["norms", "head*"])
    ),
    (
        {"local_update": {"name": "condistfl"}, "loss": {"name": "dice_ce", "unannotated": "background"}},
        "[local_update] name = 'condistfl' is not allowed with [loss] unannotated = 'background': the one teaches that",
    ),
    (
        {"loss": {"name": "own_labels"}},
        "[loss] name = 'own_labels' is not allowed with [sharing] keep = []: shared heads would be told by each site that",
    ),
    (
        {"loss": {"name": "own_labels"}, "sharing": {"keep": ["norms"]}},
        "[loss] name = 'own_labels' is not allowed with [sharing] keep = ['norms']: shared heads would be told",
    ),
    *(
        (
            {"aggregation": {"name": rule}, "collect": {"name": "judged" if rule == "quality" else "plain"}, **asked},
            f"[aggregation] name = '{rule}' is not allowed with {n} in a round: of fewer than 3 none can be told from the",
        )
        for rule in ("krum", "agreement", "quality")
        for n, asked in (
            ("2 sites", {}),
            ("2 sites", {"sites": {"west": {"data": "w"}}, "protocol": {"participation": 0.5}}),
            (
                "1 site",
                {"sites": {"west": {"data": "w"}}, "protocol": {"cohorts": [["north", "south"], ["west"]]}},
            ),
        )
    ),
    (
        {"aggregation": {"name": "krum", "keep": 50}, "sites": {"west": {"data": "w"}}},
        "[aggregation] keep = 50 is not allowed with 3 sites in a round. Allowed: 1 to 3: no more updates can be kept",
    ),
    ({"protocol": {"min_sites": 3}}, "[protocol] min_sites = 3 is not allowed. Allowed: 1 to 2, the number of sites."),
    (
        {"protocol": {"compare": ["locl"]}},
        "[protocol] compare = ['locl'] is not allowed. Allowed: 'local', 'centralized'.",
    ),
    (
        {"protocol": {"compare": "local"}},
        "[protocol] compare = 'local' is not allowed. Allowed: a list, each 'local', 'central",
    ),
    (
        {"engine": {"device": "cpu"}, "training": {"precision": "float16"}},
        "[training] precision = 'float16' is not allowed on a CPU. Allowed there: 'float32', 'bfloat16'.",
    ),
    (
        {"training": {"patch_size": [8]}},
        "[training] patch_size = [8] is not allowed. Allowed: 2 or 3 whole numbers of 1 or more.",
    ),
    (
        {"training": {"patch_size": 8}},
        "[training] patch_size = 8 is not allowed. Allowed: a list, each a whole number.",
    ),
    ({"training": {"batch_size": True}}, "[training] batch_size = True is not allowed. Allowed: a whole number."),
    ({"training": {"batch_size": 2.0}}, "[training] batch_size = 2.0 is not allowed. Allowed: a whole number."),
    ({"training": {"mirror": 0}}, "[training] mirror = 0 is not allowed. Allowed: true or false."),
    ({"network": {"name": 3}}, "[network] name = 3 is not allowed. Known: "),
    (
        {"network": {"base_feature": 8}},
        "[network] base_feature = 8 is not known. Did you mean 'base_features'? Known: ",
    ),
    (
        {"aggregation": {"name": "not_there:rule"}},
        "[aggregation] name = 'not_there:rule' is not allowed: aggregation: ",
    ),
    ({"sites": {"north": {"data": 3}}}, "[sites.north] data = 3 is not allowed. Allowed: a path."),
    ({"sites": {"north": {}}}, "[sites.north] data is missing. Expected a path. Add it."),
    ({"test": {}}, "[test] data is missing. Expected a path. Add it."),
)


@pytest.mark.parametrize(("tables", "expected"), ONE_ERROR)
def test_each_error_names_table_key_value_and_what_is_allowed(tables: dict[str, Any], expected: str) -> None:
    (line,) = errors(raw(**tables))
    assert line.startswith(expected)


RULE_WITH = {
    "learning_rate": "adam", "momentum": "momentum", "beta1": "adam", "beta2": "yogi", "tau": "adam", "share": "trimmed_mean",
    "faulty": "krum", "keep": "krum", "lag": "agreement", "turn": "agreement", "memory": "agreement", "sharpness": "quality",
    "cutoff": "quality", "cases": "judged", "mu": "proximal", "weight": "ditto", "temperature": "distill",
    "first_weight": "condistfl", "threshold": "secure_sum", "range": "secure_sum",
    "clip": "dp_sgd", "noise": "dp_sgd", "rate": "dp_sgd", "patches": "dp_sgd", "delta": "dp_sgd",
}  # fmt: skip
"""Option -> a plug-in that has it."""


@pytest.mark.parametrize("full", OPTION_RANGES)
def test_every_range_of_an_option_is_checked(full: str) -> None:
    table, key = full[1:].split("] ")
    other = {"aggregation": {"name": "quality"}} if key == "cases" else {}
    other |= {"collect": {"name": "judged"}} if RULE_WITH[key] == "quality" else {}
    sites = {"west": {"data": "w"}}
    (line,) = errors(raw(sites=sites, **{table: {"name": RULE_WITH[key], key: -1}} | other))
    given = -1 if key in ("faulty", "keep", "cases", "patches", "threshold") else -1.0
    assert line == f"{full} = {given} is not allowed. Allowed: {OPTION_RANGES[full][1]}."
    study = parse(sites=sites, **{table: {"name": RULE_WITH[key]}} | other)
    assert key in getattr(study, table).options, "its own default is in the range"


LIST_WITH = {
    "scale": "gaussian", "bound": "gaussian", "share": "dropout", "channels": "project", "bits": "quantise", "weight": "nopeek",
    "norm": "clip", "deviation": "gaussian",
}  # fmt: skip
"""Option -> a plug-in in a list that has it."""


@pytest.mark.parametrize("full", LIST_RANGES)
def test_every_range_of_an_option_in_a_list_is_checked(full: str) -> None:
    key_of_list, key = full[2:].split("]] ")
    split: dict[str, Any] = {"protocol": {"name": "splitfed", "rounds": 1, "steps": 1}}
    (line,) = errors(raw(**split) | {key_of_list: [{"name": LIST_WITH[key], key: -1}]})
    given = -1 if key in ("channels", "bits") else -1.0
    assert line == f"{full} = {given} is not allowed. Allowed: {LIST_RANGES[full][1]}."
    study = parse_study(raw(**split) | {key_of_list: [{"name": LIST_WITH[key]}]}, folder=Path("/"), check_data=False)
    assert key in getattr(study, key_of_list)[0].options, "its own default is in the range"


def test_options_of_a_rule_from_outside_have_no_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may mean something else by the same word."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rule_elsewhere.py").write_text(
        "def rule(total, state, *, before, share: float): return total.mean(), state"
    )
    study = parse(aggregation={"name": "rule_elsewhere:rule", "share": -3})
    assert study.aggregation.options == {"share": -3.0}


def test_what_suits_is_allowed() -> None:
    parse(sites={"west": {"data": "w"}}, aggregation={"name": "quality"}, collect={"name": "judged", "cases": 2})
    parse(aggregation={"name": "median"}, collect={"name": "judged"})
    parse(protocol={"name": "splitfed"}, aggregation={"name": "adam"})
    sites = {f"s{i}": {"data": "d"} for i in range(5)}
    document = raw(aggregation={"name": "krum", "faulty": 1}) | {"sites": sites}
    assert parse_study(document, folder=Path("/"), check_data=False).aggregation.options["faulty"] == 1


def test_a_teacher_is_none_where_there_are_no_labels_but_a_sites_own() -> None:
    found = errors(raw(local_update={"name": "condistfl"}, loss={"name": "own_labels"}))
    assert any("condistfl' is not allowed with [loss] name = 'own_labels'" in line for line in found)


def test_what_fits_partial_labels_is_allowed() -> None:
    parse(loss={"name": "own_labels"}, sharing={"keep": ["heads", "norms"]})
    parse(loss={"name": "own_labels"}, sharing={"keep": ["head*"]})
    parse(loss={"name": "own_labels"}, protocol={"name": "local"})
    parse(loss={"name": "marginal"}, local_update={"name": "condistfl"}, sharing={"keep": ["norms"]})


@pytest.mark.parametrize("full", RANGES)
def test_every_range_is_checked(full: str) -> None:
    """Values that are out of each range, or have no end; and one that is in it."""
    table, key = full[1:].split("] ")
    outside: dict[str, Any] = {
        "patch_size": [16, 0],
        "max_excluded": 1.5,
        "foreground": -0.1,
        "momentum": 1,
        "folds": 1,
    }
    extra: dict[str, Any] = {
        "epochs": {"steps": None}, "exchange_seconds": {"name": "splitfed"}, "min_matched": {"weights": "w"},
        "mu": {"name": "proximal"}, "weight": {"name": "ditto"}, "temperature": {"name": "distill"},
    }.get(key, {})  # fmt: skip
    extra |= {"steps": 2} if full == "[personalize] learning_rate" else {}
    given = outside.get(key, -1)
    (line,) = errors(raw(**{table: {key: given} | extra}))
    assert line.startswith(f"{full} = ")
    assert line.endswith(f" is not allowed. Allowed: {RANGES[full][1]}.")
    inside = {"patch_size": [16, 16, 8], "folds": 2}.get(key, 0 if key in ("foreground", "momentum", "fold") else 1)
    parse(**{table: {key: inside} | extra})
    without_default = (
        *("epochs", "memory_gb", "round_seconds", "exchange_seconds", "min_matched"),
        *("mu", "weight", "temperature", "participation", "mbit", "ms", "site_gflops", "server_gflops"),
    )  # fmt: skip
    if key in without_default or not isinstance(getattr(getattr(parse(), table), key, None), int | None):
        for endless in (float("nan"), float("inf")):
            assert errors(raw(**{table: {key: endless} | extra}))[0].startswith(f"{full} = {endless!r} is not allowed.")


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", ".", "-a", "_a", "a.b", "ä", "x:y", *RESERVED])
def test_names_that_no_site_may_have(name: str) -> None:
    (line,) = errors(raw() | {"sites": {name: {"data": "d"}, "other": {"data": "d"}}})
    assert "is not a name for a site. Allowed: letters, digits" in line


@pytest.mark.parametrize("table", ["study", "test", "network", "sites"])
def test_a_table_is_no_value(table: str) -> None:
    found = errors(raw() | {table: 3})
    assert f"{table} = 3 is not allowed. Expected a table [{table}]." in found
    assert "[sites.x] = 3 is not allowed. Expected a table with data = PATH." in errors(raw(sites={"x": 3}))


def test_an_empty_study_says_what_is_missing() -> None:
    assert errors({}) == [
        "[protocol] rounds is missing. Expected a whole number. Add it.",
        "[study] name is missing. Expected text. Add it.",
        "[sites.NAME] is missing. Expected a table for each site, with its data. Add at least one.",
    ]


def test_a_required_option_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_an_option.py").write_text("def rule(total, state, *, mu: float, n: int = 1): ...")
    monkeypatch.syspath_prepend(tmp_path)
    name = "needs_an_option:rule"
    (line,) = errors(raw(aggregation={"name": name}))
    assert line == f"[aggregation] mu is missing. {name} needs it (a number). Add it."
    assert parse(aggregation={"name": name, "mu": 1}).aggregation == PlugIn(name, {"mu": 1.0, "n": 1})


@pytest.mark.parametrize(
    "content",
    [b"[study", b"a = 1\na = 2", b"\xff\xfe", b"a = " + b"[" * 5000, b"a = 1" + b"0" * 5000],
    ids=["cut off", "twice", "no UTF-8", "nested", "digits"],
)
def test_a_file_that_is_no_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(StudyError, match=r"x\.toml is not valid TOML \(.*\)\. Correct it there\."):
        read_study(tmp_path / "x.toml")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"none\.toml cannot be read \(No such file or directory\)"):
        read_study(tmp_path / "none.toml")
    with pytest.raises(StudyError, match=r"cannot be read \(Is a directory\)"):
        read_study(tmp_path)


def test_a_site_may_have_its_own_words(tmp_path: Path) -> None:
    sites = {"north": {"data": "n"}, "south": {"data": "s", "labels": {"ant": "anterior"}, "channels": {"T1w": "T1"}}}
    raw = {"study": {"name": "s"}, "protocol": {"rounds": 1, "steps": 1}, "sites": sites}
    study = parse_study(raw, folder=tmp_path, check_data=False)
    assert (study.sites["south"].labels, study.sites["south"].channels) == ({"ant": "anterior"}, {"T1w": "T1"})
    (tmp_path / "study.toml").write_text(to_toml(study))
    assert read_study(tmp_path / "study.toml", check_data=False) == study
    with pytest.raises(
        StudyError, match=r"\[sites.south\] labels = \{'ant': 1\} is not allowed. Allowed: .*a table, each value text"
    ):
        parse_study(raw | {"sites": {"south": {"data": "s", "labels": {"ant": 1}}}}, folder=tmp_path, check_data=False)


def test_data_must_be_there_unless_it_is_not_asked_for(tmp_path: Path) -> None:
    document = raw(test={"data": "t"})
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "dataset.json").write_text("{}")
    with pytest.raises(StudyError) as e:
        parse_study(document, folder=tmp_path)
    assert str(e.value).splitlines() == [
        "study has 2 errors:",
        "  - [test] data = 't' is no nnU-Net raw folder: it has no dataset.json. Correct the path.",
        "  - [sites.south] data = 's' is no nnU-Net raw folder: it has no dataset.json. Correct the path.",
    ]
    assert parse_study(document, folder=tmp_path, check_data=False).sites


def test_between_hospitals_each_site_knows_where_its_data_lie(tmp_path: Path) -> None:
    study = parse_study(raw(sites={"north": {}}, engine={"name": "flare"}), folder=tmp_path)
    assert [site.data for site in study.sites.values()] == [None, tmp_path / "s"]


# ------------------------------------------------------------------------------------- every message of the package

OURS = {"StudyError", "DataError", "EngineError", "PrivacyError", "ContractError"}
PASSED_ON = {"leakage/__init__.py", "line.py", "preparation.py", "training.py"}
"""Files that raise with sentences made elsewhere: of a failure at a site, or of options."""
WITHOUT_A_VALUE = (
    "A model that never trained here was asked for.",
    "There are 0 cases to train on.",  # the value is 0
    "No fingerprint to merge.",
    "A batch does not say whose patches it has.",
    "A site has no training cases in this fold.",
    "No gallery was given.",
    "No candidates were given.",
    "No candidates, or no loss, were given.",
    "No label maps, or no loss, were given.",
    "The weights of the front were asked for.",
    "The whole network was asked for.",
    "Sites were to be steered.",
    "The front leaves no float map.",
    "No case has foreground.",
    "Exact and binned geometry do not add up.",
)
"""Beginnings of messages that have nothing to show but what they say."""
ONE_SENTENCE = ("{} has {} error{}:",)
"""A heading: each line below it says what to do."""


def text_of(node: ast.expr) -> str | None:
    """The message with `{}` for each value; `None` where it is made elsewhere."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join("{}" if isinstance(p, ast.FormattedValue) else ast.literal_eval(p) for p in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            a, b = text_of(left), text_of(right)
            return None if a is None and b is None else f"{a or '{}'}{b or '{}'}"
    return None


def made() -> Iterator[tuple[str, str | None]]:
    """Every place in the package where one of our exceptions is made: where, and its message."""
    root = Path(concilium.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OURS and node.args:
                yield path.relative_to(root).as_posix(), text_of(node.args[0])


def test_every_message_shows_what_was_given_and_says_what_to_do() -> None:
    found = list(made())
    assert len(found) > 50
    assert {where for where, text in found if text is None} <= PASSED_ON
    for where, text in found:
        if text is None:
            continue
        sentences = re.split(r"(?<=[.!?]) +", text.strip())
        assert len(sentences) >= 2 or text.startswith(ONE_SENTENCE), f"{where}: {text!r} does not say what to do"
        if not text.startswith(WITHOUT_A_VALUE):
            assert "{}" in text, f"{where}: {text!r} does not show what was given"


def test_the_check_of_messages_sees_a_bad_one() -> None:
    def read(code: str) -> str | None:
        call = ast.parse(code, mode="eval").body
        assert isinstance(call, ast.Call)
        return text_of(call.args[0])

    assert read("E(f'{x!r} is ' 'wrong')") == "{} is wrong"
    assert read("E('; '.join(x) + '. Mend it.')") == "{}. Mend it."
    assert read("E(text)") is None


BROUGHT = """
def bring(*, plan, labels, channels, device): ...
def step(local, batch): ...
"""


@pytest.mark.parametrize("more", ["def finish(local, *, steps): ...", "PERSONAL = True", "TOGETHER = True"])
def test_a_local_update_that_brings_its_network_has_nothing_beside(
    more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"brought_{abs(hash(more))}"
    (tmp_path / f"{name}.py").write_text(BROUGHT + more)
    (line,) = errors(raw(local_update={"name": f"{name}:step"}))
    assert line.startswith(
        f"[local_update] name = '{name}:step' is not allowed: beside `bring` it has finish, PERSONAL or "
    )


def test_what_is_exchanged_beside_the_weights_needs_a_protocol_that_does() -> None:
    found = {"protocol": SimpleNamespace(name="another"), "local_update": PlugIn("scaffold")}
    (line,) = constraints._cannot_update(found)
    assert line.startswith(
        "[local_update] name = 'scaffold' is not allowed with protocol 'another', which exchanges weights alone."
    )
    assert constraints._cannot_update({**found, "protocol": SimpleNamespace(name="federated")}) == []
