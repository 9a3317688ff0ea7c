"""Studies that freeze tensors: what does not train never changes, never travels and has no state, whatever else a study says."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sessions import quick
from torch import Tensor

import concilium.beginning
import concilium.line
from concilium import wire
from concilium.answers import relay
from concilium.answers.train import Learner
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.data.plan import open_plan
from concilium.errors import DataError, StudyError
from concilium.exports import export_run
from concilium.finished import open_finished
from concilium.freezing import frozen_of
from concilium.line import Event, run
from concilium.networks.nnunet import to_library
from concilium.protocols import Round, start_with
from concilium.protocols._body import Body
from concilium.study import Study, parse_study, to_toml

Make = Callable[..., Study]
SITES = ("north", "south", "west")
DECODER = ("up", "decode", "head")
BATCH = {"network__norm": "batch"}

WAYS: dict[str, dict[str, Any]] = {
    "federated and baselines": BATCH | {"protocol__compare": ["local", "centralized"]},
    "cyclic": BATCH | {"protocol__name": "cyclic"},
    "cyclic, revealed": BATCH | {"protocol__name": "cyclic", "protocol__reveal": True},
    "v1": BATCH | {"protocol__name": "splitfed"},
    "v2": BATCH | {"protocol__name": "splitfed", "protocol__variant": "v2"},
    "v3": BATCH | {"protocol__name": "splitfed", "protocol__variant": "v3"},
    "sequential": BATCH | {"protocol__name": "splitfed", "protocol__variant": "sequential"},
    "defended": BATCH | {"protocol__name": "splitfed", "defences": [{"name": "project", "channels": 2}]},
    "proximal": {"local_update__name": "proximal"},
    "scaffold": {"local_update__name": "scaffold", "training__optimizer": "sgd"},
    "ditto": {"local_update__name": "ditto"},
    "distill": {"local_update__name": "distill"},
    "fedadamw": {"local_update__name": "fedadamw", "training__optimizer": "adamw"},
    "dp_sgd": BATCH | {
        "training__tensors": ["heads"], "local_update__name": "dp_sgd", "local_update__rate": 0.5, "local_update__delta": 0.01,
    },
    "filters": {"filters": [{"name": "clip", "norm": 1.0}, {"name": "gaussian", "deviation": 1e-3}]},
    "secure_sum": {"collect__name": "secure_sum", "collect__threshold": 2},
    "judged": {"collect__name": "judged", "aggregation__name": "quality"},
    "median": {"aggregation__name": "median"},
    "adam": {"aggregation__name": "adam"},
    "kept": BATCH | {"sharing__keep": ["norms"], "sharing__unseen": "mean"},
    "estimated anew": BATCH | {"sharing__keep": ["heads"], "sharing__unseen": "reestimate"},
    "personalized": BATCH | {"personalize__steps": 1},
    "best of rounds": {"validation__every": 1, "validation__select": "best"},
    "left out": {"validation__leave_one_site_out": True, "protocol__rounds": 1},
    "own plans": {"plan__fingerprint": "site", "network__name": "nnunet", "network__levels": None, "network__norm": None},
    "micro-batches": {"sites__micro": 1},
    "bfloat16": {"training__precision": "bfloat16"},
    "maps of views kept": BATCH | {"training__views": 2},
}  # fmt: skip

SIMILAR = {
    "cyclic, revealed", "v2", "v3", "proximal", "distill", "fedadamw", "median", "adam", "estimated anew", "left out",
    "micro-batches", "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="session")
def frozen(small_study: Make) -> Make:
    """Two rounds of two steps of a small U-Net at three sites, of which the decoder trains."""

    def make(**changes: Any) -> Study:
        small: dict[str, Any] = {"protocol__name": "federated", "protocol__cut": None, "test": False}
        small |= {"training__tensors": ["decoder"], "protocol__rounds": 2, "protocol__steps": 2}
        if changes.get("protocol__name") == "splitfed":
            small["protocol__cut"] = "shallow"
        lists = {key: changes.pop(key) for key in ("filters", "defences") if key in changes}
        micro = changes.pop("sites__micro", None)
        study = quick(small_study, **small | changes)
        if lists or micro:
            raw = tomllib.loads(to_toml(study)) | lists
            for site in raw["sites"].values() if micro else ():
                site["micro_batch"] = micro
            study = parse_study(raw, folder=Path())
        return study

    return make


@dataclass
class Seen:
    """What a run showed: what was packed, named in messages or sealed, what began, and what optimisers hold."""

    packed: list[bytes] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    starts: list[dict[str, Tensor]] = field(default_factory=list)
    saved: set[str] = field(default_factory=set)
    hidden: dict[str, list[Tensor]] = field(default_factory=dict)
    """Every frozen tensor as it was whenever a model that trained was looked at."""
    optimizers: int = 0


def names_in(value: Any) -> Iterator[str]:
    """Every key under which a tensor stands in a message."""
    if isinstance(value, Mapping):
        yield from (k for k, v in value.items() if isinstance(v, Tensor))
        for v in value.values():
            yield from names_in(v)
    elif isinstance(value, tuple):
        for v in value:
            yield from names_in(v)
    elif is_dataclass(value):
        for f in fields(value):
            yield from names_in(getattr(value, f.name))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    pack, seal, state, of_body, begin = wire.pack, relay.seal, Learner._state, Body.state, start_with

    def packing(message: Any) -> bytes:
        packed = pack(message)
        found.packed.append(packed)
        found.named.update(names_in(message))
        return packed

    def sealing(tensors: Any, *about: Any, **how: Any) -> Tensor:
        found.named.update(tensors)
        return seal(tensors, *about, **how)

    def check(network: Any, optimizer: torch.optim.Optimizer) -> None:
        hidden = {id(p) for p in network.parameters() if not p.requires_grad}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in optimizer.state}
        assert hidden.isdisjoint(held)
        found.optimizers += 1
        for name, tensor in frozen_of(network).items():
            found.hidden.setdefault(name, []).append(tensor.clone())

    def saving(self: Learner) -> Any:
        check(self.network, self.optimizer)
        tensors, about = state(self)
        found.saved |= {n.removeprefix("weights/") for n in tensors}
        return tensors, about

    def body(self: Body) -> Any:
        check(self.network, self.optimizer)
        return of_body(self)

    def starting(weights: Any) -> Round:
        found.starts.append({n: t.clone() for n, t in weights.items()})
        return begin(weights)

    monkeypatch.setattr(wire, "pack", packing)
    monkeypatch.setattr(relay, "seal", sealing)
    monkeypatch.setattr(Learner, "_state", saving)
    monkeypatch.setattr(Body, "state", body)
    monkeypatch.setattr(concilium.line, "start_with", starting)
    return found


@pytest.fixture(scope="module")
def drawn(small_study: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, dict[str, Tensor]]:
    """What a study that freezes nothing begins with, by its norm."""
    known: dict[str | None, dict[str, Tensor]] = {}
    for norm in (None, "batch"):
        told: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                concilium.line, "start_with", lambda weights, told=told: told.append(weights) or start_with(weights)
            )
            one = {"protocol__name": "federated", "protocol__cut": None, "protocol__rounds": 1, "test": False}
            study = quick(small_study, **one, **({} if norm is None else {"network__norm": norm}))
            run(study, tmp_path_factory.mktemp("drawn") / "run")
        known[norm] = {n: t.clone() for n, t in told[0].items()}
    return known


def models(folder: Path) -> dict[str, dict[str, Tensor]]:
    paths = [*folder.glob("weights/*.safetensors"), *folder.glob("sites/*/models/*.safetensors")]
    return {str(p.relative_to(folder)): load_file(p) for p in paths}


def state_of(folder: Path, model: str) -> set[str]:
    (state,) = (folder / "checkpoints" / model).glob("[0-9]*.safetensors")
    return {n.removeprefix("weights/") for n in load_file(state)}


def must_not_have_moved(seen: Seen, folder: Path, begin: Mapping[str, Tensor], trains: tuple[str, ...]) -> None:
    """The claims, of every model of a run in which the tensors of some stages train."""
    still = {n for n in begin if not n.startswith(trains)}
    assert still
    assert still.isdisjoint(seen.named), "a frozen tensor is named in a message"
    assert still.isdisjoint(seen.saved), "a frozen tensor is in a snapshot"
    told = {n: begin[n].contiguous().numpy().tobytes() for n in still if begin[n].numel() >= 16}
    told = {n: content for n, content in told.items() if len(set(content)) > 4}  # ones and zeros are everywhere
    assert told
    assert not any(content in packed for content in told.values() for packed in seen.packed), "its bytes travel"
    assert seen.optimizers
    assert seen.hidden
    assert seen.hidden.keys() <= still
    assert all(torch.equal(t, begin[n]) for n, tensors in seen.hidden.items() for t in tensors), "it moved in training"
    found = models(folder)
    assert found
    for where, weights in found.items():
        assert weights.keys() - {n for n in weights if n.startswith("defence")} == begin.keys(), where
        assert all(torch.equal(weights[n], begin[n]) for n in still), where
        moved = [n for n in begin.keys() - still if n.endswith("weight") and not torch.equal(weights[n], begin[n])]
        assert moved or where.endswith("unseen"), where


def tried(way: str) -> Any:
    """The first always, others where time is, and what differs little from these with `./test --all`."""
    if way == next(iter(WAYS)):
        return way
    return pytest.param(way, marks=pytest.mark.exhaustive if way in SIMILAR else pytest.mark.slow)


@pytest.mark.parametrize("way", map(tried, WAYS))
def test_what_is_frozen_never_changes_never_travels_and_has_no_state(
    way: str, frozen: Make, seen: Seen, drawn: Any, tmp_path: Path
) -> None:
    changes = dict(WAYS[way])
    outcome = run(frozen(**changes), tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    if way == "own plans":  # each site draws its own
        assert not any(n.startswith(("down", "encode")) for n in seen.named | seen.saved)
        return
    begin = drawn[changes.get("network__norm")]
    trains = ("head",) if way == "dp_sgd" else DECODER
    must_not_have_moved(seen, tmp_path / "run", begin, trains)
    if way != "defended":
        n_all, n_trained = (sum(t.numel() for n, t in begin.items() if n.startswith(some)) for some in ("", trains))
        assert {(m["parameters"], m["trained"]) for m in outcome.results["models"]} == {(n_all, n_trained)}


# ------------------------------------------------------------------------------------------------- parts that do not train


@pytest.mark.slow
@pytest.mark.parametrize("tensors", [["head0.*", "up0.*"], ["down1.*"], ["stem"]], ids=["tail", "body", "front"])
@pytest.mark.parametrize("variant", ["v1", pytest.param("v2", marks=pytest.mark.exhaustive)])
def test_one_part_of_a_split_network_may_train_alone(
    variant: str, tensors: list[str], frozen: Make, seen: Seen, drawn: Any, tmp_path: Path
) -> None:
    """Also where nothing at the server trains, or nothing at the sites."""
    study = frozen(
        protocol__name="splitfed", protocol__variant=variant, protocol__cut=["down0", "up0"], training__tensors=tensors
    )
    outcome = run(study, tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    first = tuple("down0." if one == "stem" else one.removesuffix("*") for one in tensors)
    must_not_have_moved(seen, tmp_path / "run", drawn[None], first)
    assert state_of(tmp_path / "run", "splitfed") - {n for n in drawn[None] if n.startswith(first)} <= {
        n for n in state_of(tmp_path / "run", "splitfed") if n.startswith(("body/", "rule/"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("tensors", [["fuse.*", "head0.*", "up0.*"], ["fronts.first.*"], ["up0.*"]])
def test_parties_may_have_nothing_that_trains(tensors: list[str], seen: Seen, tmp_path: Path) -> None:
    """Fronts frozen, all fronts but one, and both the server's part and the fronts."""
    write_sequences(tmp_path / "data", n_cases=6, n_test=2, size=16)
    raw: dict[str, Any] = {
        "study": {"name": "parties", "seed": 3},
        "sites": {name: {"data": str(tmp_path / "data" / name), "holds": [name]} for name in SEQUENCES},
        "test": {"data": str(tmp_path / "data/test")},
        "protocol": {
            "name": "vertical", "labels": "first", "cut": "shallow", "rounds": 2, "steps": 2, "compare": ["centralized"],
        },
        "network": {"name": "unet", "base_features": 4, "levels": 2},
        "training": {"optimizer": "adamw", "batch_size": 2, "patch_size": [8, 16, 16], "mirror": False, "tensors": tensors},
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }  # fmt: skip
    outcome = run(parse_study(raw, folder=tmp_path), tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    trains = tuple(one.removesuffix("*") for one in tensors)
    assert all(n.startswith(trains) for n in seen.named | {n for n in seen.saved if not n.startswith(("optim", "mem"))})
    one, other = (load_file(tmp_path / "run/weights" / f"{name}.safetensors") for name in ("vertical", "centralized"))
    assert one.keys() == other.keys()
    assert {n for n in one if not torch.equal(one[n], other[n])} == {n for n in one if n.startswith(trains)}


# ------------------------------------------------------------------------------------------------- the same as elsewhere


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_one_site_trains_as_alone_and_all_that_trains_is_all(frozen: Make, tmp_path: Path) -> None:
    one = run(frozen(sites=("north",), protocol__compare=["local"], **BATCH), tmp_path / "one")
    alone = load_file(one.folder / "sites/north/models/local.safetensors")
    assert equal(load_file(one.folder / "weights/federated.safetensors"), alone)
    every = run(frozen(training__tensors=["*"]), tmp_path / "every")
    plain = run(frozen(training__tensors=None), tmp_path / "plain")
    weights, expected = (load_file(o.folder / "weights/federated.safetensors") for o in (every, plain))
    assert equal(weights, expected)
    assert "trained" not in every.results["models"][0]
    sent = [o.results["models"][0]["sites"]["north"]["bytes_up"] for o in (every, plain)]
    assert abs(sent[0] - sent[1]) < 100  # seconds take more or fewer digits


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["federated", "splitfed", pytest.param("cyclic", marks=pytest.mark.exhaustive)])
def test_stopped_and_resumed_is_uninterrupted(protocol: str, frozen: Make, tmp_path: Path) -> None:
    study = frozen(protocol__name=protocol, protocol__compare=["local"], **BATCH)
    run(study, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(study, tmp_path / "run", watch=stop_after(1))
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    found, expected = models(tmp_path / "run"), models(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(equal(found[where], expected[where]) for where in found)


@pytest.mark.exhaustive
def test_worker_processes_draw_the_same(frozen: Make, tmp_path: Path) -> None:
    for workers in (1, 2):
        study = frozen(engine__workers=workers, sites=("north", "south"), **BATCH)
        assert run(study, tmp_path / str(workers)).exit_code == 0
    assert equal(*(load_file(tmp_path / w / "weights/federated.safetensors") for w in ("1", "2")))


class Stopped(Exception):
    """A kill, without the process."""


def stop_after(number: int) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if event.kind == "round" and event.round == number:
            raise Stopped

    return stop


# ----------------------------------------------------------------------------------------------- from a file at each site


@pytest.fixture(scope="module")
def first(frozen: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to start from, of another seed."""
    study = frozen(training__tensors=None, study__seed=8, **BATCH)
    return run(study, tmp_path_factory.mktemp("first") / "run").folder


def test_frozen_tensors_are_read_from_a_copy_at_each_site(
    frozen: Make, seen: Seen, first: Path, tmp_path: Path
) -> None:
    """Names in the file may differ, some tensors may not be in it, and a variant may start from another file."""
    before = load_file(first / "weights/federated.safetensors")
    other = tmp_path / "w.safetensors"
    save_file({f"module.{n}": t for n, t in before.items() if not n.startswith("encode1")}, other)
    study = frozen(network__weights=str(first), protocol__compare=["local"], **BATCH)
    raw = tomllib.loads(to_toml(study)) | {
        "variants": {"some": {"network": {"weights": str(other), "min_matched": 0.3}}}
    }
    outcome = run(parse_study(raw, folder=tmp_path), tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    found = models(tmp_path / "run")
    some = found.pop("weights/some.safetensors")
    begin = {n: t for n, t in before.items() if not n.startswith(DECODER)}
    assert all(equal({n: w[n] for n in begin}, begin) for where, w in found.items() if "some" not in where)
    drawn_anew = {n for n in begin if not torch.equal(some[n], before[n])}
    assert drawn_anew
    assert all(n.startswith("encode1") for n in drawn_anew)
    assert seen.named.isdisjoint(begin)


def test_sites_find_tensors_by_the_names_that_the_file_has(frozen: Make, tmp_path: Path) -> None:
    """As in published weights: the server tells which is which."""
    made = {
        "network__name": "nnunet",
        "network__levels": None,
        "network__base_features": 4,
        "sites": ("north", "south"),
    }
    folder = run(frozen(training__tensors=None, study__seed=8, **made), tmp_path / "first").folder
    before = load_file(folder / "weights/federated.safetensors")
    plan = open_plan((folder / "plans.json").read_text(), "3d_fullres").architecture
    theirs = to_library(before, plan=plan, n_channels=1, n_labels=3)
    assert not theirs.keys() & before.keys()
    torch.save({"network_weights": theirs}, tmp_path / "w.pth")
    outcome = run(frozen(network__weights=str(tmp_path / "w.pth"), **made), tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    after = load_file(outcome.folder / "weights/federated.safetensors")
    still = {n for n in before if not n.startswith(DECODER)}
    assert equal({n: after[n] for n in still}, {n: before[n] for n in still})


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["federated", "splitfed"])
def test_segment_anything_by_its_adapters(protocol: str, frozen: Make, seen: Seen, tmp_path: Path) -> None:
    """FedMSA: adapters and decoder are averaged, the encoder is each site's own copy of the file that has no adapters."""
    options = {
        "name": "sam", "levels": None, "base_features": None, "width": 16, "depth": 3, "heads": 2, "patch": 8,
        "image_size": 32, "decoder_features": 16,
    }  # fmt: skip
    made = {f"network__{name}": value for name, value in options.items()} | {"sites": ("north", "south")}
    plain = run(frozen(training__tensors=None, study__seed=8, protocol__rounds=1, **made), tmp_path / "plain").folder
    before = load_file(plain / "weights/federated.safetensors")
    seen.named.clear()
    made |= {"network__adapt": "adapters", "network__weights": str(plain), "protocol__name": protocol}
    wanted = ["adapters", "decoder.[!p]*", "heads"]
    outcome = run(frozen(training__tensors=wanted, **made), tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    after = load_file(outcome.folder / f"weights/{protocol}.safetensors")
    still = {n for n in before if not n.startswith(("decoder.", "head")) or n.startswith("decoder.prompts")}
    assert equal({n: after[n] for n in still}, {n: before[n] for n in still})
    assert seen.named & after.keys() == after.keys() - still
    assert any("adapter" in n for n in seen.named)


@pytest.fixture(scope="module")
def further(frozen: Make, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that started from it and was not stopped."""
    source = first / "weights/federated.safetensors"
    return run(frozen(network__weights=str(source), **BATCH), tmp_path_factory.mktemp("further") / "run").folder


@pytest.mark.parametrize("change", [pytest.param("changed", marks=pytest.mark.slow), "gone"])
def test_a_run_goes_on_where_the_file_does_not_lie_any_more(
    change: str, frozen: Make, first: Path, further: Path, tmp_path: Path
) -> None:
    source = tmp_path / "w.safetensors"
    shutil.copyfile(first / "weights/federated.safetensors", source)
    study = frozen(network__weights=str(source), **BATCH)
    with pytest.raises(Stopped):
        run(study, tmp_path / "run", watch=stop_after(1))
    if change == "gone":
        source.unlink()
    else:
        save_file({n: t + 1 for n, t in load_file(source).items()}, source)
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    assert equal(*(load_file(f / "weights/federated.safetensors") for f in (tmp_path / "run", further)))


@pytest.mark.parametrize("fault", ["no copy", "another file", "another server"])
def test_two_frozen_parts_never_meet(
    fault: str, frozen: Make, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site says what it lacks, before it preprocesses a case."""
    other = tmp_path / "other.safetensors"
    save_file({n: t + 1 for n, t in load_file(first / "weights/federated.safetensors").items()}, other)
    if fault == "another server":
        tell = concilium.beginning.digest_of
        monkeypatch.setattr(concilium.beginning, "digest_of", lambda t: tell({n: x + 1 for n, x in t.items()}))
    else:
        at_sites = {"weights": (other,)} if fault == "another file" else {}
        monkeypatch.setattr(concilium.line, "weights_at_sites", lambda study: at_sites)
    told = {
        "no copy": r"no_weights .*name a copy of the file.*site needs a copy; it has none.*name it in site\.toml",
        "another file": r"no_weights.*it has .*other\.safetensors \([0-9a-f]{64}\)",
        "another server": r"frozen_differs.*come out otherwise here than at the server",
    }[fault]
    with pytest.raises(DataError, match=f"(?s){told}"):
        run(frozen(network__weights=str(first), **BATCH), tmp_path / "run")
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.slow
def test_a_finished_model_is_whole_wherever_it_lies(frozen: Make, first: Path, tmp_path: Path) -> None:
    """For prediction, export and the next study."""
    study = frozen(network__weights=str(first), sharing__keep=["norms"], sharing__unseen="mean", **BATCH)
    folder = run(study, tmp_path / "run").folder
    for name in ("federated:north", "federated-elsewhere"):
        (network,) = open_finished(folder, name).networks()
        assert not frozen_of(network)
    out = export_run(folder, tmp_path / "out", format="safetensors", model="federated-elsewhere")
    assert out
    again = run(frozen(network__weights=f"{folder}#federated-elsewhere", **BATCH), tmp_path / "again")
    assert again.exit_code == 0


# ----------------------------------------------------------------------------------------------------- what is not possible


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training__tensors": ["adapters"]}, r"\[training\] tensors = \['adapters'\] is not possible: 'adapters' is no tensor"),
        ({"training__tensors": ["statistics"], **BATCH}, r"none of these \d+ tensors trains, so nothing would"),
        ({"training__tensors": ["decoder"], "sharing__keep": ["stem"]}, r"'stem' is no tensor of this network that trains"),
        ({"training__tensors": ["heads"], "personalize__steps": 1, "personalize__tensors": ["stem"]}, "'stem' is no tensor"),
        ({"training__tensors": ["decoder"], "sharing__keep": ["decoder"]}, "At least one must be shared"),
        ({"training__tensors": ["*lonely"], "network__name": "faults:lonely"}, "logits depend on none of them"),
    ],
    ids=["no such role", "nothing trains", "kept and frozen", "fine-tuned and frozen", "nothing shared", "not reached"],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_trains(
    changes: dict[str, Any], told: str, frozen: Make, tmp_path: Path
) -> None:
    if "network__name" in changes:
        changes |= {"network__levels": None, "network__norm": None, "network__base_features": None}
    with pytest.raises(StudyError, match=told):
        run(frozen(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "cache").exists()


def test_a_trainer_that_brings_its_own_optimiser_freezes_nothing(frozen: Make) -> None:
    with pytest.raises(StudyError, match=r"\[training\] tensors = \['heads'\] is not allowed with .*'nnunet_trainer'"):
        frozen(
            training__tensors=["heads"],
            local_update__name="nnunet_trainer",
            network__name="nnunet",
            network__levels=None,
        )


def test_a_network_may_say_itself_what_trains_and_the_study_otherwise(frozen: Make, tmp_path: Path) -> None:
    made = {"network__name": "faults:lonely", "network__levels": None, "network__base_features": None}
    for name, wanted in (("own", None), ("all", ["*"])):
        run(frozen(training__tensors=wanted, **made), tmp_path / name)
    own, every = (state_of(tmp_path / name, "federated") for name in ("own", "all"))
    assert own
    assert all(n.startswith("head0.") for n in own)
    assert every == set(load_file(tmp_path / "all/weights/federated.safetensors"))


# ------------------------------------------------------------------------------------------------------------------ forecast


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"protocol__name": "splitfed", "protocol__cut": "deep"}, marks=pytest.mark.slow)],
    ids=["federated", "splitfed"],
)
def test_bytes_are_those_forecast_and_what_is_frozen_costs_less(
    changes: dict[str, Any], frozen: Make, tmp_path: Path
) -> None:
    told = []
    for name, wanted in (("some", ["decoder"]), ("all", None)):
        made = {
            "network__base_features": 8,
            "network__levels": 3,
            "protocol__rounds": 1,
            "forecast__site_gflops": 10.0,
        }
        study = frozen(training__tensors=wanted, sites=("north", "south"), **made, **changes)
        folder = run(study, tmp_path / name).folder
        (forecast,) = (json.loads(p.read_text())["sites"]["north"] for p in (folder / "forecast").iterdir())
        sent = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])["sites"]["north"]
        for way in ("up", "down"):
            assert forecast[way] <= sent[f"bytes_{way}"] <= 1.02 * forecast[way]
        told.append(forecast)
    some, every = told
    assert all(some[key] < every[key] for key in ("up", "down", "memory", "seconds"))
