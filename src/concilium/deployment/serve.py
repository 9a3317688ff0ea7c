"""The server's end: FLARE's server in a process of its own (`keeper.py`), and the study itself, which runs in this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from concilium.deployment.kits import TEST, About, certificates, locked, read_about
from concilium.engines import flare
from concilium.engines._frames import SERVER
from concilium.errors import StudyError
from concilium.line import Outcome, run
from concilium.preparation import Event
from concilium.study import Study


def serve(
    kit: Path,
    study: Study,
    out: Path,
    *,
    resume: bool = False,
    wait_s: float = 600.0,
    watch: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    """Run a study with the sites of the kit's federation, as `concilium run` does with those of one machine.

    Args:
        wait_s: so long the run waits for its sites before it begins without those that are missing.

    Raises:
        StudyError: the kit is not the server's, or the study does not fit it.
        EngineError: FLARE's server does not start; and what `run` raises.
    """
    about = read_about(kit)
    sites = (*study.sites, *([TEST] if study.test else []))
    _check(kit, about, study, sites)
    study = replace(study, engine=replace(study.engine, name="flare", workers=1, cache=None))
    with locked(kit), _keeper(kit, sites) as keeper:
        place = flare.Place(
            certificates(kit, server=True),
            ("", about.message_port),
            wait_s=wait_s,
            stands=lambda: keeper.poll() is None,
        )
        watch(Event("stage", f"Waiting for {', '.join(sites)}"))
        connect = partial(flare.connect, place=place, has_test=study.test is not None)
        return run(study, out, resume=resume, watch=watch, connect=connect)


def _check(kit: Path, about: About, study: Study, sites: tuple[str, ...]) -> None:
    if about.name != SERVER:
        raise StudyError(f"{kit} is the kit of {about.name}. Expected the server's. Use `concilium join` there.")
    if missing := [site for site in sites if site not in about.sites]:
        raise StudyError(
            f"The study has {', '.join(missing)}, for which there is no kit. Kits exist for {', '.join(about.sites)}. Correct "
            "the study, or provision again."
        )
    if "centralized" in study.protocol.compare:
        raise StudyError(
            f"[protocol] compare = {list(study.protocol.compare)} is not allowed between hospitals: 'centralized' pools "
            "all cases. Allowed: 'local'. Take it out, or run it in a simulation."
        )
    tables = {f"sites.{name}": site for name, site in study.sites.items()} | (
        {"test": study.test} if study.test else {}
    )
    unread = ["[partition]"] if study.partition is not None else []
    unread += [f"[{name}.shift]" for name, table in tables.items() if table.shift is not None]
    if unread:
        raise StudyError(
            f"{', '.join(unread)} is not allowed between hospitals: only a simulation divides or changes data. Allowed: each "
            "site's own data, as they are. Take it out, or run it in a simulation."
        )
    renamed = [
        f"[{name}] {key}"
        for name, table in tables.items()
        for key in ("labels", "channels", "annotated", "micro_batch")
        if getattr(table, key)
    ]
    if renamed:
        raise StudyError(
            f"{', '.join(renamed)} is not read between hospitals: a site says so itself. Allowed: `label_names`, "
            "`channel_names`, `annotated` and `micro_batch` in that site's site.toml. Write it there, and take it out here."
        )


@contextmanager
def _keeper(kit: Path, sites: tuple[str, ...]) -> Iterator[subprocess.Popen[bytes]]:
    """FLARE's part, which ends when this process does, or when its standard input is closed."""
    environment = os.environ | {
        "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "10"
    }  # of a site that vanished; FLARE's own is 900 s
    with (kit / "console.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "concilium.deployment.keeper", str(kit), ",".join(sites)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for this process, which then ends the other
        )
    try:
        yield process
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C would leave FLARE behind
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        signal.signal(signal.SIGINT, before)
