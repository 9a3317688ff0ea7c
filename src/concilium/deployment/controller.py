"""The server's class that FLARE builds for a site's part in a run: it asks the site to join, and waits until it has left."""

from __future__ import annotations

from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable

JOIN = "join"


class SiteController(Controller):  # type: ignore[misc]
    """One task for one site; no message of the study passes here."""

    def __init__(self, site: str) -> None:
        super().__init__(task_check_period=0.2)
        self.site = site

    def start_controller(self, fl_ctx: Any) -> None:
        """Called by FLARE."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """Called by FLARE."""
        self.send_and_wait(Task(JOIN, Shareable()), fl_ctx, targets=[self.site], abort_signal=abort_signal)

    def stop_controller(self, fl_ctx: Any) -> None:
        """Called by FLARE."""

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: Any
    ) -> None:
        """Called by FLARE for what comes after the task is over: nothing to do."""
