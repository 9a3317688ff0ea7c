"""Training losses and validation Dice of every round as TensorBoard's event files: a folder per model, scalars only."""

from __future__ import annotations

import shutil
from pathlib import Path

from concilium.errors import StudyError
from concilium.reports._cases import View
from concilium.reports._found import find
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
    for tag, lines in {"loss": losses(view), "dice": dice(view)}.items():
        for model, sites in lines.items():
            writer = EventFileWriter(str(out / model), filename_suffix=f".{tag}")
            for site, points in sites.items():
                for number, value in points:
                    scalar = Summary(value=[Summary.Value(tag=f"{tag}/{site}", simple_value=value)])
                    writer.add_event(Event(step=int(number), wall_time=number, summary=scalar))
            writer.close()
    return out
