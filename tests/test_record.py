"""The run folder: what is refused, what survives a kill, and what is read back."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import concilium.record
from concilium.collect import Answer
from concilium.engines import Traffic
from concilium.errors import StudyError
from concilium.messages import SiteLost, SiteTimeout
from concilium.protocols import Round
from concilium.record import Record
from concilium.study import Study, parse_study, read_study, with_seeds


def study(**protocol: Any) -> Study:
    raw = {
        "study": {"name": "s"},
        "sites": {"north": {"data": "/n"}, "south": {"data": "/s"}},
        "protocol": {"rounds": 3, "steps": 2} | protocol,
        "engine": {"threads": 1},
    }
    return parse_study(raw, folder=Path("/"), check_data=False)


def record(folder: Path, *, resume: bool = False) -> Record:
    return Record(folder, study(), resume=resume)


def tensors(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "weights/conv": torch.randn(3, 4, generator=generator),
        "weights/n": torch.tensor([number, 2**62]),
        "rule/m": torch.tensor([0.1, -0.0, math.inf], dtype=torch.float64),
        "rule/none": torch.empty(0, 3),
    }


def round_(number: int, *, with_tensors: bool = True) -> Round:
    return Round(
        number,
        tensors(number) if with_tensors else {},
        {"best": 0.1, "history": (1, 2), "nested": {"a": None}},
        {"south": Answer(3, 2, 0.1 * number, 1.23456), "north": Answer(1, 2, 0.5, 2.0)},
        {"west": SiteLost(), "east": SiteTimeout(5.0)},
        {"north": Traffic(10, 20), "south": Traffic(30, 40), "west": Traffic(50, 0), "east": Traffic(50, 0)},
        n_tensors=4,
        asked={"north": 5, "south": 2},
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[tuple[str, int]]:
    return [(line["model"], line["round"]) for line in lines(folder)]


# ---------------------------------------------------------------------------------------------------- new, or resumed


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    record(tmp_path / "run")
    with pytest.raises(StudyError, match=r"run already holds a run\. .*--out.*--resume"):
        record(tmp_path / "run")
    record(tmp_path / "run", resume=True)


def test_another_study_is_refused_on_resume(tmp_path: Path) -> None:
    record(tmp_path)
    before = (tmp_path / "study.toml").read_bytes()
    with pytest.raises(StudyError, match=r"differs from .*study\.toml"):
        Record(tmp_path, study(rounds=4), resume=True)
    assert (tmp_path / "study.toml").read_bytes() == before


def test_more_seeds_are_the_same_study_and_fewer_are_not(tmp_path: Path) -> None:
    record(tmp_path).close()
    again = Record(tmp_path, with_seeds(study(), 3), resume=True)
    assert "seeds = 3" in (tmp_path / "study.toml").read_text()
    again.close()
    for other in (with_seeds(study(), 2), with_seeds(study(rounds=4), 4)):
        with pytest.raises(StudyError, match=r"differs from .*study\.toml\. .*more seeds"):
            Record(tmp_path, other, resume=True)


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    for resume in (False, True):
        with pytest.raises(StudyError, match=r"run is a file\. Expected a new folder"):
            record(tmp_path / "run", resume=resume)
    assert (tmp_path / "run").read_text() == "mine"


def test_what_was_there_before_the_run_stays(tmp_path: Path) -> None:
    """`concilium demo` writes its data into the folder first."""
    (tmp_path / "data").mkdir()
    record(tmp_path)
    assert (tmp_path / "data").is_dir()


def test_the_study_is_written_with_every_default(tmp_path: Path) -> None:
    record(tmp_path / "a" / "b")
    assert read_study(tmp_path / "a" / "b" / "study.toml", check_data=False) == study()


def test_a_run_keeps_its_id_and_notes_each_session(tmp_path: Path) -> None:
    first = record(tmp_path)
    second = record(tmp_path, resume=True)
    assert first.run_id == second.run_id
    assert first.run_id != record(tmp_path / "other").run_id
    sessions = second.read_json("environment.json")["sessions"]
    assert len(sessions) == 2
    assert {"concilium", "python", "platform", "cores", "packages", "started"} <= set(sessions[0])
    assert sessions[0]["packages"]["torch"].startswith(torch.__version__.split("+")[0])


# -------------------------------------------------------------------------------------------------------------- rounds


def test_a_line_says_who_took_part_and_what_it_took(tmp_path: Path) -> None:
    record(tmp_path).commit("federated", round_(1), seconds=9.87654)
    assert lines(tmp_path) == [
        {
            "model": "federated", "round": 1, "seconds": 9.877, "matched": 4, "asked": ["east", "north", "south", "west"],
            "sites": {
                "north": {"loss": 0.5, "n_cases": 1, "n_steps": 2, "n_asked": 5, "seconds": 2.0, "bytes_down": 10,
                          "bytes_up": 20},
                "south": {"loss": 0.1, "n_cases": 3, "n_steps": 2, "n_asked": 2, "seconds": 1.235, "bytes_down": 30,
                          "bytes_up": 40},
            },
            "failures": {
                "east": {"type": "SiteTimeout", "text": "no reply within 5 s"},
                "west": {"type": "SiteLost", "text": "lost"},
            },
        }
    ]  # fmt: skip


def test_the_last_round_comes_back_to_the_bit(tmp_path: Path) -> None:
    written = record(tmp_path)
    assert written.last_round("federated") is None
    for number in (1, 2):
        written.commit("federated", round_(number), seconds=1.0)
    for opened in (written, record(tmp_path, resume=True)):
        last = opened.last_round("federated")
        assert last is not None
        assert last.number == 2
        assert last.values == {"best": 0.1, "history": [1, 2], "nested": {"a": None}}
        assert last.tensors.keys() == tensors(2).keys()
        for name, tensor in tensors(2).items():
            assert last.tensors[name].dtype == tensor.dtype
            assert last.tensors[name].shape == tensor.shape
            assert last.tensors[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_a_round_without_tensors_comes_back(tmp_path: Path) -> None:
    """Of `local`, whose models stay at their sites."""
    written = record(tmp_path)
    written.commit("local", round_(1, with_tensors=False), seconds=1.0)
    last = written.last_round("local")
    assert last is not None
    assert (last.number, last.tensors) == (1, {})


def test_only_the_newest_checkpoint_of_each_model_is_kept(tmp_path: Path) -> None:
    written = record(tmp_path)
    for number in range(1, 13):
        written.commit("federated", round_(number), seconds=1.0)
    written.commit("local", round_(1), seconds=1.0)
    found = sorted(p.relative_to(tmp_path / "checkpoints").as_posix() for p in tmp_path.rglob("checkpoints/*/*"))
    assert found == ["federated/000012.safetensors", "local/000001.safetensors"]


def test_rounds_are_those_of_the_model(tmp_path: Path) -> None:
    written = record(tmp_path)
    assert written.rounds("federated") == []
    for model, number in (("federated", 1), ("local", 1), ("federated", 2)):
        written.commit(model, round_(number), seconds=1.0)
    assert [line["round"] for line in written.rounds("federated")] == [1, 2]
    assert [line["round"] for line in written.rounds("local")] == [1]
    assert written.rounds("centralized") == []


def test_a_commit_writes_one_line_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is added to, never written anew: the work of a round does not grow with the number of rounds."""
    written = record(tmp_path)
    written.commit("federated", round_(1), seconds=1.0)
    path = tmp_path / "rounds.jsonl"
    inode, before = path.stat().st_ino, path.read_bytes()
    monkeypatch.setattr(Record, "_write", lambda *_: pytest.fail("rewritten"))
    written.commit("federated", round_(2), seconds=1.0)
    assert path.stat().st_ino == inode
    assert path.read_bytes().startswith(before)
    assert len(lines(tmp_path)) == 2


