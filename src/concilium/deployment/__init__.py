"""The same study between hospitals: kits for the server and each site (`provision`), and the two ends (`serve`, `join`).

NVIDIA FLARE gives identity and permission: it makes the certificates, decides who may start what, starts a process for a study at
each site, and keeps an audit log. What it may build there are the two classes in `ALLOWED` and nothing else: no code travels.
A site's part in a run is a FLARE job of its own, so that the end of one touches no other, and a site that comes back is asked
again. The study itself runs in the process of `concilium serve`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from concilium.errors import StudyError

ALLOWED = ("concilium.deployment.controller.SiteController", "concilium.deployment.executor.SiteExecutor")
"""The classes that FLARE may build, at the server and at a site."""
ORGANISATION = "concilium"
ADMINISTRATOR = "admin@concilium.local"
"""Who submits jobs: the process of `concilium serve`."""


def require_flare() -> None:
    """Check that FLARE is installed.

    Raises:
        StudyError: it is not.
    """
    if find_spec("nvflare") is None:
        raise StudyError(
            f"Connections between machines need NVIDIA FLARE, which {sys.executable} does not have. Expected the extra 'flare'. "
            "Install it with: pip install -c constraints.txt '.[flare]'"
        )
