"""The part of a dossier that says what is kept, where, and how long."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from concilium import record
from concilium.reports._elements import size
from concilium.reports._sheet import Content, Grid, Part


def retention(run: Path | None) -> Part:
    """What lies where, and how long."""
    rows = [[name, meaning, "until someone deletes the run folder"] for name, meaning in _run_folder()]
    site = [
        [
            "preprocessed cases",
            "copies of images and label maps, as the network sees them",
            "until the site deletes them (cache)",
        ],
        ["log, list of cases", "what happened, with names of cases and texts of errors", "until the site deletes them"],
        [
            "snapshots of models in training",
            "weights and optimiser of the last two rounds",
            "until the model is finished; after a failure until the site deletes them",
        ],
        ["finished models", "weights", "until the site deletes them"],
        ["scores and pictures of cases", "for the site's own report", "until the site deletes them"],
    ]
    content: list[Content] = [
        Grid(["at the server, in the run folder", "what", "how long"], rows),
        Grid(["at a site, in its own folder", "what", "how long"], site),
        "Concilium deletes nothing after a run, on no machine: whoever owns a folder decides, and has to do it. Agree "
        "on dates, and note "
        "them below. In a simulation the sites' folders lie in the run folder (sites/).",
    ]
    if run is not None:
        content.insert(1, Grid(["in this run folder now", "files", "size"], _sizes(run), figures=2))
    return Part("What is kept, where, and how long", content)


def _run_folder() -> Iterator[tuple[str, str]]:
    """What the record says of the files that it writes."""
    for line in inspect.cleandoc(record.__doc__ or "").splitlines():
        if parts := re.match(r"(\S.*?) {2,}(\S.*)", line):
            yield parts[1].replace(" ", ", "), parts[2]


def _sizes(run: Path) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for path in sorted(run.iterdir()):
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        rows.append([path.name + "/" * path.is_dir(), f"{len(files):,}", size(sum(p.stat().st_size for p in files))])
    return rows