# -------------------------------------------------------------------------------------------------------------- kills


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed(*_: object, **__: object) -> None:
    raise Killed


def two_rounds(folder: Path) -> Record:
    written = record(folder)
    for number in (1, 2):
        written.commit("federated", round_(number), seconds=1.0)
        written.commit("local", round_(number), seconds=1.0)
    return written


def test_a_kill_between_line_and_checkpoint_loses_the_round_at_hand_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line goes when the run is resumed, so that no round is counted twice."""
    written = two_rounds(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(concilium.record, "write_tensors", killed)
        with pytest.raises(Killed):
            written.commit("federated", round_(3), seconds=1.0)
    assert ("federated", 3) in numbers(tmp_path)
    resumed = record(tmp_path, resume=True)
    assert numbers(tmp_path) == [("federated", 1), ("local", 1), ("federated", 2), ("local", 2)]
    last = resumed.last_round("federated")
    assert last is not None
    assert last.number == 2
    resumed.commit("federated", round_(3), seconds=1.0)
    assert [line["round"] for line in resumed.rounds("federated")] == [1, 2, 3]


def test_a_kill_before_the_old_checkpoint_is_gone_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = two_rounds(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            written.commit("federated", round_(3), seconds=1.0)
    assert len(list((tmp_path / "checkpoints" / "federated").glob("*.safetensors"))) == 2
    resumed = record(tmp_path, resume=True)
    last = resumed.last_round("federated")
    assert last is not None
    assert last.number == 3
    assert ("federated", 3) in numbers(tmp_path)
    resumed.commit("federated", round_(4), seconds=1.0)
    assert len(list((tmp_path / "checkpoints" / "federated").glob("*.safetensors"))) == 1


def test_a_line_cut_off_anywhere_is_tolerated(tmp_path: Path) -> None:
    """And the next line begins on its own."""
    two_rounds(tmp_path)
    path = tmp_path / "rounds.jsonl"
    whole = path.read_bytes()
    third = json.dumps(lines(tmp_path)[-2] | {"round": 3}).encode() + b"\n"
    for end in (1, 2, len(third) // 2, len(third) - 2, len(third) - 1, len(third)):
        path.write_bytes(whole + third[:end])
        resumed = record(tmp_path, resume=True)
        assert path.read_bytes() == whole
        assert [line["round"] for line in resumed.rounds("federated")] == [1, 2]
    path.write_bytes(whole + b"\0" * 100 + b"\xff")  # what some file systems leave after a power cut
    record(tmp_path, resume=True)
    assert path.read_bytes() == whole


def test_a_checkpoint_half_written_is_none(tmp_path: Path) -> None:
    written = two_rounds(tmp_path)
    (tmp_path / "checkpoints" / "federated" / "000003.unfinished").write_bytes(b"half")
    last = written.last_round("federated")
    assert last is not None
    assert last.number == 2


def test_lines_of_a_run_without_any_checkpoint_go(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    (tmp_path / "checkpoints" / "local" / "000002.safetensors").unlink()
    record(tmp_path, resume=True)
    assert numbers(tmp_path) == [("federated", 1), ("federated", 2)]


def test_resuming_without_a_kill_changes_nothing(tmp_path: Path) -> None:
    two_rounds(tmp_path)
    path = tmp_path / "rounds.jsonl"
    before = path.read_bytes(), path.stat().st_ino
    record(tmp_path, resume=True)
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_a_file_is_written_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = record(tmp_path)
    written.write_json("results.json", {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(Killed):
            written.write_json("results.json", {"a": 2})
    assert written.read_json("results.json") == {"a": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        written.write_json("results.json", {"a": math.nan})
    assert written.read_json("results.json") == {"a": 1}
    assert written.read_json("none.json") is None


# ------------------------------------------------------------------------------------- what a simulation may look up


def test_the_words_of_a_failure_are_found_in_the_sites_own_log(tmp_path: Path) -> None:
    written = record(tmp_path)
    assert written.site_error("north", "north-0-1") is None
    folder = tmp_path / "sites" / "north"
    folder.mkdir(parents=True)
    entries = [
        {"event": "failure", "reference": "north-0-1", "error": "Traceback ...\nDataError: case c3 is empty\n"},
        {"event": "trained"},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries) + '{"cut')
    assert written.site_error("north", "north-0-1") == "DataError: case c3 is empty"
    assert written.site_error("north", "north-0-2") is None
    assert written.site_error("north", "") is None


def test_names_of_cases_and_reasons_are_found_where_the_site_noted_them(tmp_path: Path) -> None:
    written = record(tmp_path)
    assert written.case_names("north") == {}
    assert written.excluded(["north"]) == []
    about = {"number": 4, "case": "c4", "patient": "p1", "patient_number": 2}
    written.write_json("sites/north/cases.json", {"north": [about], "test": [about | {"case": "t4"}]})
    written.write_json("sites/test/cases.json", {"test": [about | {"case": "t4"}]})
    written.write_json("sites/north/excluded.json", {"north/c9": ["unreadable", "c9 cannot be read"]})
    assert written.case_names("north") == {4: {"case": "c4", "patient": "p1"}}
    assert written.case_names("test") == {4: {"case": "t4", "patient": "p1"}}
    assert written.excluded(["south", "north"]) == [
        {"site": "north", "case": "c9", "reason": "unreadable", "text": "c9 cannot be read", "count": 1}
    ]


def test_finished_weights_are_written_under_the_models_name(tmp_path: Path) -> None:
    record(tmp_path).save_weights("federated", {"w": torch.ones(2)})
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["federated.safetensors"]
