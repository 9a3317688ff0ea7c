"""Kits for a federation: certificates of one authority, and what each machine may do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import ParticipantType
from nvflare.lighter.entity import Project
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.impl.signature import SignatureBuilder
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.spec import Builder, ProvisionContext

from concilium.deployment import ADMINISTRATOR, ALLOWED, ORGANISATION
from concilium.deployment.kits import ADMIN, AUTHORITY, About, write_about
from concilium.engines._frames import SERVER
from concilium.errors import StudyError

PERMISSIONS: Mapping[str, Any] = {
    "format_version": "1.0",
    "permissions": {
        "project_admin": {
            "submit_job": "any",
            "manage_job": "any",
            "view": "any",
            "operate": "any",
            "clone_job": "none",
            "download_job": "none",
            "shell_commands": "none",
            "byoc": "none",
        }
    },
}
"""What a site lets the submitter do: start and stop the job of `ALLOWED`; no code from outside, no shell."""


def provision(
    name: str, sites: Sequence[str], out: Path, *, hosts: Sequence[str], port: int, message_port: int
) -> dict[str, Path]:
    """Write a kit for the server and for each site into `out`; kit by name.

    Args:
        hosts: under which sites reach the server; all stand in its certificate, and sites dial the first.
        port: of FLARE, message_port: of our messages; both are opened at the server, none at a site.

    Raises:
        StudyError: `out` is not empty, or FLARE refuses.
    """
    if out.exists() and any(out.iterdir()):
        raise StudyError(
            f"{out} is not empty. Kits hold private keys and are never written over. Give another --out, or remove it."
        )
    wrong = [
        n
        for n in (name, *sites)
        if n in (SERVER, ADMIN, AUTHORITY) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", n, re.ASCII)
    ]
    if wrong:
        raise StudyError(
            f"{', '.join(map(repr, wrong))} is not a name for a study or a site. Allowed: letters, digits, -, _ and ., but not "
            f"{SERVER}, {ADMIN} or {AUTHORITY}, which kits have. Rename it."
        )
    try:
        return _provision(name, sites, out, hosts, port, message_port)
    except (ValueError, KeyError, StopIteration, OSError) as e:  # what FLARE says to names that it does not take
        shutil.rmtree(out, ignore_errors=True)
        raise StudyError(
            f"FLARE could not make kits for sites {', '.join(sites)} and hosts {', '.join(hosts)} ({e}). Allowed: letters, "
            "digits, - and _ in names, and a host's name or address. Correct them."
        ) from e


def _provision(
    name: str, sites: Sequence[str], out: Path, hosts: Sequence[str], port: int, message_port: int
) -> dict[str, Path]:
    project = Project(name, f"Concilium study {name}", props={"api_version": 3})
    project.set_server(
        SERVER,
        ORGANISATION,
        {"fed_learn_port": port, "admin_port": port, "default_host": hosts[0], "host_names": list(hosts[1:])},
    )
    for site in sites:
        project.add_client(site, ORGANISATION, {"allow_log_streaming": False})
    project.add_admin(ADMINISTRATOR, ORGANISATION, {"role": "project_admin"})
    about = {party: About(party, hosts[0], port, message_port, tuple(sites)) for party in (SERVER, *sites)}
    log = _Log()
    builders = [
        WorkspaceBuilder(),
        StaticFileBuilder(config_folder="config", scheme="http"),
        CertBuilder(),
        _LocalFiles(about),
        SignatureBuilder(),
    ]
    work = out / ".provisioning"
    context = Provisioner(str(work), builders).provision(project, logger=log)
    if context.get("build_error"):
        raise ValueError("; ".join(log.lines[-3:]))
    made = Path(context["current_prod_dir"])
    kits = {party: out / party for party in about}
    for party, kit in kits.items():
        shutil.move(made / party, kit)
    shutil.move(made / ADMINISTRATOR, kits[SERVER] / ADMIN)
    authority = out / AUTHORITY
    shutil.move(next(work.glob("*/state")), authority)
    for path in (authority, *authority.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    shutil.rmtree(work)
    return kits


class _LocalFiles(Builder):  # type: ignore[misc]
    """Writes what FLARE may do on a machine into its kit's `local/`."""

    def __init__(self, about: Mapping[str, About]) -> None:
        self.about = about

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        """Called by FLARE."""
        for party in project.get_all_participants():
            if party.type not in (ParticipantType.SERVER, ParticipantType.CLIENT):
                continue
            local = Path(ctx.get_local_dir(party))
            resources = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
            resources["class_allow_list"] = list(ALLOWED)
            resources["class_list_enforcement_mode"] = "enforce"
            unwanted = ("log_receiver", "site_log_streamer")
            resources["components"] = [c for c in resources["components"] if c["id"] not in unwanted]
            if party.type == ParticipantType.CLIENT:
                resources["allow_log_streaming"] = False
            for component in resources["components"]:
                if component["id"] == "job_scheduler":
                    component["args"]["max_jobs"] = 2 * len(self.about) + 2  # a job for each site, and for some again
            _write(local / "resources.json", resources)
            _write(local / "authorization.json", PERMISSIONS)
            logging = json.loads((local / "log_config.json.default").read_text(encoding="utf-8"))
            files = ("logFileHandler", "errorFileHandler")
            logging["handlers"] = {k: v for k, v in logging["handlers"].items() if k in files}
            logging["loggers"]["root"] = {"level": "INFO", "handlers": list(files)}
            _write(local / "log_config.json", logging)
            write_about(local.parent, self.about[party.name])


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


class _Log:
    """Keeps what FLARE says while it provisions."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def debug(self, text: str) -> None:
        self.lines.append(text)

    info = warning = error = debug
