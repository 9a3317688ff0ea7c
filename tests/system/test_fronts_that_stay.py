"""`vertical` with `fronts = "stay"`, through the whole line: no front leaves its site, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_new_patients import arrives, assert_same, label_maps
from torch import Tensor

from concilium import wire
from concilium.data.phantom_sequences import SEQUENCES, write_sequences
from concilium.errors import EngineError, StudyError
from concilium.exports import export_run
from concilium.finished import finished_models, open_finished
from concilium.line import Event, Outcome, run
from concilium.messages import Finish, Keep, Look
from concilium.predict import predict
from concilium.schedule import BEST
from concilium.site import Site
from concilium.study import Study, parse_study, read_study, to_toml

KEY = "vertical"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fronts") / "data"
    write_sequences(folder, n_cases=4, n_test=2, size=16)
    arrives(folder, 0)
    return folder


def tables(data: Path, fronts: str = "stay", **protocol: Any) -> dict[str, dict[str, Any]]:
    own = {"labels": "first", "cut": "shallow", "rounds": 3, "steps": 2, "new_patients": True, "fronts": fronts}
    return {
        "study": {"name": "fronts", "seed": 5},
        "sites": {name: {"data": str(data / name), "holds": [name]} for name in SEQUENCES},
        "protocol": {"name": "vertical"} | own | protocol,
        "network": {"name": "unet", "base_features": 4, "levels": 2},
        "training": {
            "optimizer": "adamw",
            "batch_size": 2,
            "patch_size": [8, 16, 16],
            "mirror": False,
            "learning_rate": 0.05,
        },
        "validation": {"every": 1, "select": "best"},
        "engine": {"threads": 1, "device": "cpu", "pictures": False},
    }


def study_on(data: Path, fronts: str = "stay", **protocol: Any) -> Study:
    return parse_study(tables(data, fronts, **protocol), folder=data)


Said = list[tuple[bytes, Any]]


def said_in(study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[Outcome, Said]:
    """The run, and everything that server and sites packed in it."""
    said: Said = []
    pack = wire.pack

    def heard(message: Any) -> bytes:
        said.append((packed := pack(message), message))
        return packed

    with monkeypatch.context() as patch:
        patch.setattr(wire, "pack", heard)
        return run(study, folder, **how), said


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a message, by its name in it."""
    match value:
        case Tensor():
            yield name, value
        case Mapping():
            for key, inner in value.items():
                yield from tensors_in(inner, str(key))
        case list() | tuple():
            for inner in value:
                yield from tensors_in(inner, name)
        case _:
            for key, inner in getattr(value, "__dict__", {}).items():
                yield from tensors_in(inner, key)


def fronts_in(said: Said, fronts: Mapping[str, Tensor]) -> set[str]:
    """What of fronts is in messages: by name, or by the bytes of a tensor of these."""
    found = {name for _, message in said for name, _ in tensors_in(message) if name.startswith("fronts.")}
    bytes_of = {name: t.numpy().tobytes() for name, t in fronts.items() if t.unique().numel() > 2}  # not ones, or zeros
    assert len(bytes_of) > 3
    return found | {name for name, of in bytes_of.items() if any(of in packed for packed, _ in said)}


@pytest.fixture(scope="module")
def both(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Said, dict[str, Tensor]]]:
    """The study with fronts that stay, and that are sent: outcome, what was said, and all that fronts ever were."""
    made = {}
    for fronts in ("stay", "sent"):
        folder, ever = tmp_path_factory.mktemp(fronts) / "run", dict[str, Tensor]()

        def watch(event: Event, folder: Path = folder, ever: dict[str, Tensor] = ever) -> None:
            if event.kind == "round":
                ever |= {f"{p}:{n}": t for p, n, t in _fronts(folder / "sites")}

        with pytest.MonkeyPatch.context() as patch:
            outcome, said = said_in(study_on(data, fronts), folder, patch, watch=watch)
        made[fronts] = outcome, said, ever | {f"{p}:{n}": t for p, n, t in _fronts(folder / "sites")}
    return made


