"""A site's end: FLARE's client, which waits for the server and starts the site's process for each run."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from concilium.deployment.kits import locked, read_about, read_settings, write_settings
from concilium.deployment.processes import start, stop
from concilium.engines._frames import SERVER
from concilium.errors import EngineError, StudyError


def join(kit: Path, given: dict[str, Any], *, watch: Callable[[str], None] = lambda text: None) -> None:
    """Take part in every run of the kit's federation, until interrupted.

    Args:
        given: settings to write into the kit's `site.toml`; `None` leaves one as it is.

    Raises:
        StudyError: the folder is no site's kit, or its settings are not allowed.
        EngineError: FLARE's process ended.
    """
    about = read_about(kit)
    if about.name == SERVER:
        raise StudyError(f"{kit} is the server's kit. Expected a site's. Use `concilium serve` here.")
    with locked(kit):
        settings = read_settings(kit, given)
        write_settings(kit, settings)
        watch(
            f"{about.name}: data in {settings.data}; activations may {'' if settings.split else 'not '}leave; server "
            f"{about.host}:{about.port} and :{about.message_port}"
        )
        process = start(kit, "client", about.name)
        try:
            _follow(process, kit / "connection.log", watch)
        finally:
            stop(process)
    raise EngineError(
        f"FLARE's process ended with {process.returncode}. Expected it to wait for the server. Look into {kit / 'log.txt'} and "
        f"{kit / 'console.log'}."
    )


def _follow(process: subprocess.Popen[bytes], log: Path, watch: Callable[[str], None]) -> None:
    """Tell what is written into the log until the process ends."""
    seen = log.stat().st_size if log.is_file() else 0
    while process.poll() is None:
        time.sleep(0.5)
        if log.is_file() and log.stat().st_size > seen:
            with log.open(encoding="utf-8") as file:
                file.seek(seen)
                for line in file.readlines():
                    entry = json.loads(line)
                    watch(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(entry['time']))} {entry['event']}")
                seen = file.tell()
