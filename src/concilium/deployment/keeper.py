"""The server's FLARE in a process of its own: its server, and a job for each site that is connected. Ends with `concilium serve`.

    python -m concilium.deployment.keeper KIT SITE,SITE

It ends what it has started when its standard input closes, however `serve` ended; and then itself at once, since a session of
FLARE's leaves threads that would go on for ever.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.flare_api import new_secure_session

from concilium.deployment import ADMINISTRATOR, ALLOWED
from concilium.deployment.kits import ADMIN
from concilium.deployment.processes import start, stop
from concilium.engines._frames import SERVER
from concilium.errors import EngineError

START_S = 60.0
AGAIN_S = 10.0
"""A site whose job ended is asked again after so long [s]."""


def keep(kit: Path, sites: tuple[str, ...], over: threading.Event) -> None:
    """Start FLARE's server and ask every connected site to take part, and again when it comes back, until it is `over`.

    Raises:
        EngineError: FLARE's server did not start, or ended.
    """
    with (kit / "keeper.lock").open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # one whose `serve` was killed is still clearing up
        _keep(kit, sites, over)


def _keep(kit: Path, sites: tuple[str, ...], over: threading.Event) -> None:
    own_storage(kit)
    server = start(kit, "server", SERVER)
    try:
        session = _open(kit, over)
        if session is not None:
            try:
                _recruit(session, sites, over, server)
            finally:
                session.close()
    finally:
        stop(server)


def own_storage(kit: Path) -> None:
    """FLARE keeps jobs where its settings say: in the kit, not in a folder that all users of the machine share."""
    path = kit / "local" / "resources.json"
    resources = json.loads(path.read_text(encoding="utf-8"))
    storage = kit.resolve() / "storage"
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(storage / "jobs")
    path.write_text(json.dumps(resources, indent=1) + "\n", encoding="utf-8")


def _open(kit: Path, over: threading.Event) -> Any:
    """A session with FLARE's server; `None` if it is over before there is one."""
    until = time.monotonic() + START_S
    while not over.is_set():
        try:
            return new_secure_session(ADMINISTRATOR, str(kit.resolve() / ADMIN), timeout=10)
        except Exception as e:  # FLARE raises many kinds while its server starts
            if time.monotonic() > until:
                raise EngineError(
                    f"FLARE's server did not start within {START_S:.0f} s ({type(e).__name__}). Expected it on the kit's port. "
                    f"Look into {kit / 'log.txt'} and {kit / 'console.log'}."
                ) from e
            time.sleep(0.3)
    return None


def _recruit(session: Any, sites: tuple[str, ...], over: threading.Event, server: Any) -> None:
    jobs: dict[str, str] = {}
    asked: dict[str, float] = {}
    while not over.wait(0.5):
        if server.poll() is not None:
            raise EngineError(
                f"FLARE's server ended with {server.returncode}. Expected it to run on. Look into its log."
            )
        with suppress(Exception):  # a site that cannot be asked now is asked again
            present = {client.name for client in session.get_system_info().client_info}
            for site in sites:
                late = time.monotonic() - asked.get(site, -AGAIN_S) >= AGAIN_S
                if site in present and late and (site not in jobs or _ended(session, jobs[site])):
                    asked[site] = time.monotonic()
                    jobs[site] = _submit(session, site)
    until = time.monotonic() + 5
    with suppress(Exception):  # the server is ended next, whatever FLARE says
        while time.monotonic() < until and not all(_ended(session, job) for job in jobs.values()):
            time.sleep(0.3)
        for job in jobs.values():
            if not _ended(session, job):
                session.abort_job(job)


def _ended(session: Any, job: str) -> bool:
    return str(session.get_job_meta(job).get("status", "")).startswith("FINISHED")


def _submit(session: Any, site: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / f"concilium-{site}"
        (job / "app" / "config").mkdir(parents=True)
        meta = {"name": job.name, "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["server", site]}}
        none: dict[str, Any] = {
            "format_version": 2,
            "task_data_filters": [],
            "task_result_filters": [],
            "components": [],
        }
        controller = {"id": "site", "path": ALLOWED[0], "args": {"site": site}}
        executor = {"path": ALLOWED[1], "args": {}}
        for name, value in {
            "meta.json": meta,
            "app/config/config_fed_server.json": none | {"workflows": [controller]},
            "app/config/config_fed_client.json": none | {"executors": [{"tasks": ["*"], "executor": executor}]},
        }.items():
            (job / name).write_text(json.dumps(value), encoding="utf-8")
        return str(session.submit_job(str(job)))


def main() -> None:
    """Read the arguments and keep FLARE until standard input closes."""
    over = threading.Event()

    def listen() -> None:
        while sys.stdin.buffer.read(1):
            pass
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    code = 0
    try:
        keep(Path(sys.argv[1]), tuple(sys.argv[2].split(",")), over)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
