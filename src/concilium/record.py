"""The run folder: everything a run leaves behind, written so that a kill at any moment loses at most the round at hand.

study.toml fingerprint.json plans.json environment.json   what was asked, measured, decided, and on what it ran
rounds.jsonl                                              one line a round: who was asked, losses, bytes, failures
weights/MODEL.safetensors                                 finished models that the server may have
results.json                                              scores and summaries (schema: results.schema.json of the package)
curves.jsonl                                              validation Dice after rounds, where the study asks for it
checkpoints/MODEL/                                        the last complete round, to resume from
sites/SITE/                                               in a simulation: what is private to each site
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from concilium.engines import Traffic
from concilium.environment import environment
from concilium.errors import StudyError
from concilium.messages import Tensors, describe
from concilium.protocols import Round
from concilium.study import Study, goes_on, to_toml
from concilium.wire import read_tensors, write_tensors


class Record:
    """An open run folder."""

    def __init__(self, folder: Path, study: Study, *, resume: bool) -> None:
        self.folder = folder
        text = to_toml(study)
        existing = folder / "study.toml"
        if existing.exists() and not resume:
            raise StudyError(
                f"{folder} already holds a run. Expected a new folder. Give another --out, or go on with --resume."
            )
        if existing.exists() and not goes_on(existing.read_text(encoding="utf-8"), text):
            raise StudyError(
                f"The study differs from {existing}. A run goes on with the study it began with, or with more seeds. Give "
                "another --out."
            )
        if folder.exists() and not folder.is_dir():
            raise StudyError(f"{folder} is a file. Expected a new folder for the run. Give another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        told = self.read_json("environment.json") or {"run": secrets.token_hex(8), "sessions": []}
        self._sessions: list[dict[str, Any]] = told["sessions"]
        self._sessions.append(environment())
        self.run_id: str = told["run"]
        self.write_json("environment.json", told)
        self._write(existing, text.encode())
        self._drop_uncommitted()

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    # ----------------------------------------------------------------------------------------------------------- files

    def read_json(self, name: str) -> Any:
        """What is in the file; `None` where there is none."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_json(self, name: str, value: object) -> None:
        """Write the file, at once or not at all."""
        self._write(self.folder / name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def write_text(self, name: str, text: str) -> None:
        """Write the file, at once or not at all."""
        self._write(self.folder / name, text.encode())

    def save_weights(self, model: str, weights: Tensors) -> None:
        """Write a finished model that the server may have."""
        write_tensors(self.folder / "weights" / f"{model}.safetensors", weights, {"model": model})

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    @property
    def changes(self) -> list[str]:
        """What is not as it was in the run's first session: the bits may not be those of a run without a stop."""
        then, now = (
            {**s["packages"], "python": s["python"], "GPU": s["gpu"]} for s in (self._sessions[0], self._sessions[-1])
        )
        return [
            f"The run began with {k} {then.get(k)} and went on with {now[k]}." for k in now if then.get(k) != now[k]
        ]

    # ---------------------------------------------------------------------------------------------------------- rounds

    def rounds(self, model: str) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl for this model."""
        return [line for line in self._lines("rounds.jsonl") if line["model"] == model]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [line for line in map(_parsed, text.splitlines()) if line is not None]

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("ab") as file:
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def commit(self, model: str, done: Round, *, seconds: float) -> None:
        """Write a complete round: its line, then the state that the next one starts from, which makes the line valid."""
        line = {
            "model": model,
            "round": done.number,
            "seconds": round(seconds, 3),
            "matched": done.n_tensors, "asked": sorted(done.traffic), **done.told_server(),
            "sites": {
                site: {
                    "loss": a.loss, "n_cases": a.n_cases, "n_steps": a.n_steps, "n_asked": done.asked.get(site, a.n_steps),
                    "seconds": round(a.seconds, 3), "bytes_down": done.traffic[site].down, "bytes_up": done.traffic[site].up,
                    **({"memory": a.memory} if a.memory > 0 else {}), **done.told_shared(site),
                    **({"privacy": vars(a.spent)} if a.spent else {}),
                }
                for site, a in sorted(done.answers.items())
            },
            "failures": {site: {"type": type(f).__name__, "text": describe(f)} for site, f in sorted(done.failures.items())},
        }  # fmt: skip
        self._append("rounds.jsonl", line)
        folder = self.folder / "checkpoints" / model
        write_tensors(
            folder / f"{done.number:06d}.safetensors", done.tensors, {"values": json.dumps(dict(done.values))}
        )
        for old_file in folder.glob("[0-9]*.safetensors"):
            if int(old_file.stem) < done.number:
                old_file.unlink()

    # ------------------------------------------------------------------------------------------ scores between rounds

    def curve(self, model: str) -> list[dict[str, Any]]:
        """The lines of curves.jsonl for this model: after which round, and the mean validation Dice of each site."""
        return [line for line in self._lines("curves.jsonl") if line["model"] == model]

    def has_curve(self, model: str, number: int) -> bool:
        """Whether this round was scored."""
        return any(line["round"] == number for line in self.curve(model))

    def add_curve(
        self, model: str, number: int, dice: Mapping[str, float], *, sent: Mapping[str, Traffic], beside: str = ""
    ) -> None:
        """Note the mean validation Dice of each site after a round, and the bytes that it took; `beside`: the model beside which
        this one was made."""
        told = {"bytes": {site: [t.down, t.up] for site, t in sent.items()}} | ({"beside": beside} if beside else {})
        self._append("curves.jsonl", {"model": model, "round": number, "dice": dict(dice), **told})

    def best_rounds(self, model: str) -> dict[str, tuple[int, float]]:
        """Site -> the round after which its validation Dice was best, the earliest of equals, and that Dice."""
        best: dict[str, tuple[int, float]] = {}
        for line in self.curve(model):
            for site, dice in line["dice"].items():
                if site not in best or dice > best[site][1]:
                    best[site] = (line["round"], dice)
        return best

    def save_best(self, model: str, number: int, weights: Tensors) -> None:
        """Keep the best weights so far."""
        write_tensors(self.folder / "checkpoints" / model / "best.safetensors", weights, {"round": str(number)})

    def best_weights(self, model: str) -> Tensors | None:
        """The best weights so far, where they were kept."""
        path = self.folder / "checkpoints" / model / "best.safetensors"
        return read_tensors(path)[0] if path.is_file() else None

    @property
    def begun(self) -> bool:
        """Whether there is a complete round of any model."""
        return any(self.folder.glob("checkpoints/*/[0-9]*.safetensors"))

    def last_round(self, model: str) -> Round | None:
        """The last complete round, as the state to go on from."""
        number = self._last_number(model)
        if number == 0:
            return None
        tensors, about = read_tensors(self.folder / "checkpoints" / model / f"{number:06d}.safetensors")
        return Round(number, tensors, json.loads(about["values"]))

    def _last_number(self, model: str) -> int:
        folder = self.folder / "checkpoints" / model
        return max((int(path.stem) for path in folder.glob("[0-9]*.safetensors")), default=0)

    def _drop_uncommitted(self) -> None:
        """Take out what a killed run left: a line that was cut off, lines of rounds without a checkpoint."""
        for name in ("rounds.jsonl", "curves.jsonl"):
            path = self.folder / name
            if not path.is_file():
                continue
            before = path.read_bytes()
            read = [(text, _parsed(text)) for text in before.decode(errors="replace").splitlines()]
            lines = [(text, line["round"], line.get("beside", line["model"])) for text, line in read if line]
            last = {model: self._last_number(model) for model in {model for *_, model in lines}}
            kept = [text + "\n" for text, number, model in lines if number <= last[model]]
            after = "".join(kept).encode()
            if after != before:
                self._write(path, after)

    # -------------------------------------------------------------------------------- what a simulation may look up

    def site_error(self, site: str, reference: str) -> str | None:
        """The words of a failure in the log of a simulated site, which lies in this folder."""
        path = self.folder / "sites" / site / "log.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if reference and path.is_file() else []:
            entry = _parsed(line)
            if entry is not None and entry.get("reference") == reference:
                return str(entry["error"]).strip().splitlines()[-1]
        return None

    def case_names(self, site: str) -> dict[int, dict[str, str]]:
        """Number -> case and patient, as a simulated site noted it; empty where the site is elsewhere."""
        noted = self.read_json(f"sites/{site}/cases.json") or {}
        member = "test" if site == "test" else site
        return {e["number"]: {"case": e["case"], "patient": e["patient"]} for e in noted.get(member, [])}

    def is_elsewhere(self, site: str) -> bool:
        """Whether no site of a simulation is called so; nor the pool, which has no cases of its own."""
        return site != "pooled" and not self.case_names(site)

    def excluded(self, sites: Iterable[str]) -> list[dict[str, Any]]:
        """Cases that simulated sites set aside, with the reason."""
        found = {}
        for site in sites:
            for key, (code, text) in (self.read_json(f"sites/{site}/excluded.json") or {}).items():
                member, _, case = key.partition("/")  # a site may also have met cases of the test set
                found[key] = {"site": member, "case": case, "reason": code, "text": text, "count": 1}
        return list(found.values())


def _locked(folder: Path) -> int:
    """The lock of a run folder, as an open file's number: held until that is closed, at the latest by the process's end.

    Raises:
        StudyError: another process holds it.
    """
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows has none of this kind
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):  # any other: the disk cannot lock
            os.close(file)
            raise StudyError(
                f"{folder} is in use by another process. One at a time may run there. Wait for it, or end it first."
            ) from e
    return file


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of a JSON-lines file; `None` for one that was cut off."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