def _fronts(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.removeprefix("weights/").startswith("fronts."):
                yield str(path.relative_to(folder)), name, tensor


def test_no_message_and_no_file_of_the_server_has_a_front(
    both: Mapping[str, tuple[Outcome, Said, dict[str, Tensor]]],
) -> None:
    """In a whole run with validation after each round, the choice of a round, the final push and new patients."""
    outcome, said, ever = both["stay"]
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    kinds = {type(message).__name__ for _, message in said}
    assert {"Front", "Finish", "Trained", "Keep", "Snapshot", "Looked", "Conclude", "Forget"} <= kinds
    assert {name.partition("/")[0] for name in ever} == set(SEQUENCES)
    assert fronts_in(said, ever) == set()
    sent = fronts_in(both["sent"][1], both["sent"][2])
    assert any(name.startswith("fronts.") for name in sent), "this test would not notice a front's name"
    assert any("models/vertical" in name for name in sent), "this test would not notice a front's bytes"
    files = [p for p in outcome.folder.rglob("*.safetensors") if "sites" not in p.parts]
    assert {p.parent.name for p in files} >= {"weights", KEY}
    assert not [n for p in files for n in load_file(p) if "fronts." in n]


def test_all_else_is_as_where_fronts_are_sent(
    both: Mapping[str, tuple[Outcome, Said, dict[str, Tensor]]],
) -> None:
    """To the bit, in a simulation: what the server has, each site's part, scores, the chosen round, and new patients."""
    stay, sent = (both[fronts][0] for fronts in ("stay", "sent"))
    assert [stay.results[key] for key in ("cases", "warnings")] == [sent.results[key] for key in ("cases", "warnings")]
    assert len(stay.results["cases"]) > 0
    (chosen,), (same,) = (o.results["models"] for o in (stay, sent))
    assert chosen["selected_round"] == same["selected_round"] == 2, "else parts of another round would not be noticed"
    whole, rest = (load_file(o.folder / f"weights/{KEY}.safetensors") for o in (sent, stay))
    assert all(torch.equal(t, whole[n]) for n, t in rest.items())
    own = {n: t for name in SEQUENCES for n, t in load_file(_part(stay.folder, name)).items()}
    assert all(torch.equal(t, whole[n]) for n, t in own.items())
    assert rest.keys() | own.keys() == whole.keys()
    assert not list((stay.folder / "sites").rglob(f"*{BEST}*"))
    found, expected = (label_maps(o.folder / f"sites/first/segmented/{KEY}") for o in (stay, sent))
    assert len(found) == 1
    assert_same(found, expected)
    assert not list(stay.folder.glob("sites/second/segmented"))


def _part(run: Path, site: str) -> Path:
    return run / "sites" / site / f"models/{KEY}.safetensors"


@pytest.mark.parametrize("when", [1, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    when: int, data: Path, tmp_path: Path, both: Mapping[str, tuple[Outcome, Said, dict[str, Tensor]]]
) -> None:
    """Server and sites, after a kill that came between a round and its validation."""

    def stop(event: Event) -> None:
        if (event.kind, event.round) == ("round", when):
            raise KeyboardInterrupt

    study = study_on(data)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "run", watch=stop)
    assert run(study, tmp_path / "run", resume=True).exit_code == 0
    before = both["stay"][0].folder
    for file in [f"weights/{KEY}.safetensors", *(f"sites/{name}/models/{KEY}.safetensors" for name in SEQUENCES)]:
        assert (tmp_path / "run" / file).read_bytes() == (before / file).read_bytes(), file


def with_secrets(patch: pytest.MonkeyPatch) -> None:
    """Have each site draw from a secret in its folder, as a site of its own does, and not of a simulation."""
    begin = Site.__init__

    def owned(self: Site, settings: Any, **given: Any) -> None:
        begin(self, replace(settings, secret=settings.folder / "secret"), **given)

    patch.setattr(Site, "__init__", owned)


def test_between_hospitals_a_front_begins_by_a_secret_of_its_site(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other secrets make other fronts. A run that was stopped in its first round draws the same ones again."""
    study, answer = study_on(data, rounds=2, new_patients=False), Site.answer
    with_secrets(monkeypatch)
    whole = run(study, tmp_path / "whole").folder
    other = run(study, tmp_path / "other").folder
    for name in SEQUENCES:
        target = tmp_path / "stopped/sites" / name / "secret"
        target.parent.mkdir(parents=True)
        shutil.copyfile(whole / "sites" / name / "secret", target)

    def fail(self: Site, request: Any, cancelled: Any) -> Any:
        if isinstance(request, Finish) and self.settings.name == "third":
            raise FloatingPointError("once")
        return answer(self, request, cancelled)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "answer", fail)
        with pytest.raises(EngineError, match="round 1: 1 of 3 parties failed"):
            run(study, tmp_path / "stopped")
    again = run(study, tmp_path / "stopped", resume=True).folder
    for name in SEQUENCES:
        assert _part(again, name).read_bytes() == _part(whole, name).read_bytes()
        mine, theirs = (load_file(_part(folder, name)) for folder in (whole, other))
        kernels = [n for n in mine if n.startswith("fronts.") and mine[n].ndim > 1]
        assert kernels
        assert not any(torch.equal(mine[n], theirs[n]) for n in kernels)
    fronts = [load_file(_part(whole, name)) for name in SEQUENCES]
    first = [next(t for n, t in of.items() if n.startswith("fronts.") and t.ndim > 1) for of in fronts]
    assert not any(torch.equal(a, b) for a, b in ((first[0], first[1]), (first[1], first[2]), (first[0], first[2])))


def test_a_party_that_cannot_keep_its_part_of_the_best_round_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of two rounds would make no model; with the site mended, the run goes on to what it would have been."""
    answer = Site.answer

    def full(self: Site, request: Any, cancelled: Any) -> Any:
        if isinstance(request, Keep) and request.model.endswith(BEST) and self.settings.name == "second":
            raise OSError("the disk is full")
        return answer(self, request, cancelled)

    study = study_on(data, rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr(Site, "answer", full)
        with pytest.raises(EngineError, match=r"vertical, round 1, keeping: second: .*All parties must keep"):
            run(study, tmp_path / "run")
    assert run(study, tmp_path / "run", resume=True).exit_code == 0


def test_parts_of_two_rounds_are_not_scored_together(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A party that did not keep its part of a round has that of the one before."""
    answer, rounds = Site.answer, list[str]()

    def full(self: Site, request: Any, cancelled: Any) -> Any:
        if isinstance(request, Keep) and request.model == KEY and self.settings.name == "second":
            rounds.append(request.model)
            if len(rounds) == 2:
                raise OSError("the disk is full")
        return answer(self, request, cancelled)

    raw = tables(data, "sent", new_patients=False) | {"validation": {"every": 1}}
    monkeypatch.setattr(Site, "answer", full)
    outcome = run(parse_study(raw, folder=data), tmp_path / "run")
    lines = [json.loads(line) for line in (outcome.folder / "curves.jsonl").read_text().splitlines()]
    assert [bool(line["dice"]) for line in lines] == [True, False, True]
    assert outcome.exit_code == 4
    assert any("vertical, round 2, validation: second" in text for text in outcome.results["problems"])


def test_scores_that_failed_are_had_when_the_run_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site's part of the best round is kept until all is scored: the model is given once more before that."""
    answer, kept = Site.answer, list[str]()

    def fail(self: Site, request: Any, cancelled: Any) -> Any:
        if isinstance(request, Keep) and self.settings.name == "third":
            kept.append(request.source or "")
        if isinstance(request, Look) and self.settings.name == "third" and kept[-1].endswith(BEST):
            raise OSError("the disk is away")
        return answer(self, request, cancelled)

    study = study_on(data, rounds=1, new_patients=False)
    with monkeypatch.context() as patch:
        patch.setattr(Site, "answer", fail)
        assert run(study, tmp_path / "run").exit_code == 4
    outcome = run(study, tmp_path / "run", resume=True)
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    assert not list((outcome.folder / "sites").rglob(f"*{BEST}*"))


def test_nobody_can_use_it_in_one_place(
    both: Mapping[str, tuple[Outcome, Said, dict[str, Tensor]]], data: Path, tmp_path: Path
) -> None:
    folder = both["stay"][0].folder
    for do in (
        lambda: open_finished(folder),
        lambda: predict(folder, data / "test/imagesTr", tmp_path / "out"),
        lambda: export_run(folder, tmp_path / "model", format="safetensors"),
        lambda: export_run(folder, tmp_path / "model", format="safetensors", model=KEY),
    ):
        with pytest.raises(StudyError, match=r"nowhere as a whole: .*Segment new patients with all sites together"):
            do()
    assert finished_models(folder) == ()
    assert not (tmp_path / "out").exists()


def test_what_one_place_trains_beside_it_can_be_used(data: Path, tmp_path: Path) -> None:
    raw = tables(data, rounds=1, new_patients=False, compare=["centralized"])
    raw["variants"] = {"sent": {"protocol": {"fronts": "sent"}}, "there": {"protocol": {"body": "labels"}}}
    outcome = run(parse_study(raw, folder=data), tmp_path / "run")
    assert (outcome.exit_code, outcome.results["problems"]) == (0, [])
    assert finished_models(outcome.folder) == ("centralized", "sent")
    assert not [n for n in load_file(outcome.folder / "weights/there.safetensors") if n.startswith("fronts.")]
    assert {c["model"] for c in outcome.results["cases"]} == {KEY, "centralized", "sent", "there"}
    predict(outcome.folder, data / "test/imagesTr", tmp_path / "out", model="centralized")
    assert len(label_maps(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test": {"data": "test"}}, "[test] data = 'test' is not allowed with [protocol] fronts = 'stay'"),
        ({"network": {"name": "unet", "weights": "w.pth"}}, "[network] weights = 'w.pth' is not allowed with"),
        ({"training": {"tensors": ["norms"]}}, "[training] tensors = ['norms'] is not allowed with"),
    ],
)
def test_what_a_study_may_not_say_with_it(data: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError) as e:
        parse_study(tables(data) | changes, folder=data)
    assert said in str(e.value)
    variant = {"variants": {"other": {"protocol": {"fronts": "stay"}}}}
    with pytest.raises(StudyError) as e:
        parse_study(tables(data, "sent") | changes | variant, folder=data)
    assert f"[variants.other]: {said}" in str(e.value)
    if "network" not in changes:
        parse_study(tables(data, "sent") | changes, folder=data)


def test_a_study_that_is_written_is_read_as_it_was(data: Path, tmp_path: Path) -> None:
    study = study_on(data)
    (tmp_path / "study.toml").write_text(to_toml(study))
    assert read_study(tmp_path / "study.toml") == study
