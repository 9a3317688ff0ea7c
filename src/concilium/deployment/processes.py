"""FLARE's own processes on a machine: started in the background, ended with all that they have started."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from concilium.deployment import ORGANISATION

PATIENCE_S = 10.0


def start(kit: Path, role: str, name: str) -> subprocess.Popen[bytes]:
    """Start FLARE's process of a kit; `role` is `server` or `client`. Its output goes to `console.log` in the kit."""
    kit = kit.resolve()
    (kit / "transfer").mkdir(exist_ok=True)
    command = [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{role}.{role}_train", "-m", str(kit)]
    command += ["-s", f"fed_{role}.json", "--set", "secure_train=true", f"org={ORGANISATION}", "config_folder=config"]
    if role == "client":
        command.append(f"uid={name}")
    with (kit / "console.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=kit,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | _QUIET,
            start_new_session=True,
        )


_QUIET = {"MALLOC_ARENA_MAX": "4"}  # threads that pass large messages on would each keep memory of their own


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: asked first, forced after a while."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        _signal(member, force=False)
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    for member in alive:
        _signal(member, force=True)
    process.wait()


def _signal(process: psutil.Process, *, force: bool) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill() if force else process.terminate()
