"""Values that a site keeps as JSON in its own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def note(folder: Path, name: str, value: Any) -> None:
    """Write a value as JSON, at once or not at all."""
    path = folder / name
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8")
    unfinished.replace(path)


def noted(folder: Path, name: str) -> Any:
    """What was written; an empty table where nothing was."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
