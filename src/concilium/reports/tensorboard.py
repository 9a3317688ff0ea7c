"""Training losses and validation Dice of every round as TensorBoard's event files: a folder per model, scalars only."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

from concilium.errors import StudyError
from concilium.reports._cases import View
from concilium.reports._found import Found, find
from concilium.reports._sections import dice, losses


def write_events(folder: Path) -> Path:
    """The folder `tensorboard` beside the report, made anew; what a private report leaves out is left out here too.

    Raises:
        StudyError: the folder is neither a run's nor a site's, or the package `tensorboard` is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as e:
        raise StudyError(
            f"TensorBoard's files cannot be written ({e}). Expected its package. Install the extra: concilium[tensorboard]."
        ) from e
    found = find(folder)
    view = View(found, private=found.is_shared)
    out = folder / "tensorboard"
    shutil.rmtree(out, ignore_errors=True)
    began, at = _times(found)
    for tag, lines in {"loss": losses(view), "dice": dice(view)}.items():
        for model, sites in lines.items():
            writer = EventFileWriter(str(out / model), filename_suffix=f".{tag}")
            for site, points in sites.items():
                for number, value in points:
                    scalar = Summary(value=[Summary.Value(tag=f"{tag}/{site}", simple_value=value)])
                    time = at.get((model, int(number)), began)
                    writer.add_event(Event(step=int(number), wall_time=time, summary=scalar))
            writer.close()
    return out


def _times(found: Found) -> tuple[float, dict[tuple[str, int], float]]:
    """When the run began, and when each round of a model ended: what the rounds before it took, too; pauses are not known.

    A site's log tells the times themselves.
    """
    started = next((s["started"] for s in found.sessions if s.get("started")), None)
    began = found.folder.stat().st_mtime if started is None else datetime.fromisoformat(started).timestamp()
    at, ends = began, {}
    for line in found.rounds:
        at = line.get("time") or at + line.get("seconds", 0.0)
        ends[line["model"], line["round"]] = at
    return began, ends
