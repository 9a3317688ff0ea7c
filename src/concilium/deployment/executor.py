"""The site's class that FLARE builds for its part in a run: it dials the server and lets `Site` answer until the run is over.

Nothing of the job says where data lie or what may leave: that stands in the kit, on this machine.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from concilium.deployment.kits import About, certificates, read_about, settings_of_run

PATIENCE_S = 300.0
"""So long [s] a site dials a server that does not answer before it gives the run up."""


class SiteExecutor(Executor):  # type: ignore[misc]
    """Runs one task: a run from beginning to end."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: Any, abort_signal: Any) -> Shareable:
        """Called by FLARE."""
        kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir())
        serve_site(kit, read_about(kit), lambda: bool(abort_signal.triggered))
        return make_reply(ReturnCode.OK)


def serve_site(kit: Path, about: About, stopped: Any) -> None:
    """Answer the server of the kit's federation until its run is over.

    Raises:
        EngineError: the server could not be reached.
    """
    from concilium.engines._dial import Answer, Dialler
    from concilium.site import Site  # torch and all: only where it is needed
    from concilium.wire import Envelope

    def say(text: str) -> None:
        with (kit / "connection.log").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "event": text}) + "\n")

    def begin(run: str, epoch: int) -> Answer:
        if not run.isalnum():  # it names a folder here, and comes from outside
            raise ValueError(f"A run is called {run!r}.")
        site = Site(settings_of_run(kit, about, run), run=run, epoch=epoch)
        say(f"in run {run}")

        def answer(packed: bytes, heading: dict[str, Any], cancelled: Any) -> bytes:
            deadline = heading.get("deadline_s")
            until = float("inf") if deadline is None else time.monotonic() + float(deadline)
            envelope = Envelope(str(heading["run"]), int(heading["epoch"]), int(heading["sequence"]))
            return site.handle(packed, envelope, lambda: cancelled() or time.monotonic() > until)

        return answer

    dialler = Dialler(
        certificates(kit, server=False),
        (about.host, about.message_port),
        patience_s=PATIENCE_S,
        stopped=stopped,
        say=say,
    )
    dialler.serve(begin)
